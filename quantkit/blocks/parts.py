"""Blocks taken apart and put together: what the encoders' searches settle, for those that settle it otherwise.

A block of levels holds, for every weight, the index of a value, and for every sub-block a scale and perhaps a minimum.
`put` writes a block from these parts and `take` reads its scales back; an encoder is a search for the parts and then a
`put`. The layouts themselves are those of the pieces that the encoders use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.blocks import float4, nonlinear
from quantkit.blocks.bytes import get_half, get_nibble, get_short, put_half, put_short
from quantkit.blocks.float4 import half_power
from quantkit.blocks.k_affine import get_scales, pack_q2, pack_q4, pack_q5, put_head_4, put_head_6
from quantkit.blocks.k_symmetric import get_scale_3, pack_q3, pack_q6, put_scales_3
from quantkit.blocks.lane_memory import load, store
from quantkit.blocks.lanes import LANES, float_bits, splat
from quantkit.blocks.legacy import put_levels
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

QK = 32


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
def _to_lane(codes: Any, start: Any, n: Any, offset: Any, lane: Any) -> None:
    """The codes of one block to the first lane, where the encoders' pieces look for them."""
    for j in range(n):
        lane[j * LANES] = codes[start + j] + offset


@piece
def _put_affine(
    levels: Any, codes: Any, floats: Any, out: Any, count: Any, nbytes: Any, put_head: Any, pack: Any
) -> None:
    lane = np.empty(2 * count * LANES, np.int32)
    for block in range(out.size // nbytes):
        at = block * nbytes
        _to_lane(codes, block * 2 * count, 2 * count, 0, lane)
        put_head(out, at, floats[2 * block], floats[2 * block + 1], lane, 0)
        pack(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _put_q2_k(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_affine(levels, codes, floats, out, 16, 84, put_head_4, pack_q2)


@kernel
def _put_q4_k(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_affine(levels, codes, floats, out, 8, 144, put_head_6, pack_q4)


@kernel
def _put_q5_k(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_affine(levels, codes, floats, out, 8, 176, put_head_6, pack_q5)


@kernel
def _take_q2_k(data: Any, codes: Any, floats: Any) -> None:
    for block in range(data.size // 84):
        at = block * 84
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + 80), get_half(data, at + 82)
        for j in range(16):
            codes[32 * block + j] = np.int32(data[at + j] & 15)
            codes[32 * block + 16 + j] = np.int32(data[at + j] >> 4)


@piece
def _take_6(data: Any, codes: Any, floats: Any, nbytes: Any) -> None:
    for block in range(data.size // nbytes):
        at = block * nbytes
        floats[2 * block], floats[2 * block + 1] = get_half(data, at), get_half(data, at + 2)
        for j in range(8):
            codes[16 * block + j], codes[16 * block + 8 + j] = get_scales(data, at + 4, j)


@kernel
def _take_q4_k(data: Any, codes: Any, floats: Any) -> None:
    _take_6(data, codes, floats, 144)


@kernel
def _take_q5_k(data: Any, codes: Any, floats: Any) -> None:
    _take_6(data, codes, floats, 176)


@kernel
def _put_q3_k(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    lane = np.empty(16 * LANES, np.int32)
    for block in range(out.size // 110):
        at = block * 110
        _to_lane(codes, block * 32, 16, 32, lane)
        put_scales_3(out, at + 96, lane, 0)
        put_half(out, at + 108, floats[2 * block])
        pack_q3(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _take_q3_k(data: Any, codes: Any, floats: Any) -> None:
    for block in range(data.size // 110):
        at = block * 110
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + 108), np.float32(0)
        for j in range(16):
            codes[32 * block + j], codes[32 * block + 16 + j] = get_scale_3(data, at + 96, j), np.int32(0)


@kernel
def _put_q6_k(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    for block in range(out.size // 210):
        at = block * 210
        for j in range(16):
            out[at + 192 + j] = np.uint8(codes[32 * block + j] & 0xFF)
        put_half(out, at + 208, floats[2 * block])
        pack_q6(levels[block * SUPER : (block + 1) * SUPER], out, at)


@kernel
def _take_q6_k(data: Any, codes: Any, floats: Any) -> None:
    for block in range(data.size // 210):
        at = block * 210
        floats[2 * block], floats[2 * block + 1] = get_half(data, at + 208), np.float32(0)
        for j in range(16):
            codes[32 * block + j], codes[32 * block + 16 + j] = np.int32(np.int8(data[at + 192 + j])), np.int32(0)


@kernel
def _put_iq4_xs(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    for block in range(out.size // 136):
        at = block * 136
        put_half(out, at, floats[2 * block])
        top = 0
        for j in range(8):
            code = np.int64(codes[16 * block + j]) + 32
            top |= (code >> 4) << (2 * j)
            nibble = np.uint8((code & 15) << (4 * (j & 1)))
            out[at + 4 + j // 2] = nibble if j & 1 == 0 else out[at + 4 + j // 2] | nibble
            low, high = load(levels, block * SUPER + j * QK), load(levels, block * SUPER + j * QK + LANES)
            store(out, at + 8 + j * 16, low | (high << splat(4)))
        put_short(out, at + 2, top)


@kernel
def _take_iq4_xs(data: Any, codes: Any, floats: Any) -> None:
    for block in range(data.size // 136):
        at = block * 136
        floats[2 * block], floats[2 * block + 1] = get_half(data, at), np.float32(0)
        top = get_short(data, at + 2)
        for j in range(8):
            code = np.int64(get_nibble(data, at + 4, j)) | (((top >> (2 * j)) & 3) << 4)
            codes[16 * block + j], codes[16 * block + 8 + j] = np.int32(code - 32), np.int32(0)


@piece
def _put_legacy(levels: Any, floats: Any, out: Any, nbytes: Any, affine: Any, five: Any) -> None:
    for block in range(out.size // nbytes):
        at = block * nbytes
        put_half(out, at, floats[2 * block])
        at += 2
        if affine:
            put_half(out, at, floats[2 * block + 1])
            at += 2
        put_levels(out, at, load(levels, block * QK), load(levels, block * QK + LANES), five)


@piece
def _take_legacy(data: Any, floats: Any, nbytes: Any, affine: Any) -> None:
    for block in range(data.size // nbytes):
        at = block * nbytes
        floats[2 * block] = get_half(data, at)
        floats[2 * block + 1] = get_half(data, at + 2) if affine else np.float32(0)


@kernel
def _put_q4_0(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_legacy(levels, floats, out, 18, False, False)


@kernel
def _take_q4_0(data: Any, codes: Any, floats: Any) -> None:
    _take_legacy(data, floats, 18, False)


@kernel
def _put_q4_1(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_legacy(levels, floats, out, 20, True, False)


@kernel
def _take_q4_1(data: Any, codes: Any, floats: Any) -> None:
    _take_legacy(data, floats, 20, True)


@kernel
def _put_q5_0(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_legacy(levels, floats, out, 22, False, True)


@kernel
def _take_q5_0(data: Any, codes: Any, floats: Any) -> None:
    _take_legacy(data, floats, 22, False)


@kernel
def _put_q5_1(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    _put_legacy(levels, floats, out, 24, True, True)


@kernel
def _take_q5_1(data: Any, codes: Any, floats: Any) -> None:
    _take_legacy(data, floats, 24, True)


@kernel
def _put_q8_0(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    for block in range(out.size // 34):
        at = block * 34
        put_half(out, at, floats[2 * block])
        for i in range(0, QK, LANES):
            store(out, at + 2 + i, load(levels, block * QK + i) - splat(128))


@kernel
def _take_q8_0(data: Any, codes: Any, floats: Any) -> None:
    _take_legacy(data, floats, 34, False)


@kernel
def _put_mxfp4(levels: Any, codes: Any, floats: Any, out: Any) -> None:
    for block in range(out.size // 17):
        at = block * 17
        bits = np.int64(float_bits(floats[2 * block]))
        # The two least powers have no exponent of their own in a float32.
        out[at] = np.uint8((bits >> 23) + 1 if bits >> 23 else (1 if bits > 0x00200000 else 0))
        store(out, at + 1, load(levels, block * QK) | (load(levels, block * QK + LANES) << splat(4)))


@kernel
def _take_mxfp4(data: Any, codes: Any, floats: Any) -> None:
    for block in range(data.size // 17):
        floats[2 * block], floats[2 * block + 1] = half_power(np.int32(data[17 * block])), np.float32(0)


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
