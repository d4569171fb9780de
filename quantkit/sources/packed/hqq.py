"""Matrices of HQQ (half-quadratic quantization), as transformers stores them: 1, 2, 3, 4 or 8 bits.

Source of the layout: HQQ's `BitPack` and `Quantizer.dequantize`. A matrix is reshaped so that its rows, or its columns,
are groups. Then its rows are cut into as many parts as numbers fit a word, and numbers at the same place of all parts
share a word, those of the first part its highest bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import PackedMatrix, floats, misshapen, require, wrong

_WORDS = ".W_q"
_AT_ONCE = 1 << 16  # numbers, whose places fit the processor's cache
_PARTS = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}  # by bits, how many numbers a word has: of 32 bits where these are three
# What HQQ stores beside a matrix: of groups, and settings.
_BESIDE = (
    "scale", "zero", "shape", "nbits", "axis", "group_size", "channel_wise", "compute_dtype", "encoded_state_dict",
    "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "stores_quant_config",
    "unpack_view_dtype", "view_as_float",
)  # fmt: skip
_UNSUPPORTED = {
    "quant_zero": "zeros are quantized too",
    "quant_scale": "scales are quantized too",
    "view_as_float": "words are stored as floats",
}


class _Groups(NamedTuple):
    """Scales and zeros, float32 [rows, 1] or [1, columns] of the reshaped matrix."""

    scales: np.ndarray
    zeros: np.ndarray


@dataclass
class HqqMatrix(PackedMatrix):
    """Words [rows of a part, columns] of `bits`-bit numbers, with the scales and zeros of groups."""

    words: str
    scale: str
    zero: str
    bits: int

    def prepare(self) -> _Groups:
        """The scales and zeros, as numbers."""
        return _Groups(floats(self.raw, self.scale), floats(self.raw, self.zero))

    def rows(self, prepared: _Groups, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        width = self.shape[-1]
        values = np.empty((stop - start) * width, np.float32)
        for at in range(0, len(values), _AT_ONCE):
            some = values[at : at + _AT_ONCE]
            some[:] = self._numbers(prepared, start * width + at, len(some))
        return values.reshape(stop - start, width)

    def _numbers(self, prepared: _Groups, first: int, count: int) -> np.ndarray:
        """`count` numbers of the matrix, from its number `first` on."""
        words = self.raw.bits(self.words)
        n_parts, (high, columns) = _PARTS[self.bits], words.shape
        row, column = np.divmod(np.arange(first, first + count), columns)
        part, place = np.divmod(row, high)
        numbers = words[place, column].astype(np.uint32) >> (self.bits * (n_parts - 1 - part)).astype(np.uint32)
        numbers &= np.uint32((1 << self.bits) - 1)
        at = (row, 0) if prepared.scales.shape[1] == 1 else (0, column)
        # HQQ subtracts in the type of its zeros, and multiplies then.
        values = _rounded(numbers.astype(np.float32) - prepared.zeros[at], self.raw.tensors[self.zero].dtype)
        values *= prepared.scales[at]
        return values


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the type `dtype` holds them."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)
        bits &= np.uint32(0xFFFF0000)
    return values


def find_hqq(raw: SafetensorsCheckpoint) -> Iterator[PackedMatrix]:
    """The matrices of a checkpoint that HQQ quantized. Raises QuantkitError where more than weights is quantized."""
    for name, tensor in raw.tensors.items():
        if not name.endswith(_WORDS):
            continue
        base = name.removesuffix(_WORDS)
        for setting, problem in _UNSUPPORTED.items():
            if _number(raw, f"{base}.{setting}", name):
                raise wrong(raw, name, f"not supported: its {problem}")
        bits = _number(raw, f"{base}.nbits", name)
        if bits not in _PARTS:
            raise wrong(raw, f"{base}.nbits", f"{bits}, not one of {', '.join(map(str, _PARTS))}")
        shape = _shape(raw, require(raw, f"{base}.shape", name))
        scale, zero = (require(raw, f"{base}.{part}", name) for part in ("scale", "zero"))
        word = "I32" if bits == 3 else "U8"
        columns = tensor.shape[1] if len(tensor.shape) == 2 else 0
        rows, rest = divmod(math.prod(shape), columns) if columns else (0, 1)
        if tensor.dtype != word or rest or -(-rows // _PARTS[bits]) != tensor.shape[0]:
            raise misshapen(raw, name, f"{word} with the numbers of {list(shape)} in {bits} bits")
        of_scale, of_zero = raw.tensors[scale].shape, raw.tensors[zero].shape
        if of_scale not in ((rows, 1), (1, columns)) or of_zero != of_scale:
            raise misshapen(raw, zero, f"a number for each of {rows} rows or {columns} columns, as its scale is")
        parts = (name, *(f"{base}.{part}" for part in _BESIDE if f"{base}.{part}" in raw.tensors))
        kind = f"HQQ, {bits} bits in groups of {columns if of_scale[1] == 1 else rows}"
        yield HqqMatrix(raw, f"{base}.weight", shape, parts, kind, name, scale, zero, bits)


def _number(raw: SafetensorsCheckpoint, name: str, beside: str) -> int:
    """The whole number that is a tensor."""
    tensor = raw.tensors[require(raw, name, beside)]
    if tensor.dtype not in ("U8", "I8", "I32", "I64", "BOOL") or math.prod(tensor.shape) != 1:
        raise misshapen(raw, name, "a whole number")
    return int(raw.whole(name).reshape(-1)[0])


def _shape(raw: SafetensorsCheckpoint, name: str) -> tuple[int, int]:
    """The shape of a matrix, which is a tensor."""
    tensor = raw.tensors[name]
    if tensor.dtype not in ("I32", "I64") or tensor.shape != (2,):
        raise misshapen(raw, name, "the shape of a matrix")
    n_rows, n_columns = (int(n) for n in raw.whole(name))
    if min(n_rows, n_columns) < 1:
        raise wrong(raw, name, f"{[n_rows, n_columns]}, not the shape of a matrix")
    return n_rows, n_columns
