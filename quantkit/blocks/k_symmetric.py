"""The K-quants with a scale for each sub-block and no minimum: Q3_K, Q6_K.

Layouts: ggml-common.h. Algorithms: quantize_row_*_ref and quantize_row_*_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import clear, get_half, put_half
from quantkit.blocks.lane_memory import load, part, scratch, store
from quantkit.blocks.lanes import LANES, ZERO, Bytes, F32x16, Floats, Ints, maximum, minimum, select, splat, to_float
from quantkit.blocks.searches import (
    GROUP_MAX_EPS,
    clamped_ints,
    level_of,
    nearest_int,
    nearest_ints,
    peak,
    refined_search,
    signed_search,
    sum_of_squares,
    weigh,
)
from quantkit.blocks.tiles import SUPER, block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

Q3, Q6 = GGMLType.Q3_K.layout, GGMLType.Q6_K.layout


@piece
def code_by_extreme(scales: Floats, codes: Ints) -> F32x16:
    """Quantize 16 scales of each super-block to 0..63 (32 is zero), the scale of largest magnitude to 0 (Q3_K)."""
    zero = splat(ZERO)
    _, extreme = peak(scales, 16)
    some = extreme != zero
    inverse = splat(np.float32(-32)) / extreme
    for j in range(16):
        code = (nearest_ints(inverse * load(scales, j * LANES)) << splat(24)) >> splat(24)
        code = maximum(splat(-32), minimum(splat(31), code)) + splat(32)
        store(codes, j * LANES, select(some, code, splat(0)))
    return select(some, splat(np.float32(1)) / inverse, zero)


@piece
def code_by_search(scales: Floats, sums: Floats, codes: Ints) -> F32x16:
    """The same by a search, each sub-block weighed by the sum of its weights."""
    found = signed_search(scales, sums, 16, 32)
    for j in range(16):
        code = clamped_ints(found.inverse * load(scales, j * LANES), -32, 31) + splat(32)
        store(codes, j * LANES, select(found.empty, splat(0), code))
    return found.scale


@piece
def put_scales_3(out: Bytes, at: int, codes: Ints, lane: int) -> None:
    """Pack 16 scales of 6 bits into 12 bytes: the low nibbles of j and j + 8, then the high pairs of four."""
    for j in range(8):
        low, high = codes[j * LANES + lane], codes[(j + 8) * LANES + lane]
        out[at + j] = np.uint8((low & 15) | ((high & 15) << 4))
    for j in range(4):
        top = 0
        for quarter in range(4):
            top |= (codes[(quarter * 4 + j) * LANES + lane] >> 4) << (2 * quarter)
        out[at + 8 + j] = np.uint8(top)


@piece
def get_scale_3(data: Bytes, at: int, j: int) -> int:
    """The scale of sub-block `j` of Q3_K, -32..31."""
    low = (np.int32(data[at + j % 8]) >> (4 * (j // 8))) & 15
    return np.int32(low | (((np.int32(data[at + 8 + j % 4]) >> (2 * (j // 4))) & 3) << 4)) - np.int32(32)


@piece
def pack_q3(levels: Bytes, out: Bytes, at: int) -> None:
    """The top bits: run j of 32 weights is bit j of 32 bytes. The low pairs: as in Q2_K."""
    three = splat(3)
    for i in range(0, 32, LANES):
        top = splat(0)
        for half in range(2):
            v = half * 128 + i
            low = splat(0)
            for quarter in range(4):
                level = load(levels, v + quarter * 32)
                low = low | ((level & three) << splat(2 * quarter))
                top = top | ((level >> splat(2)) << splat(4 * half + quarter))
            store(out, at + Q3.qs + half * 32 + i, low)
        store(out, at + Q3.hmask + i, top)


class Q3_K(Block, type=GGMLType.Q3_K):
    """3 bits with a 6-bit scale for every 16 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q3_K_ref and quantize_row_q3_K_impl."""
        starts = scratch(np.int64, 1)
        columns = scratch(np.int64, 1)
        xs = scratch(np.float32, SUPER)
        ls = scratch(np.float32, SUPER)  # weights, or what the refined search found
        scales = scratch(np.float32, 16)
        sums = scratch(np.float32, 16)
        inverses = scratch(np.float32, 16)
        codes = scratch(np.int32, 16)
        steps = scratch(np.float32, 1)
        levels = scratch(np.uint8, 16)
        n_blocks = x.size // SUPER
        for first in range(0, n_blocks, LANES):
            used = block_starts(first, n_blocks, SUPER, n_per_row, starts, columns)
            spread(x, starts, 0, SUPER, xs)
            if weights is None:
                for j in range(0, 16, 2):
                    a, b, n = j * 16 * LANES, (j + 1) * 16 * LANES, 16 * LANES
                    scale, other = refined_search(part(xs, a, n), part(xs, b, n), part(ls, a, n), part(ls, b, n), 16, 4)
                    store(scales, j * LANES, scale)
                    store(scales, (j + 1) * LANES, other)
                store(steps, 0, code_by_extreme(scales, codes))
            else:
                sigma = splat(np.float32(2)) * sum_of_squares(xs, SUPER) / splat(np.float32(SUPER))
                for j in range(16):
                    xs_j = part(xs, j * 16 * LANES, 16 * LANES)
                    spread(weights, columns, j * 16, 16, ls)
                    store(sums, j * LANES, weigh(xs_j, ls, 16, sigma))
                    found = signed_search(xs_j, ls, 16, 4)
                    store(scales, j * LANES, found.scale)
                    store(inverses, j * LANES, found.inverse)
                store(steps, 0, code_by_search(scales, sums, codes))
            for lane in range(used):
                at, start = (first + lane) * Q3.nbytes, (first + lane) * SUPER
                put_scales_3(out, at + Q3.scales, codes, lane)
                put_half(out, at + Q3.d, steps[lane])
                d = get_half(out, at + Q3.d)
                for j in range(16):
                    step = d * np.float32(codes[j * LANES + lane] - 32)
                    if step != ZERO:
                        level = clamped_ints(load(x, start + j * 16) / splat(step), -4, 3) + splat(4)
                        store(levels, j * 16, level)
                    elif weights is None:  # the search's own levels stay
                        for i in range(j * 16, (j + 1) * 16):
                            levels[i] = np.uint8(ls[i * LANES + lane])
                    else:
                        keep_levels(x, start, j, inverses[j * LANES + lane], 4, levels)
                pack_q3(levels, out, at)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q3_K."""
        for block in range(out.size // SUPER):
            at = block * Q3.nbytes
            d = get_half(data, at + Q3.d)
            for j in range(16):
                step = d * np.float32(get_scale_3(data, at + Q3.scales, j))
                odd, to = (j & 1) * 16, block * SUPER + j * 16
                high, bit = at + Q3.hmask + odd, j // 2
                low, shift = at + Q3.qs + (j // 8) * 32 + odd, (j // 2 & 3) * 2
                top = ((load(data, high) >> splat(bit)) & splat(1)) << splat(2)
                level = ((load(data, low) >> splat(shift)) & splat(3)) | top
                store(out, to, splat(step) * to_float(level - splat(4)))


@piece
def keep_levels(x: Floats, start: int, j: int, inverse: np.float32, nmax: int, levels: Bytes) -> None:
    """The levels of a signed search for sub-block `j`; an all but empty one has 0, not the middle."""
    for i in range(j * 16, (j + 1) * 16):
        levels[i] = level_of(x[start + i], inverse, ZERO, -nmax, nmax - 1) + nmax if inverse != ZERO else 0


@piece
def pack_q6(levels: Bytes, out: Bytes, at: int) -> None:
    """The low nibbles: runs j and j + 2 of each half share 32 bytes. The high pairs: four runs share 32 bytes."""
    low, four = splat(15), splat(4)
    for half in range(2):
        for i in range(0, 32, LANES):
            v = half * 128 + i
            a, b = load(levels, v), load(levels, v + 32)
            c, e = load(levels, v + 64), load(levels, v + 96)
            store(out, at + Q6.ql + half * 64 + i, (a & low) | ((c & low) << four))
            store(out, at + Q6.ql + half * 64 + 32 + i, (b & low) | ((e & low) << four))
            top = (a >> four) | ((b >> four) << splat(2)) | ((c >> four) << four) | ((e >> four) << splat(6))
            store(out, at + Q6.qh + half * 32 + i, top)


class Q6_K(Block, type=GGMLType.Q6_K):
    """6 bits with an 8-bit scale for every 16 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q6_K_ref and quantize_row_q6_K_impl. The 16 lanes hold one super-block."""
        starts = scratch(np.int64, 1)
        columns = scratch(np.int64, 1)
        xs = scratch(np.float32, 16)
        ws = scratch(np.float32, 16)
        scales = scratch(np.float32, 1)
        inverses = scratch(np.float32, 1)
        levels = scratch(np.uint8, 16)
        for block in range(x.size // SUPER):
            start, at = block * SUPER, block * Q6.nbytes
            for j in range(16):
                starts[j] = start + j * 16
                columns[j] = start % n_per_row + j * 16
            spread(x, starts, 0, 16, xs)
            if weights is None:
                found = signed_search(xs, None, 16, 32)
            else:
                spread(weights, columns, 0, 16, ws)
                found = signed_search(xs, ws, 16, 32)
            store(scales, 0, found.scale)
            store(inverses, 0, found.inverse)
            max_abs, max_scale = ZERO, ZERO
            for j in range(16):
                if abs(scales[j]) > max_abs:
                    max_abs, max_scale = abs(scales[j]), scales[j]
            if max_abs < GROUP_MAX_EPS:
                clear(out, at, Q6.nbytes)
                continue
            iscale = np.float32(-128) / max_scale
            put_half(out, at + Q6.d, np.float32(1) / iscale)
            d = get_half(out, at + Q6.d)
            for j in range(16):
                code = minimum(np.int32(127), nearest_int(iscale * scales[j]))
                out[at + Q6.scales + j] = np.uint8(code & 0xFF)
                step = d * np.float32(np.int8(code & 0xFF))
                if step != ZERO:
                    level = clamped_ints(load(x, start + j * 16) / splat(step), -32, 31) + splat(32)
                    store(levels, j * 16, level)
                else:
                    keep_levels(x, start, j, inverses[j], 32, levels)
            pack_q6(levels, out, at)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q6_K."""
        for block in range(out.size // SUPER):
            at = block * Q6.nbytes
            d = get_half(data, at + Q6.d)
            for j in range(16):
                half, quarter, odd = j // 8, j // 2 & 3, j & 1
                step = d * np.float32(np.int8(data[at + Q6.scales + j]))
                low = at + Q6.ql + half * 64 + (quarter & 1) * 32 + odd * 16
                high = at + Q6.qh + half * 32 + odd * 16
                top = ((load(data, high) >> splat(2 * quarter)) & splat(3)) << splat(4)
                level = ((load(data, low) >> splat(quarter // 2 * 4)) & splat(15)) | top
                store(out, block * SUPER + j * 16, splat(step) * to_float(level - splat(32)))
