"""IQ3_XXS and IQ3_S: groups of 4 weights of about 3 bits, whose magnitudes are points of a grid.

Layouts: block_iq3_xxs and block_iq3_s in ggml-common.h. Algorithms: quantize_row_iq3_*_impl in ggml-quants.c. The
search itself is in `grid_searches`.
"""

from __future__ import annotations

import numpy as np

from quantkit.blocks.bytes import clear, get_half, get_nibble, get_word, put_half
from quantkit.blocks.grid_searches import (
    ROUND_ANY,
    ROUND_REPLACED,
    GridFormat,
    Shape,
    Tile,
    encode_on_grid,
    most_of,
    put_scale_codes,
    put_signs_and_scale,
    start_with_largest,
)
from quantkit.blocks.grids import Grid, GridBlock, even_sign_table, put_group, sign_table
from quantkit.blocks.lanes import LANES, ONE, ZERO, Bytes, Floats, Ints, Shorts
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

XXS, S = GGMLType.IQ3_XXS.layout, GGMLType.IQ3_S.layout
SHAPE = Shape(dim=4, width=3, top=7)
SPACING = np.float32(0.2)
GROUP_MAX_EPS_IQ3_XXS = np.float32(1e-8)
ANYTHING = np.float32(2.0**-149)  # the least above zero: for IQ3_S, nothing but zeros is empty


@piece
def _put_xxs(out: Bytes, block: int, lane: int, tile: Tile, codes: Ints, found: Floats, index: Shorts) -> None:
    at = block * XXS.nbytes
    most = most_of(found, lane, 8)
    step = most / np.float32(31)
    inverse = ONE / step
    put_half(out, at + XXS.d, step * np.float32(1.0125))
    for j in range(8):
        for k in range(8):
            out[at + XXS.qs + 8 * j + k] = np.uint8(index[codes[k * LANES + lane + j]])
        put_signs_and_scale(tile.signs, lane + j, found[lane + j], inverse, out, at + XXS.scales_and_signs + 4 * j)
    if most == ZERO:
        clear(out, at, XXS.nbytes)


@piece
def _put_s(out: Bytes, block: int, lane: int, tile: Tile, codes: Ints, found: Floats, index: Shorts) -> None:
    at = block * S.nbytes
    clear(out, at, S.nbytes)
    most = most_of(found, lane, 8)
    written = 0
    for j in range(8):
        # As in the reference, a sub-block of zeros leaves no gap: low bits and signs of the others move up.
        if tile.empty[lane + j] != 0:
            continue
        for k in range(8):
            point = np.int32(index[codes[k * LANES + lane + j]])
            out[at + S.qs + 8 * written + k] = np.uint8(point & 0xFF)
            out[at + S.qh + j] |= np.uint8((point >> 8) << k)
        for k in range(4):
            out[at + S.signs + 4 * written + k] = np.uint8(tile.signs[k * LANES + lane + j])
        written += 1
    if most != ZERO:
        step = most / np.float32(31)
        inverse = ONE / step
        put_half(out, at + S.d, step * np.float32(1.033))
        put_scale_codes(found, lane, 8, inverse, out, at + S.scales)


XXS_FORMAT = GridFormat(
    shape=SHAPE, n=32, even=True, factor=np.float32(2), share=ZERO, n_trials=31, spacing=SPACING,
    again=ROUND_REPLACED, epsilon=GROUP_MAX_EPS_IQ3_XXS, start=start_with_largest, put=_put_xxs,
)  # fmt: skip
S_FORMAT = GridFormat(
    shape=SHAPE, n=32, even=False, factor=np.float32(2), share=ZERO, n_trials=19, spacing=SPACING,
    again=ROUND_ANY, epsilon=ANYTHING, start=start_with_largest, put=_put_s,
)  # fmt: skip


@kernel
def _encode_xxs(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    encode_on_grid(x, out, n_per_row, weights, grid, XXS_FORMAT)


@kernel
def _encode_s(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    encode_on_grid(x, out, n_per_row, weights, grid, S_FORMAT)


@piece
def _put_pair(
    out: Floats, to: int, scale: np.float32, values: Floats, a: int, b: int, signs: Floats, byte: int
) -> None:
    """Decode two groups, points `a` and `b`, which share a byte of signs."""
    put_group(out, to, scale, values, a * 4, 4, signs, byte * 8)
    put_group(out, to + 4, scale, values, b * 4, 4, signs, byte * 8 + 4)


@kernel
def _decode_xxs(data: Bytes, out: Floats, values: Floats, signs: Floats) -> None:
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
def _decode_s(data: Bytes, out: Floats, values: Floats, signs: Floats) -> None:
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


class IQ3_XXS(GridBlock, type=GGMLType.IQ3_XXS):
    """A grid of 256 points, 7 signs for 8 weights, and a 4-bit scale for every 32 weights.

    After quantize_row_iq3_xxs_impl and dequantize_row_iq3_xxs.
    """

    points, encoder, decoder = GGMLType.IQ3_XXS, _encode_xxs, _decode_xxs
    signs = even_sign_table


class IQ3_S(GridBlock, type=GGMLType.IQ3_S):
    """A grid of 512 points, a sign for every weight, and a 4-bit scale for every 32 weights.

    After quantize_row_iq3_s_impl and dequantize_row_iq3_s.
    """

    points, encoder, decoder = GGMLType.IQ3_S, _encode_s, _decode_s
    signs = sign_table
