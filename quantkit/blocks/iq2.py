"""IQ2_XXS, IQ2_XS and IQ2_S: groups of 8 weights of about 2 bits, whose magnitudes are points of a grid.

Layouts: block_iq2_xxs, block_iq2_xs and block_iq2_s in ggml-common.h. Algorithms: quantize_row_iq2_*_impl in
ggml-quants.c. The search itself is in `grid_searches`.
"""

from __future__ import annotations

import numpy as np

from quantkit.blocks.bytes import clear, get_half, get_nibble, get_short, get_word, put_half, put_short
from quantkit.blocks.grid_searches import (
    ROUND_ALL,
    ROUND_REPLACED,
    GridFormat,
    Shape,
    Tile,
    Trials,
    encode_on_grid,
    most_of,
    put_scale_codes,
    put_signs_and_scale,
    start_with_largest,
)
from quantkit.blocks.grids import Grid, GridBlock, even_sign_table, put_group, sign_table
from quantkit.blocks.lanes import LANES, ONE, ZERO, Bytes, F32x16, Floats, Ints, Mask16, Shorts, select, splat
from quantkit.blocks.searches import GROUP_MAX_EPS, positive_search
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

XXS, XS, S = (kind.layout for kind in (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S))
SHAPE = Shape(dim=8, width=2, top=2)
SPACING = np.float32(0.1)
GROUP_MAX_EPS_IQ2_S = np.float32(1e-8)


@piece
def _start_with_search(tile: Tile, trials: Trials, largest: F32x16, fmt: GridFormat) -> tuple[F32x16, F32x16, Mask16]:
    """IQ2_XXS looks for the scale of levels 0 to 4 first, three of which stand for the highest of its own."""
    initial = positive_search(tile.xs, tile.ws, trials.codes, tile.n, 4)  # 0 where all but empty
    extreme = initial * splat(np.float32(3))
    empty = extreme <= splat(fmt.epsilon)
    return select(empty, splat(ONE), extreme), initial, empty


@piece
def _put_xxs(out: Bytes, block: int, lane: int, tile: Tile, codes: Ints, found: Floats, index: Shorts) -> None:
    at = block * XXS.nbytes
    most = most_of(found, lane, 8)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XXS.d, step)
    for j in range(8):
        for k in range(4):
            out[at + XXS.qs + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
        put_signs_and_scale(tile.signs, lane + j, found[lane + j], inverse, out, at + XXS.qs + 4 + 8 * j)
    if most == ZERO:
        clear(out, at, XXS.nbytes)


@piece
def _put_xs(out: Bytes, block: int, lane: int, tile: Tile, codes: Ints, found: Floats, index: Shorts) -> None:
    at = block * XS.nbytes
    most = most_of(found, 0, 16)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XS.d, step)
    for j in range(16):
        for k in range(2):
            word = np.int32(index[codes[k * LANES + j]]) | (tile.signs[k * LANES + j] << 9)
            put_short(out, at + XS.qs + 4 * j + 2 * k, word)
    put_scale_codes(found, 0, 16, inverse, out, at + XS.scales)
    if most == ZERO:
        clear(out, at, XS.nbytes)


@piece
def _put_s(out: Bytes, block: int, lane: int, tile: Tile, codes: Ints, found: Floats, index: Shorts) -> None:
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
            out[at + S.signs + 4 * j + k] = np.uint8(tile.signs[source])
            high |= (point >> 8) << (2 * k)
        out[at + S.qh + j] = np.uint8(high)
    put_scale_codes(found, 0, 16, inverse, out, at + S.scales)
    if most == ZERO:
        clear(out, at + S.scales, S.nbytes - S.scales)


XXS_FORMAT = GridFormat(
    shape=SHAPE, n=32, even=True, factor=np.float32(1), share=ZERO, n_trials=13, spacing=SPACING, again=ROUND_ALL,
    epsilon=ZERO, start=_start_with_search, put=_put_xxs,
)  # fmt: skip
XS_FORMAT = GridFormat(
    shape=SHAPE, n=16, even=True, factor=np.float32(1), share=np.float32(0.25), n_trials=19, spacing=SPACING,
    again=ROUND_REPLACED, epsilon=GROUP_MAX_EPS, start=start_with_largest, put=_put_xs,
)  # fmt: skip
S_FORMAT = GridFormat(
    shape=SHAPE, n=16, even=False, factor=np.float32(2), share=np.float32(0.25), n_trials=19, spacing=SPACING,
    again=ROUND_REPLACED, epsilon=GROUP_MAX_EPS_IQ2_S, start=start_with_largest, put=_put_s,
)  # fmt: skip


@kernel
def _encode_xxs(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    encode_on_grid(x, out, n_per_row, weights, grid, XXS_FORMAT)


@kernel
def _encode_xs(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    encode_on_grid(x, out, n_per_row, weights, grid, XS_FORMAT)


@kernel
def _encode_s(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    encode_on_grid(x, out, n_per_row, weights, grid, S_FORMAT)


@piece
def _scale(d: np.float32, code: int) -> np.float32:
    return d * (np.float32(0.5) + np.float32(code)) * np.float32(0.25)


@kernel
def _decode_xxs(data: Bytes, out: Floats, values: Floats, signs: Floats) -> None:
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
def _decode_xs(data: Bytes, out: Floats, values: Floats, signs: Floats) -> None:
    for block in range(out.size // SUPER):
        at = block * XS.nbytes
        d = get_half(data, at + XS.d)
        for j in range(16):
            scale = _scale(d, get_nibble(data, at + XS.scales, j))
            for k in range(2):
                to, word = block * SUPER + 16 * j + 8 * k, get_short(data, at + XS.qs + 4 * j + 2 * k)
                put_group(out, to, scale, values, (word & 511) * 8, 8, signs, (word >> 9) * 8)


@kernel
def _decode_s(data: Bytes, out: Floats, values: Floats, signs: Floats) -> None:
    for block in range(out.size // SUPER):
        at = block * S.nbytes
        d = get_half(data, at + S.d)
        for j in range(16):
            scale = _scale(d, get_nibble(data, at + S.scales, j))
            for group in range(2 * j, 2 * j + 2):
                high = np.int64(data[at + S.qh + group // 4] >> (2 * (group & 3))) & 3
                to, point = block * SUPER + 8 * group, np.int64(data[at + S.qs + group]) | (high << 8)
                put_group(out, to, scale, values, point * 8, 8, signs, np.int64(data[at + S.signs + group]) * 8)


class IQ2_XXS(GridBlock, type=GGMLType.IQ2_XXS):
    """A grid of 256 points, 7 signs for a group, and a 4-bit scale for every 32 weights. Needs importance weights.

    After quantize_row_iq2_xxs_impl and dequantize_row_iq2_xxs.
    """

    points, encoder, decoder = GGMLType.IQ2_XXS, _encode_xxs, _decode_xxs
    signs = even_sign_table
    needs_weights = True


class IQ2_XS(GridBlock, type=GGMLType.IQ2_XS):
    """A grid of 512 points, 7 signs for a group, and a 4-bit scale for every 16 weights. Needs importance weights.

    After quantize_row_iq2_xs_impl and dequantize_row_iq2_xs.
    """

    points, encoder, decoder = GGMLType.IQ2_XS, _encode_xs, _decode_xs
    signs = even_sign_table
    needs_weights = True


class IQ2_S(GridBlock, type=GGMLType.IQ2_S):
    """A grid of 1024 points, 8 signs for a group, and a 4-bit scale for every 16 weights.

    After quantize_row_iq2_s_impl and dequantize_row_iq2_s.
    """

    points, encoder, decoder = GGMLType.IQ2_S, _encode_s, _decode_s
    signs = sign_table
