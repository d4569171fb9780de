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
_AT_ONCE = 1 << 17  # numbers, of which the processor's cache holds what comes between
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
        width, words = self.shape[-1], self.raw.bits(self.words)
        high, columns = words.shape
        values = np.empty((stop - start) * width, np.float32)
        at = 0
        while at < len(values):
            row, column = divmod(start * width + at, columns)
            # Whole rows of one part of the reshaped matrix, or what is wanted of one row.
            most = max(1, _AT_ONCE // columns)
            n = min((len(values) - at) // columns, high - row % high, most) if column == 0 else 0
            last = columns if n else min(columns, column + len(values) - at)
            some = slice(row, row + max(n, 1)), slice(column, last)
            count = max(n, 1) * (last - column)
            values[at : at + count] = self._numbers(prepared, words, *some).reshape(-1)
            at += count
        return values.reshape(stop - start, width)

    def _numbers(self, prepared: _Groups, words: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """The numbers at `rows` and `columns` of the reshaped matrix, where the rows are of one part."""
        part, place = divmod(rows.start, len(words))
        found = words[place : place + rows.stop - rows.start, columns]
        numbers = found >> self.bits * (_PARTS[self.bits] - 1 - part) & (1 << self.bits) - 1
        at = (rows, slice(None)) if prepared.scales.shape[1] == 1 else (slice(None), columns)
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
