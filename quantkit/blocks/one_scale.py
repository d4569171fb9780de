"""The formats of one or two bits, and of ternary digits, with one float16 scale: Q1_0, Q2_0, TQ1_0, TQ2_0.

Layouts: ggml-common.h. Algorithms: quantize_row_*_ref in ggml-quants.c. None of them uses importance weights.
"""

from __future__ import annotations

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_short, get_word, put_half, put_short
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ONE,
    ZERO,
    Bytes,
    F32x16,
    Floats,
    I32x16,
    absolute,
    bits,
    largest,
    maximum,
    select,
    splat,
    to_float,
)
from quantkit.blocks.tiles import SUPER, block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

Q1, Q2 = GGMLType.Q1_0.layout, GGMLType.Q2_0.layout
TQ1, TQ2 = GGMLType.TQ1_0.layout, GGMLType.TQ2_0.layout
HALF = np.float32(0.5)
BIT_OF_LANE = np.left_shift(1, np.arange(LANES, dtype=np.int32))
PAIR_OF_LANE = np.arange(0, 2 * LANES, 2, dtype=np.int32)
POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


@piece
def largest_magnitude(x: Floats, start: int, n: int) -> np.float32:
    """The largest magnitude among `n` weights at `start`."""
    most = absolute(load(x, start))
    for i in range(LANES, n, LANES):
        most = maximum(absolute(load(x, start + i)), most)
    return largest(most)


@piece
def reciprocal(d: np.float32) -> np.float32:
    """1 / d, and 0 for 0. Infinite for the smallest denormals."""
    return ONE / d if d > ZERO else ZERO


@piece
def digits(values: F32x16, lost: int) -> I32x16:
    """0, 1, 2 for lanes that round (halves away from zero) to -1, 0, 1; `lost` where they are not finite."""
    one, half = splat(1), splat(HALF)
    digit = one + select(values >= half, one, splat(0)) - select(values <= -half, one, splat(0))
    return select(absolute(values) < splat(np.float32(2)), digit, splat(lost))


class Q1_0(Block, type=GGMLType.Q1_0):
    """The signs of 128 weights and their mean magnitude."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q1_0_ref. The magnitudes of sixteen blocks are added up side by side."""
        starts = scratch(np.int64, 1)
        columns = scratch(np.int64, 1)
        xs = scratch(np.float32, 128)
        means = scratch(np.float32, 1)
        n_blocks = x.size // 128
        for first in range(0, n_blocks, LANES):
            used = block_starts(first, n_blocks, 128, n_per_row, starts, columns)
            spread(x, starts, 0, 128, xs)
            total = splat(ZERO)
            for i in range(128):
                total = total + absolute(load(xs, i * LANES))
            store(means, 0, total / splat(np.float32(128)))
            for lane in range(used):
                at = (first + lane) * Q1.nbytes
                put_half(out, at + Q1.d, means[lane])
                for i in range(8):
                    put_short(out, at + Q1.qs + 2 * i, bits(load(x, starts[lane] + i * LANES) >= splat(ZERO)))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q1_0."""
        for block in range(out.size // 128):
            at = block * Q1.nbytes
            d = get_half(data, at + Q1.d)
            for i in range(8):
                positive = (splat(get_short(data, at + Q1.qs + 2 * i)) & load(BIT_OF_LANE, 0)) != splat(0)
                store(out, block * 128 + i * LANES, select(positive, splat(d), splat(-d)))


class Q2_0(Block, type=GGMLType.Q2_0):
    """-1, 0, 1 (or 2, which no encoder writes) times the largest of 64 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q2_0_ref."""
        levels = scratch(np.uint8, 4)
        for block in range(x.size // 64):
            at, start = block * Q2.nbytes, block * 64
            d = largest_magnitude(x, start, 64)
            inverse = splat(reciprocal(d))
            put_half(out, at + Q2.d, d)
            for i in range(0, 64, LANES):
                store(levels, i, digits(load(x, start + i) * inverse, 0))
            for i in range(16):
                low, high = levels[4 * i] | (levels[4 * i + 1] << 2), levels[4 * i + 2] | (levels[4 * i + 3] << 2)
                out[at + Q2.qs + i] = np.uint8(low | (high << 4))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q2_0."""
        for block in range(out.size // 64):
            at = block * Q2.nbytes
            d = get_half(data, at + Q2.d)
            for i in range(0, 64, LANES):
                level = (splat(get_word(data, at + Q2.qs + i // 4)) >> load(PAIR_OF_LANE, 0)) & splat(3)
                store(out, block * 64 + i, to_float(level - splat(1)) * splat(d))


@piece
def put_trits(x: Floats, start: int, stride: int, n: int, inverse: F32x16, out: Bytes, at: int) -> None:
    """Sixteen bytes of five base-3 digits each, of which the first `n` are weights `stride` apart.

    A byte is the five-digit fraction scaled to 256 and rounded up, so that a multiplication brings each digit out.
    """
    number = splat(0)
    for j in range(5):
        number = number * splat(3)
        if j < n:
            number = number + digits(load(x, start + j * stride) * inverse, 1)
    # (256 * number + 242) // 243, by a multiplication that is exact for numbers this small
    rest = ((number * splat(13) + splat(242)) * splat(17261)) >> splat(22)
    store(out, at, number + rest)


@piece
def get_trits(data: Bytes, at: int, stride: int, d: np.float32, out: Floats, to: int) -> None:
    """The weights of `stride` bytes, a multiple of LANES: first all first digits, then all second ones."""
    for j in range(5):
        for i in range(0, stride, LANES):
            fraction = (load(data, at + i) * splat(POWERS_OF_3[j])) & splat(0xFF)
            digit = (fraction * splat(3)) >> splat(8)
            store(out, to + j * stride + i, to_float(digit - splat(1)) * splat(d))


class TQ1_0(Block, type=GGMLType.TQ1_0):
    """Ternary digits, five to a byte, times the largest of 256 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_tq1_0_ref."""
        tail = scratch(np.float32, 4)
        for j in range(4):
            store(tail, j * LANES, splat(ZERO))
        last = scratch(np.uint8, 1)
        for block in range(x.size // SUPER):
            at, start = block * TQ1.nbytes, block * SUPER
            d = largest_magnitude(x, start, SUPER)
            inverse = splat(reciprocal(d))
            put_half(out, at + TQ1.d, d)
            put_trits(x, start, 32, 5, inverse, out, at + TQ1.qs)
            put_trits(x, start + 16, 32, 5, inverse, out, at + TQ1.qs + 16)
            put_trits(x, start + 160, 16, 5, inverse, out, at + TQ1.qs + 32)
            for j in range(4):  # the last 16 weights fill four bytes: four of the sixteen lanes
                for i in range(4):
                    tail[j * LANES + i] = x[start + 240 + j * 4 + i]
            put_trits(tail, 0, LANES, 4, inverse, last, 0)
            for i in range(4):
                out[at + TQ1.qh + i] = last[i]

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_tq1_0."""
        for block in range(out.size // SUPER):
            at, to = block * TQ1.nbytes, block * SUPER
            d = get_half(data, at + TQ1.d)
            get_trits(data, at + TQ1.qs, 32, d, out, to)
            get_trits(data, at + TQ1.qs + 32, 16, d, out, to + 160)
            for i in range(16):
                fraction = np.int32((data[at + TQ1.qh + i % 4] * POWERS_OF_3[i // 4]) & 0xFF)
                out[to + 240 + i] = np.float32(((fraction * 3) >> 8) - 1) * d


class TQ2_0(Block, type=GGMLType.TQ2_0):
    """Ternary digits, four to a byte, times the largest of 256 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_tq2_0_ref."""
        for block in range(x.size // SUPER):
            at, start = block * TQ2.nbytes, block * SUPER
            d = largest_magnitude(x, start, SUPER)
            inverse = splat(reciprocal(d))
            put_half(out, at + TQ2.d, d)
            for half in range(2):
                for i in range(0, 32, LANES):
                    byte = splat(0)
                    for j in range(4):
                        digit = digits(load(x, start + half * 128 + j * 32 + i) * inverse, 1)
                        byte = byte | (digit << splat(2 * j))
                    store(out, at + TQ2.qs + half * 32 + i, byte)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_tq2_0."""
        for block in range(out.size // SUPER):
            d = get_half(data, block * TQ2.nbytes + TQ2.d)
            for half in range(2):
                at, to = block * TQ2.nbytes + TQ2.qs + half * 32, block * SUPER + half * 128
                for j in range(4):
                    for i in range(0, 32, LANES):
                        digit = (load(data, at + i) >> splat(2 * j)) & splat(3)
                        store(out, to + j * 32 + i, to_float(digit - splat(1)) * splat(d))
