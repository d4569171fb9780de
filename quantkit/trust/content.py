"""Whether the bytes of a tensor can be what an encoder wrote: finite scales and weights, and codes that exist.

llama.cpp's check of tensors (`ggml_validate_row_data`) asks for finite scales; the ternary types' codes come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.trust import content_kernels as kernels

# Finds the first block that is wrong in contiguous uint8 data of whole blocks; -1 when there is none.
Search = Callable[[np.ndarray], int]

# The exponent's bits of a float, all set in NaN and infinity, in the word that holds them: its width and its number.
_FLOATS: dict[GGMLType, tuple[type[np.unsignedinteger[Any]], int]] = {
    GGMLType.F16: (np.uint16, 0x7C00),
    GGMLType.BF16: (np.uint16, 0x7F80),
    GGMLType.F32: (np.uint32, 0x7F800000),
}
# Fields that hold a float16.
_HALVES = ("d", "dmin", "m", "s")
_HALF = np.uint16(0x7C00)
_INTEGERS = (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64)


@cache
def searches(kind: GGMLType) -> dict[str, Search]:
    """What is looked for in the blocks of `kind`, and how: empty where every byte is as good as another."""
    if kind in _FLOATS:
        dtype, exponent = _FLOATS[kind]
        return {"a weight that is NaN or infinite": _dense(dtype, exponent)}
    if kind == GGMLType.F64:
        return {"a weight that no float32 can hold": _beyond_float32}
    if kind in _INTEGERS or kind == GGMLType.NVFP4:
        return {}
    size, layout = kind.type_size, kind.layout
    if kind == GGMLType.MXFP4:
        return {"a scale that is NaN": lambda data: int(kernels.byte_is(data, size, 0xFF))}
    scale = "a scale that is NaN or infinite"
    if kind == GGMLType.Q8_K:
        return {scale: _words(size, layout.d + 2, np.uint16(0x7F80))}
    if kind == GGMLType.IQ1_M:
        return {scale: lambda data: int(kernels.iq1_m_scale(data.view("<u2"), size // 2, layout.scales // 2, _HALF))}
    found: dict[str, Search] = {
        scale if name == "d" else f"{scale} ({name})": _words(size, layout.offsets[name], _HALF)
        for name in _HALVES
        if name in layout.offsets
    }
    if kind == GGMLType.TQ1_0:
        found["a byte that no ternary digits make"] = _legal(size, layout.qs, layout.qh, kernels.trits(5))
        found["a byte that no four ternary digits make"] = _legal(size, layout.qh, layout.d, kernels.trits(4))
    if kind == GGMLType.TQ2_0:
        found["a code that is no ternary digit"] = _legal(size, layout.qs, layout.d, kernels.pairs_below_3())
    return found


def _dense(dtype: type[np.unsignedinteger[Any]], exponent: int) -> Search:
    bits = 8 * np.dtype(dtype).itemsize
    repeated = sum(1 << at for at in range(0, 64, bits))
    mask, one = np.uint64(repeated * exponent), np.uint64(repeated * (exponent & -exponent))

    def search(data: np.ndarray) -> int:
        whole = data.size // 8 * 8
        start = int(kernels.all_ones_dense(data[:whole].view(np.uint64), mask, one))
        if start < 0 and whole == data.size:
            return -1
        # Where it is to be named, only the chunk, or the bytes that fill no word, are looked through again.
        first = whole if start < 0 else 8 * start
        words = data[first : first + 8 * kernels.CHUNK].view(dtype)
        wrong = words & dtype(exponent) == exponent
        return first // np.dtype(dtype).itemsize + int(np.argmax(wrong)) if wrong.any() else -1

    return search


def _beyond_float32(data: np.ndarray) -> int:
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = ~np.isfinite(data.view("<f8").astype(np.float32))
    return int(np.argmax(wrong)) if wrong.any() else -1


def _words(size: int, offset: int, mask: np.uint16) -> Search:
    return lambda data: int(kernels.all_ones(data.view("<u2"), size // 2, offset // 2, mask))


def _legal(size: int, start: int, stop: int, legal: np.ndarray) -> Search:
    return lambda data: int(kernels.not_in(data, size, start, stop, legal))
