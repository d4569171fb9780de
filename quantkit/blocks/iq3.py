"""IQ3_XXS and IQ3_S: groups of 4 weights of about 3 bits, whose magnitudes are points of a grid.

Layouts: block_iq3_xxs and block_iq3_s in ggml-common.h. Algorithms: quantize_row_iq3_*_impl in ggml-quants.c. The
search itself is in `grid_searches`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_word, put_half
from quantkit.blocks.grid_searches import (
    ROUND_ANY,
    ROUND_REPLACED,
    SUPER,
    grid_search,
    make_weights,
    mean_square,
    most_of,
    scale_code,
    settle,
    take_signs,
    work_space,
)
from quantkit.blocks.grids import even_signs, grid, sign_table
from quantkit.blocks.lanes import LANES, load, select, splat, store
from quantkit.blocks.searches import ONE, ZERO, gather
from quantkit.blocks.types import GGMLType
from quantkit.kernels import kernel, piece

SHAPE = (4, 3, 7)  # weights in a group, bits of a level, highest level
STEP = np.float32(0.2)  # between the inverse scales that are tried
GROUP_MAX_EPS_IQ3_XXS = np.float32(1e-8)


@piece
def _encode(
    x: Any,
    n_per_row: Any,
    weights: Any,
    grid: Any,
    even: Any,
    n_trials: Any,
    refit: Any,
    put: Any,
    out: Any,
    index: Any,
) -> None:
    """Two super-blocks of 8 sub-blocks fill the lanes. `put` lays out scales, codes and signs."""
    xs, ws, us = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    signs = np.empty(4 * LANES, np.int32)
    sigmas, found, empties = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    work = work_space(8, n_trials)
    n_blocks = x.size // SUPER
    for first in range(0, n_blocks, 2):
        for half in range(2):
            start = min(first + half, n_blocks - 1) * SUPER  # the last one of an odd number fills both halves
            gather(x, start, 32, 32, xs, half * 8, 8)
            if weights is not None:
                gather(weights, start % n_per_row, 32, 32, ws, half * 8, 8)
                sigmas[half * 8 : half * 8 + 8] = np.float32(2) * mean_square(x, start)
        if weights is None:
            for i in range(32):
                v = load(xs, i * LANES)
                store(ws, i * LANES, v * v)
        else:
            make_weights(xs, ws, 32, load(sigmas, 0))
        largest = take_signs(xs, ws, 32, even, signs)
        empty = largest < splat(GROUP_MAX_EPS_IQ3_XXS) if even else largest == splat(ZERO)
        extreme = select(empty, splat(ONE), largest)
        initial = extreme / splat(np.float32(15))
        scale = grid_search(xs, ws, us, 32, SHAPE, extreme, initial, n_trials, STEP, refit, grid, work)
        store(found, 0, settle(scale, empty, signs, 4, 127 if even else 255, work[4], 8))
        store(empties, 0, select(empty, splat(1), splat(0)))
        for half in range(min(2, n_blocks - first)):
            put(out, first + half, found, empties, work[4], signs, half * 8, index)


@piece
def _put_xxs(out: Any, block: Any, found: Any, empties: Any, codes: Any, signs: Any, lane: Any, index: Any) -> None:
    at = block * 98
    most = most_of(found, lane, 8)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at, step * np.float32(1.0125))
    for j in range(8):
        for k in range(8):
            out[at + 2 + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
        word = np.int64(scale_code(found[lane + j], inverse, 15)) << 28
        for k in range(4):
            word |= np.int64(signs[k * LANES + lane + j]) << (7 * k)
        for k in range(4):
            out[at + 66 + 4 * j + k] = np.uint8((word >> (8 * k)) & 0xFF)
    if most == ZERO:
        out[at : at + 98] = 0


@piece
def _put_s(out: Any, block: Any, found: Any, empties: Any, codes: Any, signs: Any, lane: Any, index: Any) -> None:
    at = block * 110
    out[at : at + 110] = 0
    most = most_of(found, lane, 8)
    written = 0
    for j in range(8):
        # As in the reference, a sub-block of zeros leaves no gap: low bits and signs of the others move up.
        if empties[lane + j] != 0:
            continue
        for k in range(8):
            point = np.int32(index[codes[k * LANES + lane + j]])
            out[at + 2 + 8 * written + k] = np.uint8(point & 0xFF)
            out[at + 66 + j] |= np.uint8((point >> 8) << k)
        for k in range(4):
            out[at + 74 + 4 * written + k] = np.uint8(signs[k * LANES + lane + j])
        written += 1
    if most != ZERO:
        step = most / np.float32(31)
        inverse = ONE / step
        put_half(out, at, step * np.float32(1.033))
        for j in range(0, 8, 2):
            low, high = scale_code(found[lane + j], inverse, 15), scale_code(found[lane + j + 1], inverse, 15)
            out[at + 106 + j // 2] = np.uint8(low | (high << 4))


@kernel
def _encode_xxs(x: Any, out: Any, n_per_row: Any, weights: Any, where: Any, lists: Any, index: Any) -> None:
    _encode(x, n_per_row, weights, (where, lists), True, 31, ROUND_REPLACED, _put_xxs, out, index)


@kernel
def _encode_s(x: Any, out: Any, n_per_row: Any, weights: Any, where: Any, lists: Any, index: Any) -> None:
    _encode(x, n_per_row, weights, (where, lists), False, 19, ROUND_ANY, _put_s, out, index)


@piece
def _put_group(out: Any, to: Any, scale: Any, values: Any, a: Any, b: Any, factors: Any, signs: Any) -> None:
    """Decode two groups, points `a` and `b`: scale, times the point's values, times the signs."""
    for i in range(4):
        out[to + i] = scale * values[a * 4 + i] * factors[signs * 8 + i]
    for i in range(4):
        out[to + 4 + i] = scale * values[b * 4 + i] * factors[signs * 8 + 4 + i]


@kernel
def _decode_xxs(data: Any, out: Any, values: Any, factors: Any, even: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * 98
        d = get_half(data, at)
        for j in range(8):
            word = get_word(data, at + 66 + 4 * j)
            scale = d * (np.float32(0.5) + np.float32(word >> np.uint32(28))) * np.float32(0.5)
            for k in range(4):
                source, to = at + 2 + 8 * j + 2 * k, block * SUPER + 32 * j + 8 * k
                signs = np.int64(even[(word >> np.uint32(7 * k)) & 127])
                _put_group(out, to, scale, values, np.int64(data[source]), np.int64(data[source + 1]), factors, signs)


@kernel
def _decode_s(data: Any, out: Any, values: Any, factors: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * 110
        d = get_half(data, at)
        for j in range(8):
            nibble = (data[at + 106 + j // 2] >> (4 * (j & 1))) & 15
            scale = d * np.float32(1 + 2 * np.int32(nibble))
            high = np.int64(data[at + 66 + j])
            for k in range(4):
                source, to = at + 2 + 8 * j + 2 * k, block * SUPER + 32 * j + 8 * k
                a = np.int64(data[source]) | (((high >> (2 * k)) & 1) << 8)
                b = np.int64(data[source + 1]) | (((high >> (2 * k + 1)) & 1) << 8)
                _put_group(out, to, scale, values, a, b, factors, np.int64(data[at + 74 + 4 * j + k]))


class IQ3_XXS(Block, type=GGMLType.IQ3_XXS):
    """A grid of 256 points, 7 signs for 8 weights, and a 4-bit scale for every 32 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq3_xxs_impl."""
        points = grid(GGMLType.IQ3_XXS)
        _encode_xxs(x, out, n_per_row, weights, points.where, points.lists, points.index)

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq3_xxs."""
        _decode_xxs(data, out, grid(GGMLType.IQ3_XXS).values, sign_table(), even_signs())


class IQ3_S(Block, type=GGMLType.IQ3_S):
    """A grid of 512 points, a sign for every weight, and a 4-bit scale for every 32 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq3_s_impl."""
        points = grid(GGMLType.IQ3_S)
        _encode_s(x, out, n_per_row, weights, points.where, points.lists, points.index)

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq3_s."""
        _decode_s(data, out, grid(GGMLType.IQ3_S).values, sign_table())
