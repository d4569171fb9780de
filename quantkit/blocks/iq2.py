"""IQ2_XXS, IQ2_XS and IQ2_S: groups of 8 weights of about 2 bits, whose magnitudes are points of a grid.

Layouts: block_iq2_xxs, block_iq2_xs and block_iq2_s in ggml-common.h. Algorithms: quantize_row_iq2_*_impl in
ggml-quants.c. The search itself is in `grid_searches`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_word, put_half
from quantkit.blocks.grid_searches import (
    ROUND_ALL,
    ROUND_REPLACED,
    SUPER,
    grid_search,
    make_weights,
    mean_square,
    most_of,
    positive_search,
    scale_code,
    settle,
    take_signs,
    work_space,
)
from quantkit.blocks.grids import even_signs, grid, require_weights, sign_table
from quantkit.blocks.lanes import LANES, load, select, splat, store
from quantkit.blocks.searches import GROUP_MAX_EPS, ONE, ZERO, gather
from quantkit.blocks.types import GGMLType
from quantkit.kernels import kernel, piece

SHAPE = (8, 2, 2)  # weights in a group, bits of a level, highest level
STEP = np.float32(0.1)  # between the inverse scales that are tried
GROUP_MAX_EPS_IQ2_S = np.float32(1e-8)


@kernel
def _encode_xxs(x: Any, out: Any, n_per_row: Any, weights: Any, where: Any, lists: Any, index: Any) -> None:
    xs, ws, us = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32)
    levels = np.empty(32 * LANES, np.int32)
    signs = np.empty(4 * LANES, np.int32)
    sigmas, found = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    work = work_space(4, 13)
    codes = work[4]
    n_blocks = x.size // SUPER
    for first in range(0, n_blocks, 2):
        for half in range(2):
            start = min(first + half, n_blocks - 1) * SUPER  # the last one of an odd number fills both halves
            gather(x, start, 32, 32, xs, half * 8, 8)
            gather(weights, start % n_per_row, 32, 32, ws, half * 8, 8)
            sigmas[half * 8 : half * 8 + 8] = mean_square(x, start)
        make_weights(xs, ws, 32, load(sigmas, 0))
        largest = take_signs(xs, ws, 32, True, signs)
        empty = largest < splat(GROUP_MAX_EPS)
        initial = positive_search(xs, ws, levels, 32, 4, select(empty, splat(ONE), largest))
        extreme = initial * splat(np.float32(3))
        empty = empty | (extreme <= splat(ZERO))
        extreme = select(empty, splat(ONE), extreme)
        scale = grid_search(xs, ws, us, 32, SHAPE, extreme, initial, 13, STEP, ROUND_ALL, (where, lists), work)
        store(found, 0, settle(scale, empty, signs, 4, 127, codes, 4))
        for half in range(min(2, n_blocks - first)):
            at = (first + half) * 66
            lane = half * 8
            most = most_of(found, lane, 8)
            step = most / np.float32(31)
            inverse = ONE / step
            put_half(out, at, step)
            for j in range(8):
                word = np.int64(scale_code(found[lane + j], inverse, 15)) << 28
                for k in range(4):
                    out[at + 2 + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
                    word |= np.int64(signs[k * LANES + lane + j]) << (7 * k)
                for k in range(4):
                    out[at + 6 + 8 * j + k] = np.uint8((word >> (8 * k)) & 0xFF)
            if most == ZERO:
                out[at : at + 66] = 0


class IQ2_XXS(Block, type=GGMLType.IQ2_XXS):
    """A grid of 256 points, 7 signs for a group, and a 4-bit scale for every 32 weights. Needs importance weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_xxs_impl. Raises QuantkitError without weights."""
        points = grid(GGMLType.IQ2_XXS)
        weights = require_weights(weights, GGMLType.IQ2_XXS)
        _encode_xxs(x, out, n_per_row, weights, points.where, points.lists, points.index)

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_xxs."""
        _decode_xxs(data, out, grid(GGMLType.IQ2_XXS).values, sign_table(), even_signs())


@piece
def _sixteens(
    x: Any, n_per_row: Any, weights: Any, grid: Any, even: Any, epsilon: Any, put: Any, out: Any, index: Any
) -> None:
    """IQ2_XS and IQ2_S: one super-block's 16 sub-blocks fill the lanes. `put` lays out scales, codes and signs."""
    xs, ws, us = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32)
    signs = np.empty(2 * LANES, np.int32)
    found = np.empty(LANES, np.float32)
    work = work_space(2, 19)
    for block in range(x.size // SUPER):
        start = block * SUPER
        gather(x, start, 16, 16, xs, 0, LANES)
        sigma = mean_square(x, start)
        if not even:
            sigma *= np.float32(2)
        if weights is None:
            quarter = splat(np.float32(0.25) * sigma)
            for i in range(16):
                v = load(xs, i * LANES)
                store(ws, i * LANES, quarter + v * v)
        else:
            gather(weights, start % n_per_row, 16, 16, ws, 0, LANES)
            make_weights(xs, ws, 16, splat(sigma))
        largest = take_signs(xs, ws, 16, even, signs)
        empty = largest < splat(epsilon)
        extreme = select(empty, splat(ONE), largest)
        scale = grid_search(
            xs, ws, us, 16, SHAPE, extreme, extreme / splat(np.float32(5)), 19, STEP, ROUND_REPLACED, grid, work
        )
        store(found, 0, settle(scale, empty, signs, 2, 127 if even else 255, work[4], 2))
        put(out, block, found, work[4], signs, index)


@piece
def _put_xs(out: Any, block: Any, found: Any, codes: Any, signs: Any, index: Any) -> None:
    at = block * 74
    most = most_of(found, 0, 16)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at, step)
    for j in range(16):
        for k in range(2):
            word = np.int32(index[codes[k * LANES + j]]) | (signs[k * LANES + j] << 9)
            out[at + 2 + 4 * j + 2 * k] = np.uint8(word & 0xFF)
            out[at + 3 + 4 * j + 2 * k] = np.uint8(word >> 8)
    for j in range(0, 16, 2):
        low, high = scale_code(found[j], inverse, 15), scale_code(found[j + 1], inverse, 15)
        out[at + 66 + j // 2] = np.uint8(low | (high << 4))
    if most == ZERO:
        out[at : at + 74] = 0


@piece
def _put_s(out: Any, block: Any, found: Any, codes: Any, signs: Any, index: Any) -> None:
    at = block * 82
    most = most_of(found, 0, 16)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at, step * np.float32(0.9875))
    for j in range(8):
        high = 0
        for k in range(4):
            lane = 2 * j + k // 2
            point = np.int32(index[codes[(k & 1) * LANES + lane]])
            out[at + 2 + 4 * j + k] = np.uint8(point & 0xFF)
            out[at + 34 + 4 * j + k] = np.uint8(signs[(k & 1) * LANES + lane])
            high |= (point >> 8) << (2 * k)
        out[at + 66 + j] = np.uint8(high)
        if most == ZERO:
            out[at + 74 + j] = 0
        else:
            low, high = scale_code(found[2 * j], inverse, 15), scale_code(found[2 * j + 1], inverse, 15)
            out[at + 74 + j] = np.uint8(low | (high << 4))


@kernel
def _encode_xs(x: Any, out: Any, n_per_row: Any, weights: Any, where: Any, lists: Any, index: Any) -> None:
    _sixteens(x, n_per_row, weights, (where, lists), True, GROUP_MAX_EPS, _put_xs, out, index)


@kernel
def _encode_s(x: Any, out: Any, n_per_row: Any, weights: Any, where: Any, lists: Any, index: Any) -> None:
    _sixteens(x, n_per_row, weights, (where, lists), False, GROUP_MAX_EPS_IQ2_S, _put_s, out, index)


class IQ2_XS(Block, type=GGMLType.IQ2_XS):
    """A grid of 512 points, 7 signs for a group, and a 4-bit scale for every 16 weights. Needs importance weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_xs_impl. Raises QuantkitError without weights."""
        points = grid(GGMLType.IQ2_XS)
        weights = require_weights(weights, GGMLType.IQ2_XS)
        _encode_xs(x, out, n_per_row, weights, points.where, points.lists, points.index)

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_xs."""
        _decode_xs(data, out, grid(GGMLType.IQ2_XS).values, sign_table(), even_signs())


class IQ2_S(Block, type=GGMLType.IQ2_S):
    """A grid of 1024 points, 8 signs for a group, and a 4-bit scale for every 16 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_s_impl."""
        points = grid(GGMLType.IQ2_S)
        _encode_s(x, out, n_per_row, weights, points.where, points.lists, points.index)

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_s."""
        _decode_s(data, out, grid(GGMLType.IQ2_S).values, sign_table())


@piece
def _put_group(out: Any, to: Any, scale: Any, values: Any, point: Any, factors: Any, signs: Any) -> None:
    """Decode one group: scale, times the point's values, times the signs."""
    for i in range(8):
        out[to + i] = scale * values[point * 8 + i] * factors[signs * 8 + i]


@kernel
def _decode_xxs(data: Any, out: Any, values: Any, factors: Any, even: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * 66
        d = get_half(data, at)
        for j in range(8):
            word = get_word(data, at + 6 + 8 * j)
            scale = d * (np.float32(0.5) + np.float32(word >> np.uint32(28))) * np.float32(0.25)
            for k in range(4):
                signs = np.int64(even[(word >> np.uint32(7 * k)) & 127])
                to = block * SUPER + 32 * j + 8 * k
                _put_group(out, to, scale, values, np.int64(data[at + 2 + 8 * j + k]), factors, signs)


@kernel
def _decode_xs(data: Any, out: Any, values: Any, factors: Any, even: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * 74
        d = get_half(data, at)
        for j in range(16):
            nibble = (data[at + 66 + j // 2] >> (4 * (j & 1))) & 15
            scale = d * (np.float32(0.5) + np.float32(nibble)) * np.float32(0.25)
            for k in range(2):
                word = np.int64(data[at + 2 + 4 * j + 2 * k]) | (np.int64(data[at + 3 + 4 * j + 2 * k]) << 8)
                to = block * SUPER + 16 * j + 8 * k
                _put_group(out, to, scale, values, word & 511, factors, np.int64(even[word >> 9]))


@kernel
def _decode_s(data: Any, out: Any, values: Any, factors: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * 82
        d = get_half(data, at)
        for j in range(16):
            nibble = (data[at + 74 + j // 2] >> (4 * (j & 1))) & 15
            scale = d * (np.float32(0.5) + np.float32(nibble)) * np.float32(0.25)
            for k in range(2):
                group = 2 * j + k
                high = np.int64(data[at + 66 + group // 4] >> (2 * (group & 3))) & 3
                point = np.int64(data[at + 2 + group]) | (high << 8)
                to = block * SUPER + 8 * group
                _put_group(out, to, scale, values, point, factors, np.int64(data[at + 34 + group]))
