"""The formats without blocks: F32, F16, BF16. And the test that weights are finite."""

from __future__ import annotations

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.lane_memory import load, numbers, store
from quantkit.blocks.lanes import (
    LANES,
    Bytes,
    Floats,
    absolute,
    as_float_bits,
    as_int_bits,
    bits,
    bits_float,
    float_bits,
    from_halves,
    half_bits,
    half_value,
    halves,
    largest,
    maximum,
    splat,
)
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel


@kernel
def first_nonfinite(x: Floats) -> int:
    """The index of the first NaN or infinity in float32 `x`, -1 if there is none."""
    exponent = 0x7F800000
    for start in range(0, x.size - LANES + 1, LANES):
        if bits((as_int_bits(load(x, start)) & splat(exponent)) == splat(exponent)) != 0:
            for i in range(start, start + LANES):
                if float_bits(x[i]) & exponent == exponent:
                    return i
    for i in range(x.size - x.size % LANES, x.size):
        if float_bits(x[i]) & exponent == exponent:
            return i
    return -1


@kernel
def largest_magnitude(x: Floats) -> np.float32:
    """The largest magnitude in float32 `x`, 0 if it is empty."""
    most = splat(np.float32(0))
    for start in range(0, x.size - LANES + 1, LANES):
        most = maximum(absolute(load(x, start)), most)
    result = largest(most)
    for i in range(x.size - x.size % LANES, x.size):
        result = max(result, abs(x[i]))
    return result


class F32(Block, type=GGMLType.F32):
    """32-bit floats, copied."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block."""
        to = numbers(out, np.float32)
        for i in range(x.size):
            to[i] = x[i]

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block."""
        source = numbers(data, np.float32)
        for i in range(out.size):
            out[i] = source[i]


class F16(Block, type=GGMLType.F16):
    """16-bit IEEE floats, rounded half to even."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after ggml_fp32_to_fp16_row."""
        to = numbers(out, np.uint16)
        for i in range(0, x.size - LANES + 1, LANES):
            store(to, i, halves(load(x, i)))
        for i in range(x.size - x.size % LANES, x.size):
            to[i] = half_bits(x[i])

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after ggml_fp16_to_fp32_row."""
        source = numbers(data, np.uint16)
        for i in range(0, out.size - LANES + 1, LANES):
            store(out, i, from_halves(load(source, i)))
        for i in range(out.size - out.size % LANES, out.size):
            out[i] = half_value(source[i])


class BF16(Block, type=GGMLType.BF16):
    """The upper half of a 32-bit float, rounded half to even; NaNs are made quiet."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after ggml_compute_fp32_to_bf16."""
        to = numbers(out, np.uint16)
        for i in range(x.size):
            word = np.int64(float_bits(x[i])) & 0xFFFFFFFF
            if word & 0x7FFFFFFF > 0x7F800000:
                to[i] = np.uint16((word >> 16) | 64)
            else:
                to[i] = np.uint16((word + 0x7FFF + ((word >> 16) & 1)) >> 16)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after ggml_bf16_to_fp32_row."""
        source = numbers(data, np.uint16)
        for i in range(0, out.size - LANES + 1, LANES):
            store(out, i, as_float_bits(load(source, i) << splat(16)))
        for i in range(out.size - out.size % LANES, out.size):
            out[i] = bits_float(np.int32(np.uint32(source[i]) << np.uint32(16)))
