"""The inner loops of rounding with feedback: one row of weights in each lane, sub-block after sub-block of columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.lane_memory import add_products, load, part, scratch, store, store_all
from quantkit.blocks.lanes import (
    LANES,
    ZERO,
    absolute,
    bits,
    first_lane,
    from_halves,
    get,
    halves,
    lookup,
    maximum,
    minimum,
    multiply_add,
    repeat,
    select,
    smallest,
    splat,
)
from quantkit.blocks.searches import MAGIC, reciprocals
from quantkit.compile.kernel import allocating_piece, kernel, piece

INFINITY = np.float32(np.inf)
ONE = np.float32(1)
TOGETHER = 4  # columns whose sums are added up together, in registers
EIGHTH = np.float32(0.125)
# How a scale and a low come from what is stored of a sub-block: codes times two floats, the floats themselves, or the
# scale as a code times a float and the low as a share of the scale.
CODES, FLOATS, SHARE = 0, 1, 2


@piece
def clamp(x: Any, low: Any, high: Any) -> Any:
    """`x` held between two scalars."""
    return minimum(maximum(x, splat(low)), splat(high))


@piece
def nearest(x: Any, values: Any, borders: Any) -> Any:
    """The value of `values` nearest to each lane. Without `borders` these are neighbouring integers."""
    if borders is None:
        magic = splat(MAGIC)
        low, high = splat(MAGIC + values[0]), splat(MAGIC + values[values.size - 1])
        # Beyond 2**22 the sum is no longer exact, but far outside of the range that it is held in.
        return minimum(maximum(x + magic, low), high) - magic
    found = splat(values[0])
    for i in range(borders.size):
        found = found + select(x < splat(borders[i]), splat(ZERO), splat(values[i + 1] - values[i]))
    return found


@piece
def with_feedback(ts: Any, chain: Any, row: Any, n: Any, gaps: Any) -> Any:
    """A column's target, moved to where the errors of the `n` columns before it ask for."""
    x = load(ts, n * LANES)
    for i in range(n):
        x = multiply_add(splat(chain[row + i]), load(gaps, i * LANES), x)
    return x


@piece
def settle_levels(
    ts: Any,
    chain: Any,
    left: Any,
    at: Any,
    first: Any,
    sub: Any,
    scale: Any,
    low: Any,
    rule: Any,
    found: Any,
    gaps: Any,
) -> Any:
    """Round `sub` columns in order, each with what the errors before it ask for. Returns the loss.

    `ts` are the columns' targets, `chain` the unit triangular factor of their curvature and `left` its diagonal. Leaves
    the values in `found` and what the targets miss in `gaps`. `rule` is (values, borders), as for `nearest`.
    """
    values, borders = rule
    inverse = reciprocals(scale)
    loss = splat(ZERO)
    for j in range(sub):
        x = with_feedback(ts, chain, at + j * sub, j, gaps)
        value = nearest((x - low) * inverse, values, borders)
        q = multiply_add(value, scale, low)
        store(found, j * LANES, value)
        store(gaps, j * LANES, load(ts, j * LANES) - q)
        miss = x - q
        loss = multiply_add(miss * miss, splat(left[first + j]), loss)
    return loss


@piece
def choose_signs(
    ts: Any, chain: Any, left: Any, at: Any, first: Any, sub: Any, j8: Any, scale: Any, levels: Any, borders: Any,
    gaps: Any, signs: Any, misses: Any,
) -> None:  # fmt: skip
    """The signs of 8 columns from `j8` on as factors in `signs`, an even number of them minus.

    They are those of the columns rounded in order. Where their number is odd, one is inverted: that which then costs
    the least, at the lowest level.
    """
    inverse = reciprocals(scale)
    one = splat(ONE)
    product = one
    for i in range(8):
        j = j8 + i
        x = with_feedback(ts, chain, at + j * sub, j, gaps)
        sign = select(x < splat(ZERO), -one, one)
        q = nearest(absolute(x * inverse), levels, borders) * sign * scale
        store(signs, i * LANES, sign)
        store(gaps, j * LANES, load(ts, j * LANES) - q)
        store(misses, i * LANES, x - q)
        product = product * sign
    if bits(product < splat(ZERO)) == 0:
        return
    least, inverted = splat(INFINITY), splat(-1)
    for i in range(8):
        q = load(ts, (j8 + i) * LANES) - load(gaps, (j8 + i) * LANES)
        change = q + load(signs, i * LANES) * splat(levels[0]) * scale
        cost = splat(ZERO)
        for k in range(i, 8):
            moved = splat(chain[at + (j8 + k) * sub + j8 + i]) * change
            miss = load(misses, k * LANES)
            cost = multiply_add(splat(left[first + j8 + k]) * moved, miss + miss + moved, cost)
        less = cost < least
        least = select(less, cost, least)
        inverted = select(less, splat(i), inverted)
    odd = product < splat(ZERO)
    for i in range(8):
        sign = load(signs, i * LANES)
        store(signs, i * LANES, select(odd & (inverted == splat(i)), -sign, sign))


@piece
def nearest_point(
    ts: Any, bases: Any, chain: Any, left: Any, at: Any, first: Any, sub: Any, j0: Any, lane: Any, scale: Any, low: Any,
    signs: Any, shift: Any, place: Any, grid: Any, rule: Any, gaps: Any,
) -> Any:  # fmt: skip
    """The code of the best of the neighbours at `place` (see Grid.where) for one row's group; a neighbour in each lane.

    `bases` are the columns' targets with what the errors before the group ask for. `gaps` is scratch.
    """
    levels, _, (dim, width, _, _) = rule
    start = np.int64(place >> 10) * LANES
    count = (np.int64(place & 1023) + LANES - 1) // LANES
    mask = splat((1 << width) - 1)
    table = load(levels, 0)
    best, codes = splat(INFINITY), splat(0)
    for row in range(count):
        code = load(grid.lists, start + row * LANES)
        cost = splat(ZERO)
        for i in range(dim):
            level = lookup(table, (code >> splat(width * i)) & mask)
            q = multiply_add(level + splat(shift), splat(signs[i * LANES + lane] * scale), splat(low))
            miss = splat(bases[i * LANES + lane]) - q
            for k in range(i):
                miss = multiply_add(splat(chain[at + (j0 + i) * sub + j0 + k]), load(gaps, k * LANES), miss)
            store(gaps, i * LANES, splat(ts[(j0 + i) * LANES + lane]) - q)
            cost = multiply_add(miss * miss, splat(left[first + j0 + i]), cost)
        less = cost < best
        best = select(less, cost, best)
        codes = select(less, code, codes)
    least = smallest(best)
    return get(codes, first_lane(bits(best == splat(least))) & 15)


@piece
def settle_points(
    ts: Any,
    chain: Any,
    left: Any,
    at: Any,
    first: Any,
    sub: Any,
    scale: Any,
    low: Any,
    rule: Any,
    found: Any,
    gaps: Any,
) -> Any:
    """As `settle_levels`, where groups of columns take points of a grid, with signs or shifted.

    `rule` is the levels, their borders, (weights of a group, bits of a level, what signs are like, shifts to choose
    from) and the grid. Signs: 0 for none, 1 for any, 2 for an even number of minus among 8.
    """
    levels, borders, (dim, width, signed, n_shifts), grid = rule
    n_levels = borders.size + 1
    inverse = reciprocals(scale)
    scales, lows, codes = scratch(np.float32, 1), scratch(np.float32, 1), scratch(np.int32, 1)
    signs, misses = scratch(np.float32, 8), scratch(np.float32, 8)
    bases, spare = scratch(np.float32, 8), scratch(np.float32, 8)
    values, others = scratch(np.float32, 8), scratch(np.float32, 8)
    store(scales, 0, scale)
    store(lows, 0, low)
    one, zero = splat(ONE), splat(ZERO)
    for i in range(8):
        store(signs, i * LANES, one)
    loss = zero
    for j0 in range(0, sub, dim):
        if signed == 2 and j0 % 8 == 0:
            choose_signs(ts, chain, left, at, first, sub, j0, scale, levels, borders, gaps, signs, misses)
        offset = j0 % 8 if signed == 2 else 0
        own = part(signs, offset * LANES, 0)
        for i in range(dim):
            j = j0 + i
            base = load(ts, j * LANES)
            for k in range(j0):
                base = multiply_add(splat(chain[at + j * sub + k]), load(gaps, k * LANES), base)
            store(bases, i * LANES, base)
        best = splat(INFINITY)
        for option in range(n_shifts):
            shift = ZERO if n_shifts == 1 else EIGHTH if option == 0 else -EIGHTH
            code = splat(0)
            for i in range(dim):
                j = j0 + i
                x = load(bases, i * LANES)
                for k in range(i):
                    x = multiply_add(splat(chain[at + j * sub + j0 + k]), load(gaps, (j0 + k) * LANES), x)
                if signed == 1:
                    store(own, i * LANES, select(x < zero, -one, one))
                sign = load(own, i * LANES)
                v = (x - low) * inverse * sign - splat(shift)
                value, level = splat(levels[0]), splat(0)
                for b in range(n_levels - 1):
                    above = v >= splat(borders[b])
                    value = value + select(above, splat(levels[b + 1] - levels[b]), zero)
                    level = level + select(above, splat(1), splat(0))
                code = code | (level << splat(width * i))
                value = (value + splat(shift)) * sign
                store(others, i * LANES, value)
                store(gaps, j * LANES, load(ts, j * LANES) - multiply_add(value, scale, low))
            store(codes, 0, code)
            for lane in range(LANES):
                place = grid.where[codes[lane]]
                if place >= 0:
                    point = np.int64(
                        nearest_point(
                            ts, bases, chain, left, at, first, sub, j0, lane, scales[lane], lows[lane], own, shift,
                            place, grid, (levels, borders, (dim, width, signed, n_shifts)), spare,
                        )
                    )  # fmt: skip
                    for i in range(dim):
                        level_value = levels[(point >> (width * i)) & ((1 << width) - 1)]
                        others[i * LANES + lane] = (level_value + shift) * own[i * LANES + lane]
            cost = zero
            for i in range(dim):
                j = j0 + i
                q = multiply_add(load(others, i * LANES), scale, low)
                miss = load(bases, i * LANES) - q
                for k in range(i):
                    miss = multiply_add(splat(chain[at + j * sub + j0 + k]), load(gaps, (j0 + k) * LANES), miss)
                store(gaps, j * LANES, load(ts, j * LANES) - q)
                cost = multiply_add(miss * miss, splat(left[first + j]), cost)
            better = cost < best
            best = select(better, cost, best)
            for i in range(dim):
                store(values, i * LANES, select(better, load(others, i * LANES), load(values, i * LANES)))
        for i in range(dim):
            j = j0 + i
            value = load(values, i * LANES)
            store(found, j * LANES, value)
            store(gaps, j * LANES, load(ts, j * LANES) - multiply_add(value, scale, low))
        loss = loss + best
    return loss


@piece
def loss_of(
    ts: Any, chain: Any, left: Any, at: Any, first: Any, sub: Any, scale: Any, low: Any, kept: Any, start: Any,
    n_rows: Any, gaps: Any,
) -> Any:  # fmt: skip
    """The loss of the values that a sub-block has."""
    loss = splat(ZERO)
    for j in range(sub):
        q = multiply_add(load(kept, start + j * n_rows), scale, low)
        miss = with_feedback(ts, chain, at + j * sub, j, gaps) - q
        store(gaps, j * LANES, load(ts, j * LANES) - q)
        loss = multiply_add(miss * miss, splat(left[first + j]), loss)
    return loss


@piece
def stepped(mode: Any, code: Any, low_code: Any, unit: Any, low_unit: Any) -> Any:
    """The scale and the low of what is stored of a sub-block."""
    if mode == FLOATS:
        return code, low_code
    scale = unit * code
    return scale, scale * low_code if mode == SHARE else -(low_unit * low_code)


@piece
def tried(mode: Any, code: Any, low_code: Any, a: Any, b: Any, ranges: Any) -> Any:
    """What is stored of a sub-block, changed as a trial says."""
    if mode == FLOATS:
        return from_halves(halves(code * splat(ONE + a))), from_halves(halves(multiply_add(code, splat(b), low_code)))
    changed = clamp(code + splat(a), ranges[0], ranges[1])
    if mode == SHARE:
        return changed, low_code * splat(b)
    return changed, clamp(low_code + splat(b), ranges[2], ranges[3])


@allocating_piece
def settle_panel(
    targets: Any, outside: Any, coupling: Any, solve: Any, chain: Any, left: Any, units: Any, scales: Any, lows: Any,
    kept: Any, errors: Any, trials: Any, ranges: Any, rule: Any, n_rows: Any, sub: Any, again: Any, mode: Any,
    settle: Any,
) -> None:  # fmt: skip
    """Settle the sub-blocks of a panel of columns: see `visit_levels`. `settle` rounds one with a given scale."""
    m = left.size
    n_trials = trials.size // 2
    sums = np.empty(sub * LANES, np.float32)
    ts = np.empty(sub * LANES, np.float32)
    found = np.empty(sub * LANES, np.float32)
    gaps = np.empty(sub * LANES, np.float32)
    local = np.empty(m * LANES, np.float32)
    for lane in range(0, n_rows, LANES):
        if again:
            for j in range(m):
                store(local, j * LANES, load(errors, j * n_rows + lane))
        unit, low_unit = splat(ONE), splat(ONE)
        if units is not None:
            unit, low_unit = load(units, lane), load(units, n_rows + lane)
        for u in range(m // sub):
            first, at = u * sub, u * sub * sub
            for j in range(0, sub, TOGETHER):
                row = (first + j) * m
                totals = repeat(splat(ZERO), TOGETHER)
                for i in range(first):
                    totals = add_products(totals, coupling, row + i, m, load(local, i * LANES))
                if again:
                    for i in range(first + sub, m):
                        totals = add_products(totals, coupling, row + i, m, load(local, i * LANES))
                store_all(sums, j * LANES, LANES, totals)
            if again:
                for j in range(sub):
                    total = load(sums, j * LANES) + load(outside, (first + j) * n_rows + lane)
                    store(sums, j * LANES, total)
            for j in range(sub):
                t = load(targets, (first + j) * n_rows + lane)
                for i in range(sub if again else j + 1):
                    t = multiply_add(splat(solve[at + j * sub + i]), load(sums, i * LANES), t)
                store(ts, j * LANES, t)
            place, start = u * n_rows + lane, first * n_rows + lane
            old_code, old_low = load(scales, place), load(lows, place)
            best, best_code, best_low = splat(INFINITY), old_code, old_low
            if again:
                scale, low = stepped(mode, old_code, old_low, unit, low_unit)
                best = loss_of(ts, chain, left, at, first, sub, scale, low, kept, start, n_rows, gaps)
            had = best
            # Once more after the trials, with the best of them.
            for trial in range(n_trials + 1):
                code, low_code = best_code, best_low
                if trial < n_trials:
                    code, low_code = tried(mode, old_code, old_low, trials[2 * trial], trials[2 * trial + 1], ranges)
                scale, low = stepped(mode, code, low_code, unit, low_unit)
                loss = settle(ts, chain, left, at, first, sub, scale, low, rule, found, gaps)
                better = loss < best
                best = select(better, loss, best)
                best_code = select(better, code, best_code)
                best_low = select(better, low_code, best_low)
            scale, low = stepped(mode, best_code, best_low, unit, low_unit)
            store(scales, place, best_code)
            store(lows, place, best_low)
            better = best < had
            for j in range(sub):
                to = (first + j) * n_rows + lane
                value = load(found, j * LANES)
                if again:
                    value = select(better, value, load(kept, to))
                store(kept, to, value)
                error = load(targets, to) - multiply_add(value, scale, low)
                store(local, (first + j) * LANES, error)
                store(errors, to, error)


@kernel
def visit_levels(
    targets: Any, outside: Any, coupling: Any, solve: Any, chain: Any, left: Any, units: Any, scales: Any, lows: Any,
    kept: Any, errors: Any, trials: Any, ranges: Any, rule: Any, n_rows: Any, sub: Any, again: Any,
) -> None:  # fmt: skip
    """Settle the sub-blocks of a panel of columns, for `n_rows` rows, a multiple of sixteen.

    Arrays hold column after column of all rows. `targets` are the weights, `kept` the values and `errors` targets minus
    what they are rounded to. In the first visit the columns before a sub-block have been settled, and those after it
    are free: `coupling` is the panel's triangular factor. When `again`, all others are settled, `coupling` is the
    panel's curvature and `outside` the gradient from other panels; what a sub-block has is kept unless something is
    better. `solve`, `chain` and `left` belong to the sub-blocks' own curvature.

    `units` are the two floats that codes multiply, for each row; None where `scales` and `lows` are floats. `trials`
    are pairs of what to change in a sub-block's codes, `ranges` lowest and highest code of scales and of minimums.
    `rule` is (values, borders) of the levels, as for `nearest`.
    """
    if units is None:
        settle_panel(
            targets, outside, coupling, solve, chain, left, units, scales, lows, kept, errors, trials, ranges, rule,
            n_rows, sub, again, FLOATS, settle_levels,
        )  # fmt: skip
    else:
        settle_panel(
            targets, outside, coupling, solve, chain, left, units, scales, lows, kept, errors, trials, ranges, rule,
            n_rows, sub, again, CODES, settle_levels,
        )  # fmt: skip


@kernel
def visit_points(
    targets: Any, outside: Any, coupling: Any, solve: Any, chain: Any, left: Any, units: Any, scales: Any, lows: Any,
    kept: Any, errors: Any, trials: Any, ranges: Any, rule: Any, n_rows: Any, sub: Any, again: Any,
) -> None:  # fmt: skip
    """The same for formats with a grid: `rule` as for `settle_points`, and lows are shares of the scale."""
    settle_panel(
        targets, outside, coupling, solve, chain, left, units, scales, lows, kept, errors, trials, ranges, rule, n_rows,
        sub, again, SHARE, settle_points,
    )  # fmt: skip


@kernel
def points_of(kept: Any, n_rows: Any, rule: Any, points: Any, signs: Any) -> None:
    """The points and signs, or shifts, of rounded rows, from their values: see `blocks.parts.GridParts`.

    `kept` holds column after column of `n_rows` rows; `points` and `signs` row after row of those that they have.
    """
    levels, _, (dim, width, signed, _), grid = rule
    n = kept.size // n_rows
    for row in range(points.size * dim // n):
        for j in range(0, n, 8):
            byte = 0
            for i in range(8):
                value = kept[(j + i) * n_rows + row]
                if signed != 0:
                    byte |= (1 if value < ZERO else 0) << i
                elif value < np.float32(np.round(value)):
                    byte = 1
            signs[(row * n + j) // 8] = np.uint8(byte)
        for j in range(0, n, dim):
            code = 0
            for i in range(dim):
                value = kept[(j + i) * n_rows + row]
                size = abs(value) if signed != 0 else np.float32(np.round(value))
                level = 0
                while levels[level] < size:
                    level += 1
                code |= level << (width * i)
            points[(row * n + j) // dim] = np.uint16(grid.index_of[code])
