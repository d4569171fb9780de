"""The K-quants: super-blocks of 256 weights whose sub-blocks have scales of their own, quantized in turn.

Layouts: block_q4_K, block_q5_K, block_q6_K in ggml-common.h. Algorithms: quantize_row_*_ref in ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import Block, kernel, piece
from quantkit.blocks.bytes import get_half, put_half
from quantkit.blocks.lanes import (
    LANES,
    absolute,
    load,
    splat,
    sqrt,
    store,
)
from quantkit.blocks.searches import (
    GROUP_MAX_EPS,
    affine_search,
    clamped_ints,
    gather,
    level_of,
    nearest_int,
    signed_search,
)
from quantkit.blocks.types import GGMLType

SUPER = 256  # weights in a super-block
ZERO = np.float32(0)


@piece
def put_scales(out: Any, at: Any, j: Any, ls: Any, lm: Any) -> None:
    """Pack the 6-bit scale and minimum of sub-block `j` into the 12 bytes at `at`, in order of j (Q4_K, Q5_K)."""
    if j < 4:
        out[at + j] = np.uint8(ls)
        out[at + j + 4] = np.uint8(lm)
    else:
        out[at + j + 4] = np.uint8((ls & 0xF) | ((lm & 0xF) << 4))
        out[at + j - 4] |= np.uint8((ls >> 4) << 6)
        out[at + j] |= np.uint8((lm >> 4) << 6)


@piece
def get_scales(data: Any, at: Any, j: Any) -> Any:
    """The 6-bit scale and minimum of sub-block `j`."""
    if j < 4:
        return np.int32(data[at + j] & 63), np.int32(data[at + j + 4] & 63)
    scale = (data[at + j + 4] & 0xF) | ((data[at + j - 4] >> 6) << 4)
    low = (data[at + j + 4] >> 4) | ((data[at + j] >> 6) << 4)
    return np.int32(scale), np.int32(low)


@piece
def affine_levels(x: Any, at: Any, scale: Any, low: Any, inverse: Any, base: Any, nmax: Any, levels: Any, to: Any) -> None:
    """Round 32 weights with the stored scale and minimum; with a scale of 0 the search's own levels stay."""
    if scale != ZERO:
        for i in range(0, 32, LANES):
            store(levels, to + i, clamped_ints((load(x, at + i) + splat(low)) / splat(scale), 0, nmax))
    else:
        for i in range(32):
            levels[to + i] = level_of(x[at + i], inverse, base, 0, nmax)


@piece
def plain_scales(x: Any, xs: Any, ws: Any, ls: Any, nmax: Any, rmin: Any, nstep: Any, found: Any) -> None:
    """Search scales and minimums of 16 sub-blocks of 32, weighed by their size and their magnitudes."""
    total = splat(ZERO)
    for i in range(32):
        v = load(xs, i * LANES)
        total = total + v * v
    average = sqrt(total / splat(np.float32(32)))
    for i in range(32):
        store(ws, i * LANES, average + absolute(load(xs, i * LANES)))
    scale, low, inverse, base = affine_search(xs, ws, ls, 32, nmax, rmin, np.float32(0.1), nstep, False)
    store(found, 0, scale)
    store(found, LANES, -low)
    store(found, 2 * LANES, inverse)
    store(found, 3 * LANES, base)


@piece
def pack_affine_scales(found: Any, lane: Any, out: Any, at: Any) -> None:
    """Quantize the scales and minimums of one super-block's 8 lanes to 6 bits, and write the 16 bytes of its head."""
    max_scale, max_min = ZERO, ZERO
    for j in range(8):
        max_scale = max(max_scale, found[lane + j])
        max_min = max(max_min, found[LANES + lane + j])
    inv_scale = np.float32(63) / max_scale if max_scale > ZERO else ZERO
    inv_min = np.float32(63) / max_min if max_min > ZERO else ZERO
    put_half(out, at, max_scale / np.float32(63))
    put_half(out, at + 2, max_min / np.float32(63))
    for j in range(8):
        ls = min(63, nearest_int(inv_scale * found[lane + j]) & 0xFF)
        lm = min(63, nearest_int(inv_min * found[LANES + lane + j]) & 0xFF)
        put_scales(out, at + 4, j, ls, lm)


@piece
def encode_affine(x: Any, out: Any, nbytes: Any, nmax: Any, rmin: Any, nstep: Any, pack: Any) -> None:
    """Q4_K and Q5_K: two super-blocks of 8 sub-blocks fill the 16 lanes. `pack(levels, out, at)` lays out the levels."""
    xs = np.empty(32 * LANES, np.float32)
    ws = np.empty(32 * LANES, np.float32)
    ls = np.empty(32 * LANES, np.float32)
    found = np.empty(4 * LANES, np.float32)
    levels = np.empty(SUPER, np.uint8)
    n_blocks = x.size // SUPER
    for first in range(0, n_blocks, 2):
        for half in range(2):
            block = min(first + half, n_blocks - 1)  # the last one of an odd number fills both halves
            gather(x, block * SUPER, 32, 32, xs, half * 8, 8)
        plain_scales(x, xs, ws, ls, nmax, rmin, nstep, found)
        for half in range(min(2, n_blocks - first)):
            at = (first + half) * nbytes
            pack_affine_scales(found, half * 8, out, at)
            d, dmin = get_half(out, at), get_half(out, at + 2)
            for j in range(8):
                scale, low = get_scales(out, at + 4, j)
                lane = half * 8 + j
                affine_levels(
                    x,
                    (first + half) * SUPER + j * 32,
                    d * np.float32(scale),
                    dmin * np.float32(low),
                    found[2 * LANES + lane],
                    found[3 * LANES + lane],
                    nmax,
                    levels,
                    j * 32,
                )
            pack(levels, out, at)


@piece
def pack_q4(levels: Any, out: Any, at: Any) -> None:
    """Two sub-blocks share 32 bytes: the even one in the low nibbles."""
    for pair in range(4):
        for i in range(0, 32, LANES):
            low = load(levels, pair * 64 + i)
            high = load(levels, pair * 64 + 32 + i)
            store(out, at + 16 + pair * 32 + i, low | (high << splat(4)))


@piece
def pack_q5(levels: Any, out: Any, at: Any) -> None:
    """As Q4_K, the fifth bits apart: sub-block j's are bit j of 32 bytes before."""
    for i in range(0, 32, LANES):
        top = splat(0)
        for pair in range(4):
            low = load(levels, pair * 64 + i)
            high = load(levels, pair * 64 + 32 + i)
            store(out, at + 48 + pair * 32 + i, (low & splat(15)) | ((high & splat(15)) << splat(4)))
            top = top | ((low >> splat(4)) << splat(2 * pair)) | ((high >> splat(4)) << splat(2 * pair + 1))
        store(out, at + 16 + i, top)


class Q4_K(Block, type=GGMLType.Q4_K):
    """4 bits with 6-bit scales and minimums for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q4_K_ref."""
        encode_affine(x, out, 144, 15, np.float32(-1), 20, pack_q4)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q4_K."""
        for block in range(out.size // SUPER):
            at = block * 144
            d, dmin = get_half(data, at), get_half(data, at + 2)
            for j in range(8):
                scale, low = get_scales(data, at + 4, j)
                d1, m1 = d * np.float32(scale), dmin * np.float32(low)
                source, to, shift = at + 16 + (j // 2) * 32, block * SUPER + j * 32, (j & 1) * 4
                for i in range(32):
                    out[to + i] = d1 * np.float32((data[source + i] >> shift) & 15) - m1


class Q5_K(Block, type=GGMLType.Q5_K):
    """5 bits with 6-bit scales and minimums for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q5_K_ref."""
        encode_affine(x, out, 176, 31, np.float32(-0.5), 15, pack_q5)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q5_K."""
        for block in range(out.size // SUPER):
            at = block * 176
            d, dmin = get_half(data, at), get_half(data, at + 2)
            for j in range(8):
                scale, low = get_scales(data, at + 4, j)
                d1, m1 = d * np.float32(scale), dmin * np.float32(low)
                source, to, shift = at + 48 + (j // 2) * 32, block * SUPER + j * 32, (j & 1) * 4
                for i in range(32):
                    level = ((data[source + i] >> shift) & 15) + (((data[at + 16 + i] >> j) & 1) << 4)
                    out[to + i] = d1 * np.float32(level) - m1


class Q6_K(Block, type=GGMLType.Q6_K):
    """6 bits with an 8-bit scale for every 16 weights."""

    @staticmethod
    @kernel
    def encode(x: Any, out: Any, n_per_row: Any, weights: Any) -> None:
        """See Block; after quantize_row_q6_K_ref and quantize_row_q6_K_impl."""
        xs = np.empty(16 * LANES, np.float32)
        scales = np.empty(LANES, np.float32)
        inverses = np.empty(LANES, np.float32)
        levels = np.empty(SUPER, np.uint8)
        for block in range(x.size // SUPER):
            start, at = block * SUPER, block * 210
            gather(x, start, 16, 16, xs, 0, LANES)
            scale, inverse = signed_search(xs, None, 16, 32)
            store(scales, 0, scale)
            store(inverses, 0, inverse)
            max_abs, max_scale = ZERO, ZERO
            for j in range(16):
                if abs(scales[j]) > max_abs:
                    max_abs, max_scale = abs(scales[j]), scales[j]
            if max_abs < GROUP_MAX_EPS:
                out[at : at + 210] = 0
                continue
            iscale = np.float32(-128) / max_scale
            put_half(out, at + 208, np.float32(1) / iscale)
            d = get_half(out, at + 208)
            for j in range(16):
                code = min(127, nearest_int(iscale * scales[j]))
                out[at + 192 + j] = np.uint8(code & 0xFF)
                step = d * np.float32(np.int8(code & 0xFF))
                if step != ZERO:
                    store(
                        levels, j * 16, clamped_ints(load(x, start + j * 16) / splat(step), -32, 31) + splat(32)
                    )
                else:
                    for i in range(16):
                        # An all but empty sub-block has levels of 0, not of the middle.
                        level = level_of(x[start + j * 16 + i], inverses[j], ZERO, -32, 31) + 32
                        levels[j * 16 + i] = level if inverses[j] != ZERO else 0
            for half in range(2):
                for i in range(0, 32, LANES):
                    v = half * 128 + i
                    a, b = load(levels, v), load(levels, v + 32)
                    c, e = load(levels, v + 64), load(levels, v + 96)
                    low, four = splat(15), splat(4)
                    store(out, at + half * 64 + i, (a & low) | ((c & low) << four))
                    store(out, at + half * 64 + 32 + i, (b & low) | ((e & low) << four))
                    top = (a >> four) | ((b >> four) << splat(2)) | ((c >> four) << four) | ((e >> four) << splat(6))
                    store(out, at + 128 + half * 32 + i, top)

    @staticmethod
    @kernel
    def decode(data: Any, out: Any) -> None:
        """See Block; after dequantize_row_q6_K."""
        for block in range(out.size // SUPER):
            at = block * 210
            d = get_half(data, at + 208)
            for half in range(2):
                ql, qh, to = at + half * 64, at + 128 + half * 32, block * SUPER + half * 128
                for quarter in range(4):
                    source, shift = ql + (quarter & 1) * 32, (quarter >> 1) * 4
                    for i in range(32):
                        scale = np.float32(np.int8(data[at + 192 + half * 8 + quarter * 2 + i // 16]))
                        top = ((data[qh + i] >> (2 * quarter)) & 3) << 4
                        level = np.float32(np.int32(((data[source + i] >> shift) & 15) | top) - 32)
                        out[to + quarter * 32 + i] = d * scale * level

