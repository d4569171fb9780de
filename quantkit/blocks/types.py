"""GGML's tensor types: names, numbers and block layouts, without any arithmetic.

Numbers and sizes are those of `ggml.h` (enum ggml_type) and of `ggml-common.h` (the block structs). The gguf
package ships the same table, but importing it costs a third of a second, which `quantkit inspect` and
`quantkit --help` would pay for nothing; a test holds the two tables equal. Q2_0 is newer than gguf 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from quantkit.errors import QuantkitError
from quantkit.wording import did_you_mean


class GGMLType(IntEnum):
    """A GGML tensor type. The value is its number in a GGUF file.

    `block_size` is the number of weights in a block, `type_size` the number of bytes that hold them.
    """

    block_size: int
    type_size: int

    def __new__(cls, number: int, block_size: int, type_size: int) -> GGMLType:  # noqa: D102
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.type_size = type_size
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18

    @property
    def is_quantized(self) -> bool:
        """Whether weights share a block, as opposed to plain numbers."""
        return self.block_size > 1

    @property
    def bits_per_weight(self) -> float:
        """Average storage for one weight, in bits, block scales included."""
        return self.type_size * 8 / self.block_size

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
