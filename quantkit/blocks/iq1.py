"""IQ1_S and IQ1_M: groups of 8 weights of three levels -1, 0, 1, all shifted up or down by an eighth.

Layouts: block_iq1_s and block_iq1_m in ggml-common.h. Algorithms: quantize_row_iq1_*_impl in ggml-quants.c. The best
levels put the smallest weights of a sub-block at -1 and the largest at 1, so sorting the weights and trying every pair
of borders finds them. Here each lane has a sub-block. The reference sorts with C's qsort, which leaves the order of
equal weights to the C library. Ours is that of glibc, whose qsort is a merge sort: equal weights stay in order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantkit.blocks.bytes import clear, get_half, get_short, put_half, put_short
from quantkit.blocks.grid_searches import Tile, most_of, nearest_point, scale_code, square_terms, take_tile
from quantkit.blocks.grids import Grid, GridBlock
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ONE,
    ZERO,
    Bytes,
    F32x16,
    Floats,
    I32x16,
    Ints,
    Mask16,
    Shorts,
    absolute,
    bits,
    half_bits,
    half_value,
    lane_numbers,
    maximum,
    minimum,
    select,
    splat,
    to_float,
)
from quantkit.blocks.tiles import SUPER
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

S, M = GGMLType.IQ1_S.layout, GGMLType.IQ1_M.layout
DELTA = np.float32(0.125)
# The six levels: shifted up, and shifted down.
UP0, UP1, UP2 = np.float32(-0.875), np.float32(0.125), np.float32(1.125)
DOWN0, DOWN1, DOWN2 = np.float32(-1.125), np.float32(-0.125), np.float32(0.875)
LOWEST = np.float32(np.finfo(np.float32).min)
GROUP_MAX_EPS_IQ1_S = np.float32(1e-12)
GROUP_MAX_EPS_IQ1_M = np.float32(1e-7)
MIDDLE = 0xAAAA  # the code whose levels are all 2: minus a code, it is that of the negated weights


class Sorted(NamedTuple):
    """The `n` weights of each lane in order of size, the importance of each, and where it was."""

    n: int
    xs: Floats
    ws: Floats
    order: Ints


class Replaced(NamedTuple):
    """What grid points are chosen with and become, in each lane.

    `codes` are of the groups, one after another; `shifts` are an eighth or minus that: `shift_step` is 16 where each
    group has its own and 0 where all share the first; `tables` is scratch.
    """

    codes: Ints
    scales: Floats
    shifts: Floats
    shift_step: int
    tables: Floats


@piece
def _sort(tile: Tile, result: Sorted) -> None:
    """Sort the weights of each lane, their importance with them, by Batcher's network.

    Equal weights stay in order, because positions are compared as well.
    """
    n, xs, ws, order = result.n, result.xs, result.ws, result.order
    for i in range(n):
        store(xs, i * LANES, load(tile.xs, i * LANES))
        store(ws, i * LANES, load(tile.ws, i * LANES))
        store(order, i * LANES, splat(i))
    size = 1
    while size < n:
        gap = size
        while gap >= 1:
            for start in range(gap % size, n - gap, 2 * gap):
                for at in range(start, minimum(start + gap, n - gap)):
                    if at // (2 * size) != (at + gap) // (2 * size):
                        continue
                    low, high = at * LANES, (at + gap) * LANES
                    xa, xb = load(xs, low), load(xs, high)
                    wa, wb = load(ws, low), load(ws, high)
                    ia, ib = load(order, low), load(order, high)
                    swap = (xa > xb) | ((xa == xb) & (ia > ib))
                    store(xs, low, select(swap, xb, xa))
                    store(xs, high, select(swap, xa, xb))
                    store(ws, low, select(swap, wb, wa))
                    store(ws, high, select(swap, wa, wb))
                    store(order, low, select(swap, ib, ia))
                    store(order, high, select(swap, ia, ib))
            gap //= 2
        size *= 2


@piece
def _collect_codes(by_size: Sorted, border1: I32x16, border2: I32x16, negative: Mask16, codes: Ints) -> None:
    """The codes of the groups, from the borders between levels in sorted order; negated in `negative` lanes."""
    for k in range(by_size.n // 8):
        code = splat(0)
        for i in range(by_size.n):
            position = load(by_size.order, i * LANES)
            level = select(splat(i) < border1, splat(0), select(splat(i) < border2, splat(1), splat(2)))
            mine = (position >> splat(3)) == splat(k)
            code = code | select(mine, level << ((position & splat(7)) << splat(1)), splat(0))
        store(codes, k * LANES, select(negative, splat(MIDDLE) - code, code))


@piece
def _replace_by_points(found: Replaced, tile: Tile, grid: Grid) -> Mask16:
    """Replace the codes that are no grid points by the nearest neighbours. Returns the lanes where that happened."""
    lanes = 0
    levels = to_float((lane_numbers() & splat(3)) - splat(1))
    for k in range(tile.n // 8):
        for lane in range(LANES):
            place = grid.where[found.codes[k * LANES + lane]]
            if place >= 0:
                shift = splat(found.shifts[k * found.shift_step + lane])
                square_terms(tile.xs, tile.ws, 8 * k, lane, found.scales[lane], levels + shift, found.tables, 8)
                code, _ = nearest_point(grid.lists, place, found.tables, 8, 2)
                found.codes[k * LANES + lane] = code
                lanes |= 1 << lane
    return ((splat(lanes) >> lane_numbers()) & splat(1)) == splat(1)


@piece
def _level(code: I32x16, i: int, shift: F32x16) -> F32x16:
    """The level of weight `i` of a group: -1, 0 or 1, shifted."""
    return to_float(((code >> splat(2 * i)) & splat(3)) - splat(1)) + shift


@piece
def _refit(found: Replaced, tile: Tile, moved: Mask16, scale: F32x16) -> F32x16:
    """The best scale for the codes, in the lanes `moved` and where it is positive; elsewhere `scale`."""
    zero = splat(ZERO)
    sum_qx, sum_q2 = zero, zero
    for k in range(tile.n // 8):
        code = load(found.codes, k * LANES)
        shift = load(found.shifts, k * found.shift_step)
        for i in range(8):
            q = _level(code, i, shift)
            w = load(tile.ws, (8 * k + i) * LANES)
            sum_qx = sum_qx + w * q * load(tile.xs, (8 * k + i) * LANES)
            sum_q2 = sum_q2 + w * q * q
    return select(moved & (sum_qx > zero) & (sum_q2 > zero), sum_qx / sum_q2, scale)


@piece
def _take_points(found: Replaced, tile: Tile, grid: Grid, scale: F32x16, empty: Mask16) -> None:
    """Replace codes by grid points and scales by those that fit them; empty lanes become zero."""
    store(found.scales, 0, scale)
    moved = _replace_by_points(found, tile, grid)
    store(found.scales, 0, select(empty, splat(ZERO), _refit(found, tile, moved, scale)))
    for k in range(tile.n // 8):
        store(found.codes, k * LANES, select(empty, splat(0), load(found.codes, k * LANES)))


@piece
def _largest_magnitude(tile: Tile) -> F32x16:
    largest = absolute(load(tile.xs, 0))
    for i in range(1, tile.n):
        largest = maximum(largest, absolute(load(tile.xs, i * LANES)))
    return largest


@piece
def _split_s(
    by_size: Sorted, largest: F32x16, px: Floats, pw: Floats, up: Floats, down: Floats
) -> tuple[F32x16, F32x16, I32x16, I32x16]:
    """The best borders of a sub-block, with the scale and shift that they are best with. A shift of 0: none fit.

    `px` and `pw` are scratch for prefix sums, `up` and `down` for what lies beyond a border.
    """
    zero, n = splat(ZERO), by_size.n
    store(px, 0, zero)
    store(pw, 0, zero)
    for i in range(n):
        w = load(by_size.ws, i * LANES)
        store(px, (i + 1) * LANES, load(px, i * LANES) + w * load(by_size.xs, i * LANES))
        store(pw, (i + 1) * LANES, load(pw, i * LANES) + w)
    all_x, all_w = load(px, n * LANES), load(pw, n * LANES)
    for i in range(n + 1):
        rest_x, rest_w = all_x - load(px, i * LANES), all_w - load(pw, i * LANES)
        store(up, 2 * i * LANES, rest_x * splat(UP2))
        store(up, (2 * i + 1) * LANES, rest_w * splat(UP2) * splat(UP2))
        store(down, 2 * i * LANES, rest_x * splat(DOWN2))
        store(down, (2 * i + 1) * LANES, rest_w * splat(DOWN2) * splat(DOWN2))
    best, scale = splat(LOWEST), largest
    border1, border2, shift = splat(0), splat(0), zero
    for i in range(n + 1):
        left_x, left_w = load(px, i * LANES), load(pw, i * LANES)
        up_x, up_w = left_x * splat(UP0), left_w * splat(UP0) * splat(UP0)
        down_x, down_w = left_x * splat(DOWN0), left_w * splat(DOWN0) * splat(DOWN0)
        for j in range(i, n + 1):
            # The middle level is an eighth, or minus that: the products differ in sign only.
            middle_x = (load(px, j * LANES) - left_x) * splat(UP1)
            middle_w = (load(pw, j * LANES) - left_w) * splat(UP1) * splat(UP1)
            qx = up_x + middle_x + load(up, 2 * j * LANES)
            q2 = up_w + middle_w + load(up, (2 * j + 1) * LANES)
            qx_down = down_x - middle_x + load(down, 2 * j * LANES)
            q2_down = down_w + middle_w + load(down, (2 * j + 1) * LANES)
            better = (q2 > zero) & (qx * qx > best * q2)
            # If the first shift is no better in any lane, `best` stands, and this is the second shift's answer.
            better_down = (q2_down > zero) & (qx_down * qx_down > best * q2_down)
            if bits(better | better_down):
                this_scale = qx / q2
                scale = select(better, this_scale, scale)
                best = select(better, this_scale * qx, best)
                shift = select(better, splat(DELTA), shift)
                better_down = (q2_down > zero) & (qx_down * qx_down > best * q2_down)
                this_scale = qx_down / q2_down
                scale = select(better_down, this_scale, scale)
                best = select(better_down, this_scale * qx_down, best)
                shift = select(better_down, splat(-DELTA), shift)
                border1 = select(better | better_down, splat(i), border1)
                border2 = select(better | better_down, splat(j), border2)
    return scale, shift, border1, border2


@piece
def _put_s(out: Bytes, block: int, lane: int, found: Replaced, index: Shorts) -> None:
    at = block * S.nbytes
    most = most_of(found.scales, lane, 8)
    step = most / np.float32(15)
    inverse = ONE / step
    put_half(out, at + S.d, step * np.float32(1.125))
    for j in range(8):
        word = np.int32(0)
        for k in range(4):
            point = np.int32(index[found.codes[k * LANES + lane + j]])
            out[at + S.qs + 4 * j + k] = np.uint8(point & 0xFF)
            word |= (point >> 8) << np.int32(3 * k)
        if most != ZERO:
            code = scale_code(found.scales[lane + j], inverse, 7)
            word |= (code | (8 if found.shifts[lane + j] < ZERO else 0)) << 12
        put_short(out, at + S.qh + 2 * j, word)


@kernel
def _encode_s(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    """Two super-blocks of 8 sub-blocks fill the lanes."""
    tile = Tile(
        32, False, scratch(np.float32, 32), scratch(np.float32, 32), scratch(np.float32, 1), scratch(np.int32, 1),
        scratch(np.int32, 1), scratch(np.int64, 1), scratch(np.int64, 1), scratch(np.float32, 1),
    )  # fmt: skip
    by_size = Sorted(32, scratch(np.float32, 32), scratch(np.float32, 32), scratch(np.int32, 32))
    px, pw, up, down = (
        scratch(np.float32, 33), scratch(np.float32, 33), scratch(np.float32, 66), scratch(np.float32, 66)
    )  # fmt: skip
    found = Replaced(
        scratch(np.int32, 4), scratch(np.float32, 1), scratch(np.float32, 1), 0, scratch(np.float32, 5)
    )  # fmt: skip
    for first in range(0, x.size // SUPER, 2):
        count = take_tile(x, first, n_per_row, weights, np.float32(2), ZERO, tile)
        largest = _largest_magnitude(tile)
        _sort(tile, by_size)
        scale, shift, border1, border2 = _split_s(by_size, largest, px, pw, up, down)
        empty = (largest < splat(GROUP_MAX_EPS_IQ1_S)) | (shift == splat(ZERO))
        negative = scale < splat(ZERO)
        _collect_codes(by_size, border1, border2, negative, found.codes)
        store(found.shifts, 0, select(negative, -shift, shift))
        _take_points(found, tile, grid, select(negative, -scale, scale), empty)
        store(found.shifts, 0, select(empty, splat(DELTA), load(found.shifts, 0)))
        for half in range(count):
            _put_s(out, first + half, 8 * half, found, grid.index_of)


@piece
def _split_m(
    by_size: Sorted, largest: F32x16, px: Floats, pw: Floats, tails: Floats
) -> tuple[F32x16, I32x16, I32x16, I32x16]:
    """As `_split_s`, where each half of the sub-block has a shift of its own: four choices, in order of their number.

    The number is -1 where none fit, else 2 if the first half is shifted down, plus 1 if the second one is. `px` and
    `pw` are prefix sums of both halves in turn.
    """
    zero, n = splat(ZERO), by_size.n
    for half in range(2):
        store(px, half * LANES, zero)
        store(pw, half * LANES, zero)
        for i in range(n):
            mine = (load(by_size.order, i * LANES) >> splat(3)) == splat(half)
            w = load(by_size.ws, i * LANES)
            old, to = (2 * i + half) * LANES, (2 * i + 2 + half) * LANES
            store(px, to, select(mine, load(px, old) + w * load(by_size.xs, i * LANES), load(px, old)))
            store(pw, to, select(mine, load(pw, old) + w, load(pw, old)))
    # What a weight beyond each border adds to the sum of w*q*q: differences of squared levels.
    up_first, up_second = splat(UP0 * UP0 - UP1 * UP1), splat(UP1 * UP1 - UP2 * UP2)
    down_first, down_second = splat(DOWN0 * DOWN0 - DOWN1 * DOWN1), splat(DOWN1 * DOWN1 - DOWN2 * DOWN2)
    for i in range(n + 1):
        for half in range(2):
            w = load(pw, (2 * i + half) * LANES)
            store(tails, (4 * i + half) * LANES, w * up_second)
            store(tails, (4 * i + 2 + half) * LANES, w * down_second)
    x0, x1 = load(px, 2 * n * LANES), load(px, (2 * n + 1) * LANES)
    w0, w1 = load(pw, 2 * n * LANES), load(pw, (2 * n + 1) * LANES)
    up_x0, up_x1 = x0 * splat(UP2), x1 * splat(UP2)
    down_x0, down_x1 = x0 * splat(DOWN2), x1 * splat(DOWN2)
    up_w0, up_w1 = w0 * splat(UP2) * splat(UP2), w1 * splat(UP2) * splat(UP2)
    down_w0, down_w1 = w0 * splat(DOWN2) * splat(DOWN2), w1 * splat(DOWN2) * splat(DOWN2)
    best, scale = splat(LOWEST), largest
    border1, border2, choice = splat(0), splat(0), splat(-1)
    for i in range(n + 1):
        left_x0, left_x1 = load(px, 2 * i * LANES), load(px, (2 * i + 1) * LANES)
        left_w0, left_w1 = load(pw, 2 * i * LANES), load(pw, (2 * i + 1) * LANES)
        head_up0, head_up1 = up_w0 + left_w0 * up_first, up_w1 + left_w1 * up_first
        head_down0, head_down1 = down_w0 + left_w0 * down_first, down_w1 + left_w1 * down_first
        for j in range(i, n + 1):
            sum0 = left_x0 + load(px, 2 * j * LANES)
            sum1 = left_x1 + load(px, (2 * j + 1) * LANES)
            qx_up0, qx_up1 = up_x0 - sum0, up_x1 - sum1
            qx_down0, qx_down1 = down_x0 - sum0, down_x1 - sum1
            q2_up0, q2_up1 = head_up0 + load(tails, 4 * j * LANES), head_up1 + load(tails, (4 * j + 1) * LANES)
            q2_down0 = head_down0 + load(tails, (4 * j + 2) * LANES)
            q2_down1 = head_down1 + load(tails, (4 * j + 3) * LANES)
            qx, q2 = qx_up0 + qx_up1, q2_up0 + q2_up1
            better = (q2 > zero) & (qx * qx > best * q2)
            qx, q2 = qx_up0 + qx_down1, q2_up0 + q2_down1
            better = better | ((q2 > zero) & (qx * qx > best * q2))
            qx, q2 = qx_down0 + qx_up1, q2_down0 + q2_up1
            better = better | ((q2 > zero) & (qx * qx > best * q2))
            qx, q2 = qx_down0 + qx_down1, q2_down0 + q2_down1
            better = better | ((q2 > zero) & (qx * qx > best * q2))
            if bits(better):  # rare: so take the four in order
                for k in range(4):
                    qx = (qx_up0 if k < 2 else qx_down0) + (qx_up1 if k % 2 == 0 else qx_down1)
                    q2 = (q2_up0 if k < 2 else q2_down0) + (q2_up1 if k % 2 == 0 else q2_down1)
                    better = (q2 > zero) & (qx * qx > best * q2)
                    this_scale = qx / q2
                    scale = select(better, this_scale, scale)
                    best = select(better, this_scale * qx, best)
                    choice = select(better, splat(k), choice)
                    border1 = select(better, splat(i), border1)
                    border2 = select(better, splat(j), border2)
    return scale, choice, border1, border2


@piece
def _fitted_step(
    codes: Ints, scales: Ints, shifts: Floats, tile: Tile, by_size: Sorted, step: np.float32
) -> np.float32:
    """The scale of a super-block that fits best what the others have become, one weight after another; else `step`.

    `by_size` is free to be scratch.
    """
    factor = to_float((load(scales, 0) << splat(1)) + splat(1))
    for k in range(2):
        code, shift = load(codes, k * LANES), load(shifts, k * LANES)
        for i in range(8):
            to = (8 * k + i) * LANES
            q = _level(code, i, shift) * factor
            weighted = load(tile.ws, to) * q
            store(by_size.xs, to, weighted * load(tile.xs, to))
            store(by_size.ws, to, weighted * q)
    sum_qx, sum_q2 = ZERO, ZERO
    for j in range(LANES):
        for i in range(16):
            sum_qx += by_size.xs[i * LANES + j]
            sum_q2 += by_size.ws[i * LANES + j]
    return sum_qx / sum_q2 if sum_q2 > ZERO else step


@piece
def _put_m(out: Bytes, block: int, tile: Tile, by_size: Sorted, found: Replaced, scales: Ints, index: Shorts) -> None:
    at = block * M.nbytes
    most = most_of(found.scales, 0, 16)
    step = most / np.float32(15)
    inverse = ONE / step
    for j in range(LANES):
        scales[j] = scale_code(found.scales[j], inverse, 7)
        a, b = np.int32(index[found.codes[j]]), np.int32(index[found.codes[LANES + j]])
        out[at + M.qs + 2 * j] = np.uint8(a & 0xFF)
        out[at + M.qs + 2 * j + 1] = np.uint8(b & 0xFF)
        high = (a >> 8) | ((b >> 8) << 4)
        if most != ZERO:
            high |= (8 if found.shifts[j] < ZERO else 0) | (0x80 if found.shifts[LANES + j] < ZERO else 0)
        out[at + M.qh + j] = np.uint8(high)
    if most == ZERO:
        clear(out, at + M.scales, M.nbytes - M.scales)
        return
    # The float16 of the super-block lies in the highest four bits of four words, of which the others are the scales.
    half = np.int64(
        half_bits(_fitted_step(found.codes, scales, found.shifts, tile, by_size, step) * np.float32(1.1125))
    )
    for j in range(4):
        word = ((half >> (4 * j)) & 15) << 12
        for i in range(4):
            word |= np.int64(scales[4 * j + i]) << (3 * i)
        put_short(out, at + M.scales + 2 * j, word)


@kernel
def _encode_m(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid) -> None:
    """One super-block's 16 sub-blocks fill the lanes."""
    tile = Tile(
        16, False, scratch(np.float32, 16), scratch(np.float32, 16), scratch(np.float32, 1), scratch(np.int32, 1),
        scratch(np.int32, 1), scratch(np.int64, 1), scratch(np.int64, 1), scratch(np.float32, 1),
    )  # fmt: skip
    by_size = Sorted(16, scratch(np.float32, 16), scratch(np.float32, 16), scratch(np.int32, 16))
    px, pw, tails = scratch(np.float32, 34), scratch(np.float32, 34), scratch(np.float32, 68)
    found = Replaced(
        scratch(np.int32, 2), scratch(np.float32, 1), scratch(np.float32, 2), LANES, scratch(np.float32, 5)
    )  # fmt: skip
    scales = scratch(np.int32, 1)
    for block in range(x.size // SUPER):
        take_tile(x, block, n_per_row, weights, np.float32(2), ZERO, tile)
        largest = _largest_magnitude(tile)
        _sort(tile, by_size)
        scale, choice, border1, border2 = _split_m(by_size, largest, px, pw, tails)
        empty = (largest < splat(GROUP_MAX_EPS_IQ1_M)) | (choice < splat(0))
        negative = scale < splat(ZERO)
        _collect_codes(by_size, border1, border2, negative, found.codes)
        choice = select(empty, splat(0), select(negative, splat(3) - choice, choice))
        store(found.shifts, 0, select(choice < splat(2), splat(DELTA), splat(-DELTA)))
        store(found.shifts, LANES, select((choice & splat(1)) == splat(0), splat(DELTA), splat(-DELTA)))
        _take_points(found, tile, grid, select(negative, -scale, scale), empty)
        _put_m(out, block, tile, by_size, found, scales, grid.index_of)


@piece
def _put_group(out: Floats, to: int, scale: np.float32, values: Floats, point: int, down: int) -> None:
    """Decode one group: the scale, times the point's values shifted up, or down."""
    shift = -DELTA if down else DELTA
    for i in range(8):
        out[to + i] = scale * (values[point * 8 + i] + shift)


@kernel
def _decode_s(data: Bytes, out: Floats, values: Floats) -> None:
    for block in range(out.size // SUPER):
        at = block * S.nbytes
        d = get_half(data, at + S.d)
        for j in range(8):
            word = get_short(data, at + S.qh + 2 * j)
            scale = d * np.float32(2 * ((word >> 12) & 7) + 1)
            for k in range(4):
                point = np.int64(data[at + S.qs + 4 * j + k]) | (((word >> (3 * k)) & 7) << 8)
                _put_group(out, block * SUPER + 32 * j + 8 * k, scale, values, point, word & 0x8000)


@kernel
def _decode_m(data: Bytes, out: Floats, values: Floats) -> None:
    for block in range(out.size // SUPER):
        at = block * M.nbytes
        half = np.uint16(0)
        for j in range(4):
            half |= np.uint16(np.uint16(data[at + M.scales + 2 * j + 1] >> 4) << np.uint16(4 * j))
        d = half_value(half)
        for j in range(16):
            word = get_short(data, at + M.scales + 2 * (j // 4))
            scale = d * np.float32(2 * ((word >> (3 * (j & 3))) & 7) + 1)
            for k in range(2):
                high = np.int64(data[at + M.qh + j]) >> (4 * k)
                point = np.int64(data[at + M.qs + 2 * j + k]) | ((high & 7) << 8)
                _put_group(out, block * SUPER + 16 * j + 8 * k, scale, values, point, high & 8)


class IQ1_S(GridBlock, type=GGMLType.IQ1_S):
    """A grid of 2048 points, with a 3-bit scale and a shift for every 32 weights. Needs importance weights.

    After quantize_row_iq1_s_impl and dequantize_row_iq1_s.
    """

    points, encoder, decoder = GGMLType.IQ1_S, _encode_s, _decode_s
    needs_weights = True


class IQ1_M(GridBlock, type=GGMLType.IQ1_M):
    """The grid of IQ1_S, with a 3-bit scale for every 16 weights and a shift for every 8.

    After quantize_row_iq1_m_impl and dequantize_row_iq1_m.
    """

    points, encoder, decoder = GGMLType.IQ1_S, _encode_m, _decode_m
