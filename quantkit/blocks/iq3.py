"""IQ3_XXS and IQ3_S: groups of 4 weights of about 3 bits, whose magnitudes are points of a grid.

Layouts: block_iq3_xxs and block_iq3_s in ggml-common.h. Algorithms: quantize_row_iq3_*_impl in ggml-quants.c. The
search itself is in `grid_searches`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_nibble, get_word, put_half
from quantkit.blocks.grid_searches import (
    ROUND_ANY,
    ROUND_REPLACED,
    grid_search,
    most_of,
    put_scale_codes,
    put_signs_and_scale,
    settle,
    take_signs,
    take_tile,
    tile_space,
    work_space,
)
from quantkit.blocks.grids import even_sign_table, grid, put_group, sign_table
from quantkit.blocks.lane_memory import store
from quantkit.blocks.lanes import LANES, ONE, ZERO, select, splat
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

XXS, S = GGMLType.IQ3_XXS.layout, GGMLType.IQ3_S.layout
SHAPE = (4, 3, 7)  # weights in a group, bits of a level, highest level
STEP = np.float32(0.2)  # between the inverse scales that are tried
GROUP_MAX_EPS_IQ3_XXS = np.float32(1e-8)


@piece
def _encode(
    x: Any,
    out: Any,
    n_per_row: Any,
    weights: Any,
    grid: Any,
    even: Any,
    n_trials: Any,
    refit: Any,
    put: Any,
) -> None:
    """Two super-blocks of 8 sub-blocks fill the lanes. `put` lays out scales, codes and signs."""
    tile, work = tile_space(32), work_space(8, n_trials)
    xs, ws, _ = tile
    us, signs, found = np.empty(32 * LANES, np.float32), np.empty(4 * LANES, np.int32), np.empty(LANES, np.float32)
    empties = np.empty(LANES, np.int32)
    codes = work[4]
    for first in range(0, x.size // SUPER, 2):
        count = take_tile(x, first, 32, n_per_row, weights, 2, 0, tile)
        largest = take_signs(xs, ws, 32, even, signs)
        empty = largest < splat(GROUP_MAX_EPS_IQ3_XXS) if even else largest == splat(ZERO)
        extreme = select(empty, splat(ONE), largest)
        initial = extreme / splat(np.float32(15))
        scale = grid_search(xs, ws, us, 32, SHAPE, extreme, initial, n_trials, STEP, refit, grid, work)
        store(found, 0, settle(scale, empty, signs, 4, 127 if even else 255, codes, 8))
        store(empties, 0, select(empty, splat(1), splat(0)))
        for half in range(count):
            put(out, first + half, half * 8, (found, empties, codes, signs), grid.index_of)


@piece
def _put_xxs(out: Any, block: Any, lane: Any, sub_blocks: Any, index: Any) -> None:
    found, _, codes, signs = sub_blocks
    at = block * XXS.nbytes
    most = most_of(found, lane, 8)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XXS.d, step * np.float32(1.0125))
    for j in range(8):
        for k in range(8):
            out[at + XXS.qs + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
        put_signs_and_scale(signs, lane + j, found[lane + j], inverse, out, at + XXS.scales_and_signs + 4 * j)
    if most == ZERO:
        out[at : at + XXS.nbytes] = 0


@piece
def _put_s(out: Any, block: Any, lane: Any, sub_blocks: Any, index: Any) -> None:
    found, empties, codes, signs = sub_blocks
    at = block * S.nbytes
    out[at : at + S.nbytes] = 0
    most = most_of(found, lane, 8)
    written = 0
    for j in range(8):
        # As in the reference, a sub-block of zeros leaves no gap: low bits and signs of the others move up.
        if empties[lane + j] != 0:
            continue
        for k in range(8):
            point = np.int32(index[codes[k * LANES + lane + j]])
            out[at + S.qs + 8 * written + k] = np.uint8(point & 0xFF)
            out[at + S.qh + j] |= np.uint8((point >> 8) << k)
        for k in range(4):
            out[at + S.signs + 4 * written + k] = np.uint8(signs[k * LANES + lane + j])
        written += 1
    if most != ZERO:
        step = most / np.float32(31)
        inverse = ONE / step
        put_half(out, at + S.d, step * np.float32(1.033))
        put_scale_codes(found, lane, 8, inverse, out, at + S.scales)


@kernel
def _encode_xxs(x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any) -> None:
    _encode(x, out, n_per_row, weights, grid, True, 31, ROUND_REPLACED, _put_xxs)


@kernel
def _encode_s(x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any) -> None:
    _encode(x, out, n_per_row, weights, grid, False, 19, ROUND_ANY, _put_s)


@piece
def _put_pair(out: Any, to: Any, scale: Any, values: Any, a: Any, b: Any, signs: Any, byte: Any) -> None:
    """Decode two groups, points `a` and `b`, which share a byte of signs."""
    put_group(out, to, scale, values, a * 4, 4, signs, byte * 8)
    put_group(out, to + 4, scale, values, b * 4, 4, signs, byte * 8 + 4)


@kernel
def _decode_xxs(data: Any, out: Any, values: Any, signs: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * XXS.nbytes
        d = get_half(data, at + XXS.d)
        for j in range(8):
            word = get_word(data, at + XXS.scales_and_signs + 4 * j)
            scale = d * (np.float32(0.5) + np.float32(word >> np.uint32(28))) * np.float32(0.5)
            for k in range(4):
                source, to = at + XXS.qs + 8 * j + 2 * k, block * SUPER + 32 * j + 8 * k
                a, b = np.int64(data[source]), np.int64(data[source + 1])
                _put_pair(out, to, scale, values, a, b, signs, np.int64((word >> np.uint32(7 * k)) & 127))


@kernel
def _decode_s(data: Any, out: Any, values: Any, signs: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * S.nbytes
        d = get_half(data, at + S.d)
        for j in range(8):
            scale = d * np.float32(1 + 2 * get_nibble(data, at + S.scales, j))
            high = np.int64(data[at + S.qh + j])
            for k in range(4):
                source, to = at + S.qs + 8 * j + 2 * k, block * SUPER + 32 * j + 8 * k
                a = np.int64(data[source]) | (((high >> (2 * k)) & 1) << 8)
                b = np.int64(data[source + 1]) | (((high >> (2 * k + 1)) & 1) << 8)
                _put_pair(out, to, scale, values, a, b, signs, np.int64(data[at + S.signs + 4 * j + k]))


class IQ3_XXS(Block, type=GGMLType.IQ3_XXS):
    """A grid of 256 points, 7 signs for 8 weights, and a 4-bit scale for every 32 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq3_xxs_impl."""
        _encode_xxs(x, out, n_per_row, weights, grid(GGMLType.IQ3_XXS))

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq3_xxs."""
        _decode_xxs(data, out, grid(GGMLType.IQ3_XXS).values, even_sign_table())


class IQ3_S(Block, type=GGMLType.IQ3_S):
    """A grid of 512 points, a sign for every weight, and a 4-bit scale for every 32 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq3_s_impl."""
        _encode_s(x, out, n_per_row, weights, grid(GGMLType.IQ3_S))

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq3_s."""
        _decode_s(data, out, grid(GGMLType.IQ3_S).values, sign_table())
