"""Blocks taken apart and put together: what the encoders' searches settle, for those that settle it otherwise.

A block of levels holds, for every weight, the index of a value, and for every sub-block a scale and perhaps a minimum.
`put` writes a block from these parts and `take` reads its scales back; an encoder is a search for the parts and then a
`put`. A block of points holds the index of a grid's point for every group of weights, signs or shifts, and scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.blocks import float4, nonlinear
from quantkit.blocks.bytes import get_half, get_nibble, get_short, get_word, put_half, put_short, put_word
from quantkit.blocks.float4 import MX, half_power
from quantkit.blocks.grids import Grid, grid
from quantkit.blocks.k_affine import Q2, Q4, Q5, get_scales, pack_q2, pack_q4, pack_q5, put_head_4, put_head_6
from quantkit.blocks.k_symmetric import Q3, Q6, get_scale_3, pack_q3, pack_q6, put_scales_3
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import LANES, Bytes, Codes, Floats, Ints, float_bits, half_bits, half_value, splat
from quantkit.blocks.layout import Layout
from quantkit.blocks.legacy import Q4_0_BYTES, Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES, Q8_0_BYTES, D, M, put_levels
from quantkit.blocks.nonlinear import XS
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

QK = 32
IQ2_XXS, IQ2_XS, IQ2_S = (kind.layout for kind in (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S))
IQ3_XXS, IQ3_S = GGMLType.IQ3_XXS.layout, GGMLType.IQ3_S.layout
IQ1_S, IQ1_M = GGMLType.IQ1_S.layout, GGMLType.IQ1_M.layout


@dataclass(frozen=True)
class Parts:
    """What a format's blocks are made of.

    A weight is `scale * values[level] + low`, and `n_sub` consecutive weights share `scale` and `low`. Where the block
    has `codes`, scale is the first of its two floats times a code from `scale_codes` (lowest and highest), and low is
    minus the second float times a code from 0 to `top_low`. Otherwise the floats are scale and low themselves. Without
    `affine` low is 0 and nothing is stored for it.

    Kernels, over any number of blocks as flat arrays: `put(levels, codes, floats, out)` and `take(data, codes,
    floats)`, where `levels` is uint8, block_size for each block; `codes` int32, the scales and then the minimums of
    each block's sub-blocks, or empty where there are none; `floats` float32, two a block.
    """

    kind: GGMLType
    n_sub: int
    values: np.ndarray
    affine: bool
    scale_codes: tuple[int, int] | None
    top_low: int
    put: Callable[..., None]
    take: Callable[..., None]


@piece
def _to_lane(codes: Ints, start: int, n: int, offset: int, lane: Ints) -> None:
    """The codes of one block to the first lane, where the encoders' pieces look for them."""
    for j in range(n):
        lane[j * LANES] = codes[start + j] + offset


@piece
def _put_affine(
    levels: Bytes, codes: Ints, floats: Floats, out: Bytes, count: int, layout: Layout, put_head: Any, pack: Any
) -> None:
    lane = scratch(np.int32, 32)  # of at most 16 sub-blocks
    for block in range(out.size // layout.nbytes):
        at = block * layout.nbytes
        _to_lane(codes, block * 2 * count, 2 * count, 0, lane)
        put_head(out, at, floats[2 * block], floats[2 * block + 1], lane, 0)
        pack(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _put_q2_k(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_affine(levels, codes, floats, out, 16, Q2, put_head_4, pack_q2)


@kernel
def _put_q4_k(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_affine(levels, codes, floats, out, 8, Q4, put_head_6, pack_q4)


@kernel
def _put_q5_k(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_affine(levels, codes, floats, out, 8, Q5, put_head_6, pack_q5)


@kernel
def _take_q2_k(data: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // Q2.nbytes):
        at = block * Q2.nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + Q2.d), get_half(data, at + Q2.dmin)
        for j in range(16):
            codes[32 * block + j] = np.int32(data[at + Q2.scales + j] & 15)
            codes[32 * block + 16 + j] = np.int32(data[at + Q2.scales + j] >> 4)


@piece
def _take_6(data: Bytes, codes: Ints, floats: Floats, layout: Layout) -> None:
    for block in range(data.size // layout.nbytes):
        at = block * layout.nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + layout.d), get_half(data, at + layout.dmin)
        for j in range(8):
            codes[16 * block + j], codes[16 * block + 8 + j] = get_scales(data, at + layout.scales, j)


@kernel
def _take_q4_k(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_6(data, codes, floats, Q4)


@kernel
def _take_q5_k(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_6(data, codes, floats, Q5)


@kernel
def _put_q3_k(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    lane = scratch(np.int32, 16)
    for block in range(out.size // Q3.nbytes):
        at = block * Q3.nbytes
        _to_lane(codes, block * 32, 16, 32, lane)
        put_scales_3(out, at + Q3.scales, lane, 0)
        put_half(out, at + Q3.d, floats[2 * block])
        pack_q3(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _take_q3_k(data: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // Q3.nbytes):
        at = block * Q3.nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + Q3.d), np.float32(0)
        for j in range(16):
            codes[32 * block + j], codes[32 * block + 16 + j] = get_scale_3(data, at + Q3.scales, j), np.int32(0)


@kernel
def _put_q6_k(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // Q6.nbytes):
        at = block * Q6.nbytes
        for j in range(16):
            out[at + Q6.scales + j] = np.uint8(codes[32 * block + j] & 0xFF)
        put_half(out, at + Q6.d, floats[2 * block])
        pack_q6(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _take_q6_k(data: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // Q6.nbytes):
        at = block * Q6.nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + Q6.d), np.float32(0)
        for j in range(16):
            codes[32 * block + j], codes[32 * block + 16 + j] = np.int32(np.int8(data[at + Q6.scales + j])), np.int32(0)


@kernel
def _put_iq4_xs(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // XS.nbytes):
        at = block * XS.nbytes
        put_half(out, at + XS.d, floats[2 * block])
        top = 0
        for j in range(8):
            code = np.int64(codes[16 * block + j]) + 32
            top |= (code >> 4) << (2 * j)
            nibble = np.uint8((code & 15) << (4 * (j & 1)))
            out[at + XS.scales_l + j // 2] = nibble if j & 1 == 0 else out[at + XS.scales_l + j // 2] | nibble
            low, high = load(levels, block * SUPER + j * QK), load(levels, block * SUPER + j * QK + LANES)
            store(out, at + XS.qs + j * 16, low | (high << splat(4)))
        put_short(out, at + XS.scales_h, top)


@kernel
def _take_iq4_xs(data: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // XS.nbytes):
        at = block * XS.nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + XS.d), np.float32(0)
        top = get_short(data, at + XS.scales_h)
        for j in range(8):
            code = np.int64(get_nibble(data, at + XS.scales_l, j)) | (((top >> (2 * j)) & 3) << 4)
            codes[16 * block + j], codes[16 * block + 8 + j] = np.int32(code - 32), np.int32(0)


@piece
def _put_legacy(levels: Bytes, floats: Floats, out: Bytes, layout: Layout, affine: bool, five: bool) -> None:
    for block in range(out.size // layout.nbytes):
        at = block * layout.nbytes
        put_half(out, at + D, floats[2 * block])
        if affine:
            put_half(out, at + M, floats[2 * block + 1])
        put_levels(out, at + layout.qs, load(levels, block * QK), load(levels, block * QK + LANES), five)


@piece
def _take_legacy(data: Bytes, floats: Floats, layout: Layout, affine: bool) -> None:
    for block in range(data.size // layout.nbytes):
        at = block * layout.nbytes
        floats[2 * block] = get_half(data, at + D)
        floats[2 * block + 1] = get_half(data, at + M) if affine else np.float32(0)


@kernel
def _put_q4_0(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_legacy(levels, floats, out, Q4_0_BYTES, False, False)


@kernel
def _take_q4_0(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_legacy(data, floats, Q4_0_BYTES, False)


@kernel
def _put_q4_1(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_legacy(levels, floats, out, Q4_1_BYTES, True, False)


@kernel
def _take_q4_1(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_legacy(data, floats, Q4_1_BYTES, True)


@kernel
def _put_q5_0(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_legacy(levels, floats, out, Q5_0_BYTES, False, True)


@kernel
def _take_q5_0(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_legacy(data, floats, Q5_0_BYTES, False)


@kernel
def _put_q5_1(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    _put_legacy(levels, floats, out, Q5_1_BYTES, True, True)


@kernel
def _take_q5_1(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_legacy(data, floats, Q5_1_BYTES, True)


@kernel
def _put_q8_0(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // Q8_0_BYTES.nbytes):
        at = block * Q8_0_BYTES.nbytes
        put_half(out, at + Q8_0_BYTES.d, floats[2 * block])
        for i in range(0, QK, LANES):
            store(out, at + Q8_0_BYTES.qs + i, load(levels, block * QK + i) - splat(128))


@kernel
def _take_q8_0(data: Bytes, codes: Ints, floats: Floats) -> None:
    _take_legacy(data, floats, Q8_0_BYTES, False)


@kernel
def _put_mxfp4(levels: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // MX.nbytes):
        at = block * MX.nbytes
        bits = np.int64(float_bits(floats[2 * block]))
        # The two least powers have no exponent of their own in a float32.
        out[at + MX.e] = np.uint8((bits >> 23) + 1 if bits >> 23 else (1 if bits > 0x00200000 else 0))
        store(out, at + MX.qs, load(levels, block * QK) | (load(levels, block * QK + LANES) << splat(4)))


@kernel
def _take_mxfp4(data: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // MX.nbytes):
        code = np.int32(data[block * MX.nbytes + MX.e])
        floats[2 * block], floats[2 * block + 1] = half_power(code), np.float32(0)


def _range(low: int, high: int) -> np.ndarray:
    return np.arange(low, high + 1).astype(np.float32)


@lru_cache
def parts() -> dict[GGMLType, Parts]:
    """The formats that are made of levels, by type."""
    t = GGMLType
    known = [
        Parts(t.Q2_K, 16, _range(0, 3), True, (0, 15), 15, _put_q2_k, _take_q2_k),
        Parts(t.Q3_K, 16, _range(-4, 3), False, (-32, 31), 0, _put_q3_k, _take_q3_k),
        Parts(t.Q4_K, 32, _range(0, 15), True, (0, 63), 63, _put_q4_k, _take_q4_k),
        Parts(t.Q5_K, 32, _range(0, 31), True, (0, 63), 63, _put_q5_k, _take_q5_k),
        Parts(t.Q6_K, 16, _range(-32, 31), False, (-128, 127), 0, _put_q6_k, _take_q6_k),
        Parts(t.IQ4_XS, 32, nonlinear.VALUES, False, (-32, 31), 0, _put_iq4_xs, _take_iq4_xs),
        Parts(t.IQ4_NL, 32, nonlinear.VALUES, False, None, 0, _put_q4_0, _take_q4_0),
        Parts(t.Q4_0, 32, _range(-8, 7), False, None, 0, _put_q4_0, _take_q4_0),
        Parts(t.Q4_1, 32, _range(0, 15), True, None, 0, _put_q4_1, _take_q4_1),
        Parts(t.Q5_0, 32, _range(-16, 15), False, None, 0, _put_q5_0, _take_q5_0),
        Parts(t.Q5_1, 32, _range(0, 31), True, None, 0, _put_q5_1, _take_q5_1),
        Parts(t.Q8_0, 32, _range(-128, 127), False, None, 0, _put_q8_0, _take_q8_0),
        Parts(t.MXFP4, 32, float4.VALUES, False, None, 0, _put_mxfp4, _take_mxfp4),
    ]
    return {each.kind: each for each in known}


@dataclass(frozen=True)
class GridParts:
    """What the blocks of a format with a grid are made of: points of the grid, and signs or shifts.

    A weight is `scale * value`, where `n_sub` consecutive weights share the scale, `float * unit * (code + 0.5)`: the
    block's float and a code from 0 to `top_scale`. With `magnitudes` a value is that of a point's level with one of 8
    signs, of which with `even` an even number are minus. Without, the levels are -1, 0 and 1, and 8 values (with
    `one_shift`, all of a sub-block) are shifted by an eighth, up or down.

    Kernels: `put(points, signs, codes, floats, out)` and `take(data, signs, codes, floats)`. `points` are uint16, the
    index of every group's; `signs` uint8, for every 8 weights: bit i is set for a minus of weight i, or bit 0 for a
    shift down; what `take` leaves there are shifts alone. `codes` are int32, one a sub-block, and `floats` one a block.
    """

    kind: GGMLType
    n_sub: int
    unit: float
    top_scale: int
    magnitudes: np.ndarray | None
    even: bool
    one_shift: bool
    put: Callable[..., None]
    take: Callable[..., None]

    @property
    def grid(self) -> Grid:
        """The grid that the points are of."""
        return grid(GGMLType.IQ1_S if self.kind == GGMLType.IQ1_M else self.kind)


@piece
def _signs_and_scale(signs: Bytes, at: int, code: int) -> int:
    """Seven signs of each of four groups, and a scale of 4 bits."""
    word = np.int64(code) << 28
    for k in range(4):
        word |= np.int64(signs[at + k] & 127) << (7 * k)
    return word


@piece
def _put_nibbles(codes: Ints, first: int, n: int, out: Bytes, at: int) -> None:
    for j in range(0, n, 2):
        out[at + j // 2] = np.uint8(codes[first + j] | (codes[first + j + 1] << 4))


@kernel
def _put_iq2_xxs(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ2_XXS.nbytes):
        at = block * IQ2_XXS.nbytes
        put_half(out, at + IQ2_XXS.d, floats[block])
        for j in range(8):
            for k in range(4):
                out[at + IQ2_XXS.qs + 8 * j + k] = np.uint8(points[32 * block + 4 * j + k])
            put_word(
                out, at + IQ2_XXS.qs + 4 + 8 * j, _signs_and_scale(signs, 32 * block + 4 * j, codes[8 * block + j])
            )


@kernel
def _take_iq2_xxs(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // IQ2_XXS.nbytes):
        floats[block] = get_half(data, block * IQ2_XXS.nbytes + IQ2_XXS.d)
        for j in range(8):
            codes[8 * block + j] = np.int32(
                get_word(data, block * IQ2_XXS.nbytes + IQ2_XXS.qs + 4 + 8 * j) >> np.uint32(28)
            )


@kernel
def _put_iq2_xs(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ2_XS.nbytes):
        at = block * IQ2_XS.nbytes
        put_half(out, at + IQ2_XS.d, floats[block])
        for k in range(32):
            put_short(
                out,
                at + IQ2_XS.qs + 2 * k,
                np.int64(points[32 * block + k]) | (np.int64(signs[32 * block + k] & 127) << 9),
            )
        _put_nibbles(codes, 16 * block, 16, out, at + IQ2_XS.scales)


@piece
def _take_nibbles(data: Bytes, codes: Ints, floats: Floats, layout: Layout, n: int) -> None:
    for block in range(data.size // layout.nbytes):
        floats[block] = get_half(data, block * layout.nbytes + layout.d)
        for j in range(n):
            codes[n * block + j] = get_nibble(data, block * layout.nbytes + layout.scales, j)


@kernel
def _take_iq2_xs(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    _take_nibbles(data, codes, floats, IQ2_XS, 16)


@kernel
def _put_iq2_s(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ2_S.nbytes):
        at = block * IQ2_S.nbytes
        put_half(out, at + IQ2_S.d, floats[block])
        for j in range(8):
            high = np.int64(0)
            for k in range(4):
                point = np.int64(points[32 * block + 4 * j + k])
                out[at + IQ2_S.qs + 4 * j + k] = np.uint8(point & 0xFF)
                out[at + IQ2_S.signs + 4 * j + k] = signs[32 * block + 4 * j + k]
                high |= (point >> 8) << (2 * k)
            out[at + IQ2_S.qh + j] = np.uint8(high)
        _put_nibbles(codes, 16 * block, 16, out, at + IQ2_S.scales)


@kernel
def _take_iq2_s(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    _take_nibbles(data, codes, floats, IQ2_S, 16)


@kernel
def _put_iq3_xxs(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ3_XXS.nbytes):
        at = block * IQ3_XXS.nbytes
        put_half(out, at + IQ3_XXS.d, floats[block])
        for k in range(64):
            out[at + IQ3_XXS.qs + k] = np.uint8(points[64 * block + k])
        for j in range(8):
            put_word(
                out,
                at + IQ3_XXS.scales_and_signs + 4 * j,
                _signs_and_scale(signs, 32 * block + 4 * j, codes[8 * block + j]),
            )


@kernel
def _take_iq3_xxs(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // IQ3_XXS.nbytes):
        floats[block] = get_half(data, block * IQ3_XXS.nbytes + IQ3_XXS.d)
        for j in range(8):
            codes[8 * block + j] = np.int32(
                get_word(data, block * IQ3_XXS.nbytes + IQ3_XXS.scales_and_signs + 4 * j) >> np.uint32(28)
            )


@kernel
def _put_iq3_s(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ3_S.nbytes):
        at = block * IQ3_S.nbytes
        put_half(out, at + IQ3_S.d, floats[block])
        for j in range(8):
            high = np.int64(0)
            for k in range(8):
                point = np.int64(points[64 * block + 8 * j + k])
                out[at + IQ3_S.qs + 8 * j + k] = np.uint8(point & 0xFF)
                high |= (point >> 8) << k
            out[at + IQ3_S.qh + j] = np.uint8(high)
            for k in range(4):
                out[at + IQ3_S.signs + 4 * j + k] = signs[32 * block + 4 * j + k]
        _put_nibbles(codes, 8 * block, 8, out, at + IQ3_S.scales)


@kernel
def _take_iq3_s(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    _take_nibbles(data, codes, floats, IQ3_S, 8)


@kernel
def _put_iq1_s(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ1_S.nbytes):
        at = block * IQ1_S.nbytes
        put_half(out, at + IQ1_S.d, floats[block])
        for j in range(8):
            first = 32 * block + 4 * j
            word = (np.int64(codes[8 * block + j]) | (np.int64(signs[first] & 1) << 3)) << 12
            for k in range(4):
                point = np.int64(points[first + k])
                out[at + IQ1_S.qs + 4 * j + k] = np.uint8(point & 0xFF)
                word |= (point >> 8) << (3 * k)
            put_short(out, at + IQ1_S.qh + 2 * j, word)


@kernel
def _take_iq1_s(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // IQ1_S.nbytes):
        floats[block] = get_half(data, block * IQ1_S.nbytes + IQ1_S.d)
        for j in range(8):
            word = get_short(data, block * IQ1_S.nbytes + IQ1_S.qh + 2 * j)
            codes[8 * block + j] = np.int32((word >> 12) & 7)
            for k in range(4):
                signs[32 * block + 4 * j + k] = np.uint8(word >> 15)


@kernel
def _put_iq1_m(points: Codes, signs: Bytes, codes: Ints, floats: Floats, out: Bytes) -> None:
    for block in range(out.size // IQ1_M.nbytes):
        at = block * IQ1_M.nbytes
        for k in range(0, 32, 2):
            high = np.int64(0)
            for i in range(2):
                point = np.int64(points[32 * block + k + i])
                out[at + IQ1_M.qs + k + i] = np.uint8(point & 0xFF)
                high |= ((point >> 8) | (np.int64(signs[32 * block + k + i] & 1) << 3)) << (4 * i)
            out[at + IQ1_M.qh + k // 2] = np.uint8(high)
        half = np.int64(half_bits(floats[block]))
        for j in range(4):
            word = ((half >> (4 * j)) & 15) << 12
            for i in range(4):
                word |= np.int64(codes[16 * block + 4 * j + i]) << (3 * i)
            put_short(out, at + IQ1_M.scales + 2 * j, word)


@kernel
def _take_iq1_m(data: Bytes, signs: Bytes, codes: Ints, floats: Floats) -> None:
    for block in range(data.size // IQ1_M.nbytes):
        at = block * IQ1_M.nbytes
        half = np.int64(0)
        for j in range(4):
            word = get_short(data, at + IQ1_M.scales + 2 * j)
            half |= (word >> 12) << (4 * j)
            for i in range(4):
                codes[16 * block + 4 * j + i] = np.int32((word >> (3 * i)) & 7)
        floats[block] = half_value(np.uint16(half))
        for k in range(32):
            signs[32 * block + k] = (data[at + IQ1_M.qh + k // 2] >> (4 * (k & 1) + 3)) & 1


@lru_cache
def grid_parts() -> dict[GGMLType, GridParts]:
    """The formats that are made of points of a grid, by type."""
    from gguf import quants

    def magnitudes(kind: GGMLType) -> np.ndarray:
        return np.array(getattr(quants, kind.name).grid_map, np.float32)

    t = GGMLType
    known = [
        GridParts(t.IQ2_XXS, 32, 0.25, 15, magnitudes(t.IQ2_XXS), True, False, _put_iq2_xxs, _take_iq2_xxs),
        GridParts(t.IQ2_XS, 16, 0.25, 15, magnitudes(t.IQ2_XS), True, False, _put_iq2_xs, _take_iq2_xs),
        GridParts(t.IQ2_S, 16, 0.25, 15, magnitudes(t.IQ2_S), False, False, _put_iq2_s, _take_iq2_s),
        GridParts(t.IQ3_XXS, 32, 0.5, 15, magnitudes(t.IQ3_XXS), True, False, _put_iq3_xxs, _take_iq3_xxs),
        GridParts(t.IQ3_S, 32, 2.0, 15, magnitudes(t.IQ3_S), False, False, _put_iq3_s, _take_iq3_s),
        GridParts(t.IQ1_S, 32, 2.0, 7, None, False, True, _put_iq1_s, _take_iq1_s),
        GridParts(t.IQ1_M, 16, 2.0, 7, None, False, False, _put_iq1_m, _take_iq1_m),
    ]
    return {each.kind: each for each in known}
