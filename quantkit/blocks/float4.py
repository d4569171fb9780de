"""The formats of 4-bit floats (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives): MXFP4, NVFP4.

Layouts: ggml-common.h. Algorithms: quantize_row_mxfp4_ref and quantize_row_nvfp4_ref in ggml-quants.c. As there, the
values are doubled to make them integers, and scales halved.
"""

from __future__ import annotations

import gguf
import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_values
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ZERO,
    Bytes,
    F32x16,
    Floats,
    I32x16,
    absolute,
    bits_float,
    float_bits,
    largest,
    maximum,
    minimum,
    select,
    splat,
)
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

MX, NV = GGMLType.MXFP4.layout, GGMLType.NVFP4.layout
VALUES = np.array(gguf.quants.MXFP4.kvalues, np.float32)
# Half way between neighbours the smaller magnitude is taken.
BORDERS = (VALUES[1:8] + VALUES[:7]) / np.float32(2)


@piece
def indices(x: F32x16, scale: np.float32) -> I32x16:
    """The index of the value that is nearest to x when multiplied by `scale`, both within float32's exact range."""
    size, index = absolute(x), splat(0)
    for i in range(7):
        index = index + select(size > splat(BORDERS[i] * scale), splat(1), splat(0))
    return index + select((x < splat(ZERO)) & (index > splat(0)), splat(8), splat(0))


@piece
def slow_index(x: np.float32, scale: np.float32) -> int:
    """The same for any x and scale, with the reference's rounding errors: the first of the smallest distances."""
    best, least = 0, abs(VALUES[0] * scale - x)
    for i in range(1, 16):
        distance = abs(VALUES[i] * scale - x)
        if distance < least:
            best, least = i, distance
    return best


@piece
def put_levels(x: Floats, start: int, scale: np.float32, amax: np.float32, levels: Bytes, to: int) -> None:
    """The indices of sixteen weights, whose block has the largest magnitude `amax`."""
    # Beyond these limits the reference's distances overflow or are rounded.
    if scale > ZERO and amax < minimum(np.float32(65536) * scale, np.float32(2.0**126)):
        store(levels, to, indices(load(x, start), scale))
    else:
        for i in range(LANES):
            levels[to + i] = slow_index(x[start + i], scale)


@piece
def floor_log2(x: np.float32) -> int:
    """The whole part of `log2f(x)` for x > 0, which is that of the next power of two when x lies just below it."""
    shift = 0
    if x < np.float32(2.0**-126):
        x, shift = x * np.float32(2.0**24), 24
    bits = float_bits(x)
    exponent = np.int64(bits >> 23) - 127 - shift
    short = (1 << 24) - ((1 << 23) | (np.int64(bits) & 0x7FFFFF))  # x = (1 - short * 2**-24) * 2**(exponent + 1)
    if short < 128:
        above = np.float64(exponent + 1)
        if np.float32(above - np.float64(short) * (2.0**-24 / 0.6931471805599453)) == np.float32(above):
            exponent += 1
    return exponent


@piece
def half_power(code: int) -> np.float32:
    """Half of the power of two that the E8M0 `code` stands for: 2**(code - 128)."""
    return bits_float(np.int32(0x00200000 << code if code < 2 else (code - 1) << 23))


class MXFP4(Block, type=GGMLType.MXFP4):
    """4-bit floats with a power of two for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_mxfp4_ref."""
        levels = scratch(np.uint8, 2)
        for block in range(x.size // 32):
            at, start = block * MX.nbytes, block * 32
            amax = largest(maximum(absolute(load(x, start)), absolute(load(x, start + LANES))))
            # The smallest weights wrap around to the largest powers, and so become 0.
            code = (floor_log2(amax) - 2 + 127) & 0xFF if amax > ZERO else 0
            d = half_power(code)
            out[at + MX.e] = np.uint8(code)
            put_levels(x, start, d, amax, levels, 0)
            put_levels(x, start + LANES, d, amax, levels, LANES)
            store(out, at + MX.qs, load(levels, 0) | (load(levels, LANES) << splat(4)))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_mxfp4."""
        for block in range(out.size // 32):
            at = block * MX.nbytes
            get_values(data, at + MX.qs, 16, VALUES, half_power(np.int32(data[at + MX.e])), out, block * 32)


@piece
def to_ue4m3(x: np.float32) -> int:
    """A number, not negative, as an unsigned float of 4 exponent and 3 mantissa bits, as ggml_fp32_to_ue4m3 rounds."""
    if not x > ZERO:
        return 0
    bits = np.int64(float_bits(minimum(np.float32(448), x)))
    exponent = (bits >> 23) - 120
    if exponent <= 0:
        return minimum(7, np.int64(x * np.float32(512) + np.float32(0.5)))
    # Rounded up, a mantissa may carry into the exponent. What rounds to 256 or more is taken for the largest, 448.
    code = (exponent << 3) + ((bits >> 20) & 7) + ((bits >> 19) & 1)
    return code if code < 0x78 else 0x7E


@piece
def half_ue4m3(code: int) -> np.float32:
    """Half of the number that `code` stands for; its sign bit is ignored, and NaN (0x7F) is 0."""
    if code == 0 or code == 0x7F:
        return ZERO
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 0:
        return np.float32(mantissa) * np.float32(2.0**-10)
    return bits_float(np.int32(((exponent + 119) << 23) | (mantissa << 20)))


class NVFP4(Block, type=GGMLType.NVFP4):
    """4-bit floats with an 8-bit float for every 16 weights; four such sub-blocks make a block."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_nvfp4_ref."""
        levels = scratch(np.uint8, 1)
        for block in range(x.size // 64):
            for j in range(4):
                start, at = block * 64 + j * LANES, block * NV.nbytes
                amax = largest(absolute(load(x, start)))
                code = to_ue4m3(amax / np.float32(6))
                d = half_ue4m3(code)
                out[at + NV.d + j] = np.uint8(code)
                put_levels(x, start, d, amax, levels, 0)
                for i in range(8):
                    out[at + NV.qs + j * 8 + i] = levels[i] | (levels[8 + i] << np.uint8(4))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_nvfp4."""
        for block in range(out.size // 64):
            at = block * NV.nbytes
            for j in range(4):
                d = half_ue4m3(np.int32(data[at + NV.d + j]))
                get_values(data, at + NV.qs + j * 8, 8, VALUES, d, out, block * 64 + j * 16)
