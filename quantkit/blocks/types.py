"""GGML's tensor types: names, numbers and block layouts, without any arithmetic.

Numbers are those of `ggml.h` (enum ggml_type), layouts those of `ggml-common.h` (the block structs): d and dmin are
float16 scales, qs the levels, ql and qh their low and high bits. Bytes that have two uses there have two names here.
The gguf package ships numbers and sizes, but importing it costs a third of a second, which `quantkit inspect` and
`quantkit --help` would pay for nothing; a test holds the two tables equal. Q2_0 is newer than gguf 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from quantkit.blocks.layout import Layout
from quantkit.errors import QuantkitError
from quantkit.wording import did_you_mean


class GGMLType(IntEnum):
    """A GGML tensor type. The value is its number in a GGUF file.

    `block_size` is the number of weights in a block, `layout` the fields of its bytes.
    """

    block_size: int
    layout: Layout

    def __new__(cls, number: int, block_size: int, layout: Layout) -> GGMLType:  # noqa: D102
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.layout = layout
        return member

    F32 = 0, 1, Layout(value=4)
    F16 = 1, 1, Layout(value=2)
    Q4_0 = 2, 32, Layout(d=2, qs=16)
    Q4_1 = 3, 32, Layout(d=2, m=2, qs=16)
    Q5_0 = 6, 32, Layout(d=2, qh=4, qs=16)
    Q5_1 = 7, 32, Layout(d=2, m=2, qh=4, qs=16)
    Q8_0 = 8, 32, Layout(d=2, qs=32)
    Q8_1 = 9, 32, Layout(d=2, s=2, qs=32)
    Q2_K = 10, 256, Layout(scales=16, qs=64, d=2, dmin=2)
    Q3_K = 11, 256, Layout(hmask=32, qs=64, scales=12, d=2)
    Q4_K = 12, 256, Layout(d=2, dmin=2, scales=12, qs=128)
    Q5_K = 13, 256, Layout(d=2, dmin=2, scales=12, qh=32, qs=128)
    Q6_K = 14, 256, Layout(ql=128, qh=64, scales=16, d=2)
    Q8_K = 15, 256, Layout(d=4, qs=256, bsums=32)
    IQ2_XXS = 16, 256, Layout(d=2, qs=64)
    IQ2_XS = 17, 256, Layout(d=2, qs=64, scales=8)
    IQ3_XXS = 18, 256, Layout(d=2, qs=64, scales_and_signs=32)
    IQ1_S = 19, 256, Layout(d=2, qs=32, qh=16)
    IQ4_NL = 20, 32, Layout(d=2, qs=16)
    IQ3_S = 21, 256, Layout(d=2, qs=64, qh=8, signs=32, scales=4)
    IQ2_S = 22, 256, Layout(d=2, qs=32, signs=32, qh=8, scales=8)
    IQ4_XS = 23, 256, Layout(d=2, scales_h=2, scales_l=4, qs=128)
    I8 = 24, 1, Layout(value=1)
    I16 = 25, 1, Layout(value=2)
    I32 = 26, 1, Layout(value=4)
    I64 = 27, 1, Layout(value=8)
    F64 = 28, 1, Layout(value=8)
    IQ1_M = 29, 256, Layout(qs=32, qh=16, scales=8)
    BF16 = 30, 1, Layout(value=2)
    TQ1_0 = 34, 256, Layout(qs=48, qh=4, d=2)
    TQ2_0 = 35, 256, Layout(qs=64, d=2)
    MXFP4 = 39, 32, Layout(e=1, qs=16)
    NVFP4 = 40, 64, Layout(d=4, qs=32)
    Q1_0 = 41, 128, Layout(d=2, qs=16)
    Q2_0 = 42, 64, Layout(d=2, qs=16)

    @property
    def type_size(self) -> int:
        """The number of bytes that hold a block."""
        return self.layout.nbytes

    @property
    def is_quantized(self) -> bool:
        """Whether weights share a block, as opposed to plain numbers."""
        return self.block_size > 1

    @property
    def bits_per_weight(self) -> float:
        """Average storage for one weight, in bits, block scales included."""
        return self.type_size * 8 / self.block_size

    @property
    def has_codec(self) -> bool:
        """Whether weights can be encoded in it and decoded from it: not for integers, float64, and ggml's scratch."""
        return self not in _WITHOUT_CODEC

    def row_nbytes(self, n_per_row: int) -> int:
        """Bytes of a row of `n_per_row` weights. Raises QuantkitError when blocks do not divide the row."""
        blocks, rest = divmod(n_per_row, self.block_size)
        if rest:
            raise QuantkitError(
                f"a row of {n_per_row} weights cannot hold {self.name}: its blocks are of {self.block_size}"
            )
        return blocks * self.type_size

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of GGUF shape `shape` (row length first)."""
        rows = 1
        for n in shape[1:]:
            rows *= n
        return rows * self.row_nbytes(shape[0] if shape else 1)

    @classmethod
    def parse(cls, name: str) -> GGMLType:
        """The type called `name`, in any case. Raises QuantkitError that suggests or lists names."""
        try:
            return cls[name.upper()]
        except KeyError:
            hint = did_you_mean(name, cls.__members__) or f"known: {', '.join(cls.__members__)}"
            raise QuantkitError(f"unknown tensor type {name!r}; {hint}") from None


_WITHOUT_CODEC = frozenset(GGMLType[name] for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))
