"""The formats of 32 weights with one scale each: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Layouts: ggml-common.h. Algorithms: quantize_row_*_ref in ggml-quants.c. Without importance weights nothing depends on
the order of operations between the weights of a block, so it is two lane vectors: no transposition. With importance
weights (quantize_row_*_impl) scales are searched for, one block in each lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_word, put_half, put_word
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    ALL,
    LANES,
    ONE,
    ZERO,
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
from quantkit.blocks.searches import affine_search, clamped_ints, reciprocals, signed_search, weigh
from quantkit.blocks.tiles import block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

QK = 32
Q4_0_BYTES, Q4_1_BYTES = GGMLType.Q4_0.layout, GGMLType.Q4_1.layout
Q5_0_BYTES, Q5_1_BYTES = GGMLType.Q5_0.layout, GGMLType.Q5_1.layout
Q8_0_BYTES = GGMLType.Q8_0.layout
# Where it has them, each of the first four begins with d and m, and qh comes right before qs.
D, M, QH_BEFORE_QS = Q4_1_BYTES.d, Q4_1_BYTES.m, Q5_0_BYTES.qs - Q5_0_BYTES.qh


@piece
def first_match(x: Any, at: Any, low: Any, high: Any, key: Any) -> Any:
    """The first of 32 weights at `at` whose entry in the two halves of keys equals `key`."""
    match = bits(low == splat(key)) | (bits(high == splat(key)) << np.uint32(LANES))
    return x[at + first_lane(np.uint32(match))]


@piece
def extreme(x: Any, at: Any) -> Any:
    """The weight of largest magnitude among 32, the first of equals, and 0 for 0."""
    low, high = absolute(load(x, at)), absolute(load(x, at + LANES))
    amax = largest(maximum(low, high))
    return first_match(x, at, low, high, amax) if amax > ZERO else ZERO


@piece
def span(x: Any, at: Any) -> Any:
    """The smallest and the largest of 32 weights; zero in either of its forms."""
    low, high = load(x, at), load(x, at + LANES)
    return smallest(minimum(low, high)), largest(maximum(low, high))


@piece
def settle_zeros(x: Any, first: Any, count: Any, least: Any, most: Any) -> None:
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
def inverses(d: Any, out: Any) -> Any:
    """Store 1/d of sixteen blocks, 0 for 0, and say whether all of d and 1/d are finite."""
    limit = splat(np.float32(np.inf))
    inverse = reciprocals(d)
    store(out, 0, inverse)
    return bits((absolute(d) < limit) & (absolute(inverse) < limit)) == ALL


@piece
def to_levels(values: Any, limit: Any, tame: Any) -> Any:
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
def put_levels(out: Any, at: Any, low: Any, high: Any, five: Any) -> None:
    """The nibbles qs at `at`, the first half of the block in the low ones; before them, with `five`, the fifth bits."""
    if five:
        sixteen = splat(16)
        word = bits((low & sixteen) == sixteen) | (bits((high & sixteen) == sixteen) << np.uint32(LANES))
        put_word(out, at - QH_BEFORE_QS, word)
    store(out, at, (low & splat(15)) | (high << splat(4)))


@piece
def symmetric_levels(x: Any, out: Any, first: Any, count: Any, inverse: Any, layout: Any, half: Any, tame: Any) -> None:
    """Levels of `count` blocks: 0 to 2 * half - 1, `half` meaning 0, rounded by cutting."""
    middle = splat(np.float32(half + 0.5))
    for k in range(count):
        start, scale = (first + k) * QK, splat(inverse[k])
        low = to_levels(load(x, start) * scale + middle, 2 * half - 1, tame)
        high = to_levels(load(x, start + LANES) * scale + middle, 2 * half - 1, tame)
        put_levels(out, (first + k) * layout.nbytes + layout.qs, low, high, half == 16)


@piece
def encode_symmetric(x: Any, out: Any, layout: Any, half: Any) -> None:
    """Q4_0 and Q5_0, sixteen blocks at a time so that their divisions overlap."""
    found, inverse = scratch(np.float32, 1), scratch(np.float32, 1)
    store(found, 0, splat(ZERO))
    n_blocks = x.size // QK
    for first in range(0, n_blocks, LANES):
        count = minimum(LANES, n_blocks - first)
        for k in range(count):
            found[k] = extreme(x, (first + k) * QK)
        d = load(found, 0) / splat(np.float32(-half))
        tame = inverses(d, inverse)
        for k in range(count):
            put_half(out, (first + k) * layout.nbytes + D, found[k] / np.float32(-half))
        if tame:
            symmetric_levels(x, out, first, count, inverse, layout, half, True)
        else:
            symmetric_levels(x, out, first, count, inverse, layout, half, False)


@piece
def affine_levels(
    x: Any, out: Any, first: Any, count: Any, least: Any, inverse: Any, layout: Any, top: Any, limit: Any, tame: Any
) -> None:
    """Levels of `count` blocks: 0 to `top`; `limit` is what the reference clamps them to."""
    rounding = splat(np.float32(0.5))
    for k in range(count):
        start, scale, m = (first + k) * QK, splat(inverse[k]), splat(least[k])
        low = to_levels((load(x, start) - m) * scale + rounding, limit, tame)
        high = to_levels((load(x, start + LANES) - m) * scale + rounding, limit, tame)
        put_levels(out, (first + k) * layout.nbytes + layout.qs, low, high, top == 31)


@piece
def encode_affine(x: Any, out: Any, layout: Any, top: Any, limit: Any) -> None:
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
        d = (load(most, 0) - load(least, 0)) / splat(np.float32(top))
        tame = inverses(d, inverse)
        store(most, 0, d)
        for k in range(count):
            at = (first + k) * layout.nbytes
            put_half(out, at + D, most[k])
            put_half(out, at + M, least[k])
        if tame:
            affine_levels(x, out, first, count, least, inverse, layout, top, limit, True)
        else:
            affine_levels(x, out, first, count, least, inverse, layout, top, limit, False)


@piece
def row_mean_squares(x: Any, first: Any, n_rows: Any, n_per_row: Any, starts: Any, columns: Any, xs: Any) -> Any:
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
def encode_weighted(
    x: Any, out: Any, n_per_row: Any, weights: Any, layout: Any, low: Any, high: Any, affine: Any
) -> None:
    """All four with importance weights: levels low..high, sixteen blocks at a time. `affine` formats have a minimum."""
    starts, columns = scratch(np.int64, 1), scratch(np.int64, 1)
    xs, ws, ls = scratch(np.float32, QK), scratch(np.float32, QK), scratch(np.float32, QK)
    squares, sigma = scratch(np.float32, 1), scratch(np.float32, 1)
    scales, lows = scratch(np.float32, 1), scratch(np.float32, 1)
    inverse, base = scratch(np.float32, 1), scratch(np.float32, 1)
    store(base, 0, splat(ZERO))
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
        if affine:
            found = affine_search(xs, ws, ls, QK, high, np.float32(-0.9), np.float32(0.05), 36, False)
            store(scales, 0, found[0])
            store(lows, 0, found[1])
            store(inverse, 0, found[2])
            store(base, 0, found[3])
        else:
            scale, best, _ = signed_search(xs, ws, QK, -low)
            store(scales, 0, scale)
            store(inverse, 0, best)
        for k in range(count):
            at, start = (first + k) * layout.nbytes, (first + k) * QK
            scale, zero = splat(inverse[k]), splat(base[k])
            put_half(out, at + D, scales[k])
            if affine:
                put_half(out, at + M, lows[k])
            offset = splat(-low if inverse[k] != ZERO else 0)  # an all but empty block has levels of 0
            first_half = clamped_ints(scale * (load(x, start) - zero), low, high) + offset
            second_half = clamped_ints(scale * (load(x, start + LANES) - zero), low, high) + offset
            put_levels(out, at + layout.qs, first_half, second_half, high - low == 31)


@piece
def decode_levels(data: Any, out: Any, layout: Any, five: Any, affine: Any) -> None:
    """Decode all four: levels of 4 bits, with `five` of 5. The middle stands for 0; `affine` formats have a minimum."""
    middle = splat(0 if affine else 16 if five else 8)
    for block in range(out.size // QK):
        at, to = block * layout.nbytes, block * QK
        nibbles = load(data, at + layout.qs)
        low, high = nibbles & splat(15), nibbles >> splat(4)
        if five:
            tops = splat(get_word(data, at + layout.qs - QH_BEFORE_QS)) >> lane_numbers()
            low = low | ((tops & splat(1)) << splat(4))
            high = high | ((tops >> splat(12)) & splat(16))
        d = splat(get_half(data, at + D))
        first, second = to_float(low - middle) * d, to_float(high - middle) * d
        if affine:
            m = splat(get_half(data, at + M))
            first, second = first + m, second + m
        store(out, to, first)
        store(out, to + LANES, second)


class Q4_0(Block, type=GGMLType.Q4_0):
    """4 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q4_0_ref and quantize_row_q4_0_impl."""
        if weights is None:
            encode_symmetric(x, out, Q4_0_BYTES, 8)
        else:
            encode_weighted(x, out, n_per_row, weights, Q4_0_BYTES, -8, 7, False)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q4_0."""
        decode_levels(data, out, Q4_0_BYTES, False, False)


class Q4_1(Block, type=GGMLType.Q4_1):
    """4 bits, a float16 scale and a float16 minimum."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q4_1_ref and quantize_row_q4_1_impl."""
        if weights is None:
            encode_affine(x, out, Q4_1_BYTES, 15, 15)
        else:
            encode_weighted(x, out, n_per_row, weights, Q4_1_BYTES, 0, 15, True)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q4_1."""
        decode_levels(data, out, Q4_1_BYTES, False, True)


class Q5_0(Block, type=GGMLType.Q5_0):
    """5 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q5_0_ref and quantize_row_q5_0_impl."""
        if weights is None:
            encode_symmetric(x, out, Q5_0_BYTES, 16)
        else:
            encode_weighted(x, out, n_per_row, weights, Q5_0_BYTES, -16, 15, False)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q5_0."""
        decode_levels(data, out, Q5_0_BYTES, True, False)


class Q5_1(Block, type=GGMLType.Q5_1):
    """5 bits, a float16 scale and a float16 minimum."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q5_1_ref (which does not clamp) and quantize_row_q5_1_impl."""
        if weights is None:
            encode_affine(x, out, Q5_1_BYTES, 31, 255)
        else:
            encode_weighted(x, out, n_per_row, weights, Q5_1_BYTES, 0, 31, True)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q5_1."""
        decode_levels(data, out, Q5_1_BYTES, True, True)


class Q8_0(Block, type=GGMLType.Q8_0):
    """8 bits and a float16 scale."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
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
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q8_0."""
        levels = data.view(np.int8)
        for block in range(out.size // QK):
            at, to = block * Q8_0_BYTES.nbytes, block * QK
            d = splat(get_half(data, at + Q8_0_BYTES.d))
            for i in range(0, QK, LANES):
                store(out, to + i, to_float(load(levels, at + Q8_0_BYTES.qs + i)) * d)
