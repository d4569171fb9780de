"""IQ2_XXS, IQ2_XS and IQ2_S: groups of 8 weights of about 2 bits, whose magnitudes are points of a grid.

Layouts: block_iq2_xxs, block_iq2_xs and block_iq2_s in ggml-common.h. Algorithms: quantize_row_iq2_*_impl in
ggml-quants.c. The search itself is in `grid_searches`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_nibble, get_short, get_word, put_half, put_short
from quantkit.blocks.grid_searches import (
    ROUND_ALL,
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
from quantkit.blocks.grids import even_sign_table, grid, put_group, require_weights, sign_table
from quantkit.blocks.lane_memory import store
from quantkit.blocks.lanes import LANES, ONE, ZERO, select, splat
from quantkit.blocks.searches import GROUP_MAX_EPS, positive_search
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

XXS, XS, S = (kind.layout for kind in (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S))
SHAPE = (8, 2, 2)  # weights in a group, bits of a level, highest level
STEP = np.float32(0.1)  # between the inverse scales that are tried
GROUP_MAX_EPS_IQ2_S = np.float32(1e-8)


@piece
def _put_xxs(out: Any, block: Any, lane: Any, sub_blocks: Any, index: Any) -> None:
    found, codes, signs = sub_blocks
    at = block * XXS.nbytes
    most = most_of(found, lane, 8)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XXS.d, step)
    for j in range(8):
        for k in range(4):
            out[at + XXS.qs + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
        put_signs_and_scale(signs, lane + j, found[lane + j], inverse, out, at + XXS.qs + 4 + 8 * j)
    if most == ZERO:
        out[at : at + XXS.nbytes] = 0


@piece
def _put_xs(out: Any, block: Any, sub_blocks: Any, index: Any) -> None:
    found, codes, signs = sub_blocks
    at = block * XS.nbytes
    most = most_of(found, 0, 16)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XS.d, step)
    for j in range(16):
        for k in range(2):
            word = np.int32(index[codes[k * LANES + j]]) | (signs[k * LANES + j] << 9)
            put_short(out, at + XS.qs + 4 * j + 2 * k, word)
    put_scale_codes(found, 0, 16, inverse, out, at + XS.scales)
    if most == ZERO:
        out[at : at + XS.nbytes] = 0


@piece
def _put_s(out: Any, block: Any, sub_blocks: Any, index: Any) -> None:
    found, codes, signs = sub_blocks
    at = block * S.nbytes
    most = most_of(found, 0, 16)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + S.d, step * np.float32(0.9875))
    for j in range(8):
        high = 0
        for k in range(4):
            source = (k & 1) * LANES + 2 * j + k // 2
            point = np.int32(index[codes[source]])
            out[at + S.qs + 4 * j + k] = np.uint8(point & 0xFF)
            out[at + S.signs + 4 * j + k] = np.uint8(signs[source])
            high |= (point >> 8) << (2 * k)
        out[at + S.qh + j] = np.uint8(high)
    put_scale_codes(found, 0, 16, inverse, out, at + S.scales)
    if most == ZERO:
        out[at + S.scales : at + S.nbytes] = 0


@kernel
def _encode_xxs(x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any) -> None:
    """Two super-blocks of 8 sub-blocks fill the lanes."""
    tile, work = tile_space(32), work_space(4, 13)
    xs, ws, _ = tile
    us, signs, found = np.empty(32 * LANES, np.float32), np.empty(4 * LANES, np.int32), np.empty(LANES, np.float32)
    codes = work[4]
    for first in range(0, x.size // SUPER, 2):
        count = take_tile(x, first, 32, n_per_row, weights, 1, 0, tile)
        take_signs(xs, ws, 32, True, signs)
        initial = positive_search(xs, ws, work[0], 32, 4)  # 0 where all but empty
        extreme = initial * splat(np.float32(3))
        empty = extreme <= splat(ZERO)
        extreme = select(empty, splat(ONE), extreme)
        scale = grid_search(xs, ws, us, 32, SHAPE, extreme, initial, 13, STEP, ROUND_ALL, grid, work)
        store(found, 0, settle(scale, empty, signs, 4, 127, codes, 4))
        for half in range(count):
            _put_xxs(out, first + half, half * 8, (found, codes, signs), grid.index_of)


@piece
def _sixteens(
    x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any, factor: Any, even: Any, epsilon: Any, put: Any
) -> None:
    """IQ2_XS and IQ2_S: one super-block's 16 sub-blocks fill the lanes. `put` lays out scales, codes and signs."""
    tile, work = tile_space(16), work_space(2, 19)
    xs, ws, _ = tile
    us, signs, found = np.empty(16 * LANES, np.float32), np.empty(2 * LANES, np.int32), np.empty(LANES, np.float32)
    codes = work[4]
    for block in range(x.size // SUPER):
        take_tile(x, block, 16, n_per_row, weights, factor, 0.25, tile)
        largest = take_signs(xs, ws, 16, even, signs)
        empty = largest < splat(epsilon)
        extreme = select(empty, splat(ONE), largest)
        initial = extreme / splat(np.float32(5))
        scale = grid_search(xs, ws, us, 16, SHAPE, extreme, initial, 19, STEP, ROUND_REPLACED, grid, work)
        store(found, 0, settle(scale, empty, signs, 2, 127 if even else 255, codes, 2))
        put(out, block, (found, codes, signs), grid.index_of)


@kernel
def _encode_xs(x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any) -> None:
    _sixteens(x, out, n_per_row, weights, grid, 1, True, GROUP_MAX_EPS, _put_xs)


@kernel
def _encode_s(x: Any, out: Any, n_per_row: Any, weights: Any, grid: Any) -> None:
    _sixteens(x, out, n_per_row, weights, grid, 2, False, GROUP_MAX_EPS_IQ2_S, _put_s)


@piece
def _scale(d: Any, code: Any) -> Any:
    return d * (np.float32(0.5) + np.float32(code)) * np.float32(0.25)


@kernel
def _decode_xxs(data: Any, out: Any, values: Any, signs: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * XXS.nbytes
        d = get_half(data, at + XXS.d)
        for j in range(8):
            word = get_word(data, at + XXS.qs + 4 + 8 * j)
            scale = _scale(d, word >> np.uint32(28))
            for k in range(4):
                to, point = block * SUPER + 32 * j + 8 * k, np.int64(data[at + XXS.qs + 8 * j + k])
                put_group(out, to, scale, values, point * 8, 8, signs, np.int64((word >> np.uint32(7 * k)) & 127) * 8)


@kernel
def _decode_xs(data: Any, out: Any, values: Any, signs: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * XS.nbytes
        d = get_half(data, at + XS.d)
        for j in range(16):
            scale = _scale(d, get_nibble(data, at + XS.scales, j))
            for k in range(2):
                to, word = block * SUPER + 16 * j + 8 * k, get_short(data, at + XS.qs + 4 * j + 2 * k)
                put_group(out, to, scale, values, (word & 511) * 8, 8, signs, (word >> 9) * 8)


@kernel
def _decode_s(data: Any, out: Any, values: Any, signs: Any) -> None:
    for block in range(out.size // SUPER):
        at = block * S.nbytes
        d = get_half(data, at + S.d)
        for j in range(16):
            scale = _scale(d, get_nibble(data, at + S.scales, j))
            for group in range(2 * j, 2 * j + 2):
                high = np.int64(data[at + S.qh + group // 4] >> (2 * (group & 3))) & 3
                to, point = block * SUPER + 8 * group, np.int64(data[at + S.qs + group]) | (high << 8)
                put_group(out, to, scale, values, point * 8, 8, signs, np.int64(data[at + S.signs + group]) * 8)


class IQ2_XXS(Block, type=GGMLType.IQ2_XXS):
    """A grid of 256 points, 7 signs for a group, and a 4-bit scale for every 32 weights. Needs importance weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_xxs_impl. Raises QuantkitError without weights."""
        _encode_xxs(x, out, n_per_row, require_weights(weights, GGMLType.IQ2_XXS), grid(GGMLType.IQ2_XXS))

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_xxs."""
        _decode_xxs(data, out, grid(GGMLType.IQ2_XXS).values, even_sign_table())


class IQ2_XS(Block, type=GGMLType.IQ2_XS):
    """A grid of 512 points, 7 signs for a group, and a 4-bit scale for every 16 weights. Needs importance weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_xs_impl. Raises QuantkitError without weights."""
        _encode_xs(x, out, n_per_row, require_weights(weights, GGMLType.IQ2_XS), grid(GGMLType.IQ2_XS))

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_xs."""
        _decode_xs(data, out, grid(GGMLType.IQ2_XS).values, even_sign_table())


class IQ2_S(Block, type=GGMLType.IQ2_S):
    """A grid of 1024 points, 8 signs for a group, and a 4-bit scale for every 16 weights."""

    @staticmethod
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_iq2_s_impl."""
        _encode_s(x, out, n_per_row, weights, grid(GGMLType.IQ2_S))

    @staticmethod
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_iq2_s."""
        _decode_s(data, out, grid(GGMLType.IQ2_S).values, sign_table())
