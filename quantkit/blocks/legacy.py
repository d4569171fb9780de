"""The formats of 32 weights with one scale each: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Layouts: ggml-common.h. Algorithms: quantize_row_*_ref in ggml-quants.c. Without importance weights nothing depends on
the order of operations between the weights of a block, so it is two lane vectors: no transposition. With importance
weights (quantize_row_*_impl) scales are searched for, one block in each lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_word, put_half, put_word
from quantkit.blocks.lane_memory import load, numbers, scratch, store
from quantkit.blocks.lanes import (
    ALL,
    LANES,
    ONE,
    ZERO,
    Bytes,
    F32x16,
    Floats,
    I32x16,
    Longs,
    absolute,
    bits,
    first_lane,
    lane_numbers,
    largest,
    maximum,
    minimum,
    round_half_away,
    select,
    smallest,
    splat,
    to_float,
    to_int,
)
from quantkit.blocks.layout import Layout
from quantkit.blocks.searches import (
    Affine,
    AffineTrials,
    affine_search,
    clamped_ints,
    reciprocals,
    signed_search,
    weigh,
)
from quantkit.blocks.tiles import block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.fixed import Fixed
from quantkit.compile.kernel import kernel, piece

QK = 32
Q4_0_BYTES, Q4_1_BYTES = GGMLType.Q4_0.layout, GGMLType.Q4_1.layout
Q5_0_BYTES, Q5_1_BYTES = GGMLType.Q5_0.layout, GGMLType.Q5_1.layout
Q8_0_BYTES = GGMLType.Q8_0.layout
# Where it has them, each of the first four begins with d and m, and qh comes right before qs.
D, M, QH_BEFORE_QS = Q4_1_BYTES.d, Q4_1_BYTES.m, Q5_0_BYTES.qs - Q5_0_BYTES.qh


@dataclass(frozen=True)
class LegacyFormat(Fixed):
    """A format of 4 or 5 bits: levels low..high, which with a minimum begin at 0."""

    layout: Layout
    low: int
    high: int
    search: Any  # piece(xs, ws, ls, format): scale and minimum with importance weights
    limit: int = 0  # what levels without importance weights are clamped to, where there is a minimum

    @property
    def five(self) -> bool:
        """Whether the levels have a fifth bit."""
        return self.high - self.low == 31

    @property
    def affine(self) -> bool:
        """Whether there is a minimum."""
        return self.low == 0

    @property
    def trials(self) -> AffineTrials:
        """What the search with importance weights tries, where there is a minimum."""
        return AffineTrials(self.high, np.float32(-0.9), np.float32(0.05), 37)


@piece
def search_affine(xs: Floats, ws: Floats, ls: Floats, fmt: LegacyFormat) -> Affine:
    """Scale and minimum."""
    return affine_search(xs, ws, ls, QK, fmt.trials)


@piece
def search_signed(xs: Floats, ws: Floats, ls: Floats, fmt: LegacyFormat) -> Affine:
    """Scale alone."""
    found = signed_search(xs, ws, QK, -fmt.low)
    return Affine(found.scale, splat(ZERO), found.inverse, splat(ZERO))


Q4_0_FORMAT = LegacyFormat(Q4_0_BYTES, -8, 7, search_signed)
Q4_1_FORMAT = LegacyFormat(Q4_1_BYTES, 0, 15, search_affine, limit=15)
Q5_0_FORMAT = LegacyFormat(Q5_0_BYTES, -16, 15, search_signed)
Q5_1_FORMAT = LegacyFormat(Q5_1_BYTES, 0, 31, search_affine, limit=255)


@piece
def first_match(x: Floats, at: int, low: F32x16, high: F32x16, key: np.float32) -> np.float32:
    """The first of 32 weights at `at` whose entry in the two halves of keys equals `key`."""
    match = bits(low == splat(key)) | (bits(high == splat(key)) << np.uint32(LANES))
    return x[at + first_lane(np.uint32(match))]


@piece
def extreme(x: Floats, at: int) -> np.float32:
    """The weight of largest magnitude among 32, the first of equals, and 0 for 0."""
    low, high = absolute(load(x, at)), absolute(load(x, at + LANES))
    amax = largest(maximum(low, high))
    return first_match(x, at, low, high, amax) if amax > ZERO else ZERO


@piece
def span(x: Floats, at: int) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of 32 weights; zero in either of its forms."""
    low, high = load(x, at), load(x, at + LANES)
    return smallest(minimum(low, high)), largest(maximum(low, high))


@piece
def settle_zeros(x: Floats, first: int, count: int, least: Floats, most: Floats) -> None:
    """Zero has two forms: of a block's zeros, the reference keeps the first that it meets."""
    zero = splat(ZERO)
    if bits((load(least, 0) == zero) | (load(most, 0) == zero)) != 0:
        for k in range(count):
            at = (first + k) * QK
            low, high = load(x, at), load(x, at + LANES)
            if least[k] == ZERO:
                least[k] = first_match(x, at, low, high, ZERO)
            if most[k] == ZERO:
                most[k] = first_match(x, at, low, high, ZERO)


@piece
def inverses(d: F32x16, out: Floats) -> bool:
    """Store 1/d of sixteen blocks, 0 for 0, and say whether all of d and 1/d are finite."""
    limit = splat(np.float32(np.inf))
    inverse = reciprocals(d)
    store(out, 0, inverse)
    return bits((absolute(d) < limit) & (absolute(inverse) < limit)) == ALL


@piece
def to_levels(values: F32x16, limit: int, tame: bool) -> I32x16:
    """C's `MIN(limit, (int8_t) value)` as x86-64 compiles it: cut to 32 bits (0 where it does not fit), then to 8.

    `tame` values are known to fit 8 bits.
    """
    if tame:
        whole = to_int(values)
    else:
        fits = absolute(values) < splat(np.float32(2147483648.0))
        whole = (to_int(select(fits, values, splat(ZERO))) << splat(24)) >> splat(24)
    return minimum(splat(limit), whole)


@piece
def put_levels(out: Bytes, at: int, low: I32x16, high: I32x16, five: bool) -> None:
    """The nibbles qs at `at`, the first half of the block in the low ones; before them, with `five`, the fifth bits."""
    if five:
        sixteen = splat(16)
        word = bits((low & sixteen) == sixteen) | (bits((high & sixteen) == sixteen) << np.uint32(LANES))
        put_word(out, at - QH_BEFORE_QS, word)
    store(out, at, (low & splat(15)) | (high << splat(4)))


@piece
def symmetric_levels(
    x: Floats, out: Bytes, first: int, count: int, inverse: Floats, fmt: LegacyFormat, tame: bool
) -> None:
    """Levels of `count` blocks, counted from 0 and rounded by cutting."""
    top, middle = fmt.high - fmt.low, splat(np.float32(0.5 - fmt.low))
    for k in range(count):
        start, scale = (first + k) * QK, splat(inverse[k])
        low = to_levels(load(x, start) * scale + middle, top, tame)
        high = to_levels(load(x, start + LANES) * scale + middle, top, tame)
        put_levels(out, (first + k) * fmt.layout.nbytes + fmt.layout.qs, low, high, fmt.five)


@piece
def encode_symmetric(x: Floats, out: Bytes, fmt: LegacyFormat) -> None:
    """Q4_0 and Q5_0, sixteen blocks at a time so that their divisions overlap."""
    found, inverse = scratch(np.float32, 1), scratch(np.float32, 1)
    store(found, 0, splat(ZERO))
    n_blocks = x.size // QK
    for first in range(0, n_blocks, LANES):
        count = minimum(LANES, n_blocks - first)
        for k in range(count):
            found[k] = extreme(x, (first + k) * QK)
        d = load(found, 0) / splat(np.float32(fmt.low))
        tame = inverses(d, inverse)
        for k in range(count):
            put_half(out, (first + k) * fmt.layout.nbytes + D, found[k] / np.float32(fmt.low))
        if tame:
            symmetric_levels(x, out, first, count, inverse, fmt, True)
        else:
            symmetric_levels(x, out, first, count, inverse, fmt, False)


@piece
def affine_levels(
    x: Floats, out: Bytes, first: int, count: int, least: Floats, inverse: Floats, fmt: LegacyFormat, tame: bool
) -> None:
    """Levels of `count` blocks, clamped as the reference does it."""
    rounding = splat(np.float32(0.5))
    for k in range(count):
        start, scale, m = (first + k) * QK, splat(inverse[k]), splat(least[k])
        low = to_levels((load(x, start) - m) * scale + rounding, fmt.limit, tame)
        high = to_levels((load(x, start + LANES) - m) * scale + rounding, fmt.limit, tame)
        put_levels(out, (first + k) * fmt.layout.nbytes + fmt.layout.qs, low, high, fmt.five)


@piece
def encode_affine(x: Floats, out: Bytes, fmt: LegacyFormat) -> None:
    """Q4_1 and Q5_1, sixteen blocks at a time so that their divisions overlap."""
    least, most, inverse = scratch(np.float32, 1), scratch(np.float32, 1), scratch(np.float32, 1)
    store(least, 0, splat(ZERO))
    store(most, 0, splat(ZERO))
    n_blocks = x.size // QK
    for first in range(0, n_blocks, LANES):
        count = minimum(LANES, n_blocks - first)
        for k in range(count):
            least[k], most[k] = span(x, (first + k) * QK)
        settle_zeros(x, first, count, least, most)
        d = (load(most, 0) - load(least, 0)) / splat(np.float32(fmt.high))
        tame = inverses(d, inverse)
        store(most, 0, d)
        for k in range(count):
            at = (first + k) * fmt.layout.nbytes
            put_half(out, at + D, most[k])
            put_half(out, at + M, least[k])
        if tame:
            affine_levels(x, out, first, count, least, inverse, fmt, True)
        else:
            affine_levels(x, out, first, count, least, inverse, fmt, False)


@piece
def row_mean_squares(
    x: Floats, first: int, n_rows: int, n_per_row: int, starts: Longs, columns: Longs, xs: Floats
) -> F32x16:
    """The mean squares of sixteen rows from `first` on, each added up in order. The rest is scratch."""
    block_starts(first, n_rows, n_per_row, n_per_row, starts, columns)
    total = splat(ZERO)
    for at in range(0, n_per_row, QK):
        spread(x, starts, at, QK, xs)
        for i in range(QK):
            v = load(xs, i * LANES)
            total = total + v * v
    return total / splat(np.float32(n_per_row))


@piece
def encode_weighted(x: Floats, out: Bytes, n_per_row: int, weights: Floats, fmt: LegacyFormat) -> None:
    """All four with importance weights, sixteen blocks at a time."""
    low, high, layout = fmt.low, fmt.high, fmt.layout
    starts, columns = scratch(np.int64, 1), scratch(np.int64, 1)
    xs, ws, ls = scratch(np.float32, QK), scratch(np.float32, QK), scratch(np.float32, QK)
    squares, sigma = scratch(np.float32, 1), scratch(np.float32, 1)
    scales, lows = scratch(np.float32, 1), scratch(np.float32, 1)
    inverse, base = scratch(np.float32, 1), scratch(np.float32, 1)
    n_rows, blocks_per_row = x.size // n_per_row, n_per_row // QK
    for first in range(0, n_rows * blocks_per_row, LANES):
        row = first // blocks_per_row
        if first % (blocks_per_row * LANES) == 0:
            store(squares, 0, row_mean_squares(x, row, n_rows, n_per_row, starts, columns, xs))
        count = block_starts(first, n_rows * blocks_per_row, QK, n_per_row, starts, columns)
        spread(x, starts, 0, QK, xs)
        spread(weights, columns, 0, QK, ws)
        for k in range(LANES):
            sigma[k] = squares[starts[k] // n_per_row % LANES]
        weigh(xs, ws, QK, load(sigma, 0))
        best = fmt.search(xs, ws, ls, fmt)
        store(scales, 0, best.scale)
        store(lows, 0, best.low)
        store(inverse, 0, best.inverse)
        store(base, 0, best.base)
        for k in range(count):
            at, start = (first + k) * layout.nbytes, (first + k) * QK
            scale, zero = splat(inverse[k]), splat(base[k])
            put_half(out, at + D, scales[k])
            if fmt.affine:
                put_half(out, at + M, lows[k])
            offset = splat(-low if inverse[k] != ZERO else 0)  # an all but empty block has levels of 0
            first_half = clamped_ints(scale * (load(x, start) - zero), low, high) + offset
            second_half = clamped_ints(scale * (load(x, start + LANES) - zero), low, high) + offset
            put_levels(out, at + layout.qs, first_half, second_half, fmt.five)


@piece
def decode_levels(data: Bytes, out: Floats, fmt: LegacyFormat) -> None:
    """Decode all four."""
    layout = fmt.layout
    middle = splat(-fmt.low)
    for block in range(out.size // QK):
        at, to = block * layout.nbytes, block * QK
        nibbles = load(data, at + layout.qs)
        low, high = nibbles & splat(15), nibbles >> splat(4)
        if fmt.five:
            tops = splat(get_word(data, at + layout.qs - QH_BEFORE_QS)) >> lane_numbers()
            low = low | ((tops & splat(1)) << splat(4))
            high = high | ((tops >> splat(12)) & splat(16))
        d = splat(get_half(data, at + D))
        first, second = to_float(low - middle) * d, to_float(high - middle) * d
        if fmt.affine:
            m = splat(get_half(data, at + M))
            first, second = first + m, second + m
        store(out, to, first)
        store(out, to + LANES, second)


class Q4_0(Block, type=GGMLType.Q4_0):
    """4 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q4_0_ref and quantize_row_q4_0_impl."""
        if weights is None:
            encode_symmetric(x, out, Q4_0_FORMAT)
        else:
            encode_weighted(x, out, n_per_row, weights, Q4_0_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q4_0."""
        decode_levels(data, out, Q4_0_FORMAT)


class Q4_1(Block, type=GGMLType.Q4_1):
    """4 bits, a float16 scale and a float16 minimum."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q4_1_ref and quantize_row_q4_1_impl."""
        if weights is None:
            encode_affine(x, out, Q4_1_FORMAT)
        else:
            encode_weighted(x, out, n_per_row, weights, Q4_1_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q4_1."""
        decode_levels(data, out, Q4_1_FORMAT)


class Q5_0(Block, type=GGMLType.Q5_0):
    """5 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q5_0_ref and quantize_row_q5_0_impl."""
        if weights is None:
            encode_symmetric(x, out, Q5_0_FORMAT)
        else:
            encode_weighted(x, out, n_per_row, weights, Q5_0_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q5_0."""
        decode_levels(data, out, Q5_0_FORMAT)


class Q5_1(Block, type=GGMLType.Q5_1):
    """5 bits, a float16 scale and a float16 minimum."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q5_1_ref (which does not clamp) and quantize_row_q5_1_impl."""
        if weights is None:
            encode_affine(x, out, Q5_1_FORMAT)
        else:
            encode_weighted(x, out, n_per_row, weights, Q5_1_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q5_1."""
        decode_levels(data, out, Q5_1_FORMAT)


class Q8_0(Block, type=GGMLType.Q8_0):
    """8 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q8_0_ref."""
        for block in range(x.size // QK):
            at, start = block * Q8_0_BYTES.nbytes, block * QK
            low, high = load(x, start), load(x, start + LANES)
            d = largest(maximum(absolute(low), absolute(high))) / np.float32(127)
            inverse = splat(ONE / d if d != ZERO else ZERO)
            put_half(out, at + Q8_0_BYTES.d, d)
            store(out, at + Q8_0_BYTES.qs, to_levels(round_half_away(low * inverse), 127, False))
            store(out, at + Q8_0_BYTES.qs + LANES, to_levels(round_half_away(high * inverse), 127, False))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q8_0."""
        levels = numbers(data, np.int8)
        for block in range(out.size // QK):
            at, to = block * Q8_0_BYTES.nbytes, block * QK
            d = splat(get_half(data, at + Q8_0_BYTES.d))
            for i in range(0, QK, LANES):
                store(out, to + i, to_float(load(levels, at + Q8_0_BYTES.qs + i)) * d)
