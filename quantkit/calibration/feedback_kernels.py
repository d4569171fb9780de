"""The inner loops of rounding with feedback: one row of weights in each lane, sub-block after sub-block of columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.lane_memory import load, store
from quantkit.blocks.lanes import (
    LANES,
    ZERO,
    from_halves,
    halves,
    maximum,
    minimum,
    multiply_add,
    select,
    splat,
)
from quantkit.blocks.searches import MAGIC, reciprocals
from quantkit.compile.kernel import kernel, piece

INFINITY = np.float32(np.inf)


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
def settle(
    ts: Any,
    chain: Any,
    left: Any,
    at: Any,
    first: Any,
    sub: Any,
    scale: Any,
    low: Any,
    values: Any,
    borders: Any,
    found: Any,
    gaps: Any,
) -> Any:
    """Round `sub` columns in order, each with what the errors before it ask for. Returns the loss.

    `ts` are the columns' targets, `chain` the unit triangular factor of their curvature and `left` its diagonal. Leaves
    the values in `found` and what the targets miss in `gaps`.
    """
    inverse = reciprocals(scale)
    loss = splat(ZERO)
    for j in range(sub):
        t = load(ts, j * LANES)
        x = t
        for i in range(j):
            x = multiply_add(splat(chain[at + j * sub + i]), load(gaps, i * LANES), x)
        value = nearest((x - low) * inverse, values, borders)
        q = multiply_add(value, scale, low)
        store(found, j * LANES, value)
        store(gaps, j * LANES, t - q)
        miss = x - q
        loss = multiply_add(miss * miss, splat(left[first + j]), loss)
    return loss


@piece
def loss_of(
    ts: Any,
    chain: Any,
    left: Any,
    at: Any,
    first: Any,
    sub: Any,
    scale: Any,
    low: Any,
    kept: Any,
    start: Any,
    n_rows: Any,
    gaps: Any,
) -> Any:
    """The loss of the values that a sub-block has."""
    loss = splat(ZERO)
    for j in range(sub):
        t = load(ts, j * LANES)
        gap = t - multiply_add(load(kept, start + j * n_rows), scale, low)
        store(gaps, j * LANES, gap)
        miss = gap
        for i in range(j):
            miss = multiply_add(splat(chain[at + j * sub + i]), load(gaps, i * LANES), miss)
        loss = multiply_add(miss * miss, splat(left[first + j]), loss)
    return loss


@piece
def clamp(x: Any, low: Any, high: Any) -> Any:
    """`x` held between two scalars."""
    return minimum(maximum(x, splat(low)), splat(high))


@kernel
def visit(
    targets: Any, outside: Any, coupling: Any, solve: Any, chain: Any, left: Any, units: Any, scales: Any, lows: Any,
    kept: Any, errors: Any, trials: Any, ranges: Any, values: Any, borders: Any, n_rows: Any, sub: Any, again: Any,
) -> None:  # fmt: skip
    """Settle the sub-blocks of a panel of columns, for `n_rows` rows, a multiple of sixteen.

    Arrays hold column after column of all rows. `targets` are the weights, `kept` the values and `errors` targets minus
    what they are rounded to. In the first visit the columns before a sub-block have been settled, and those after it
    are free: `coupling` is the panel's triangular factor. When `again`, all others are settled, `coupling` is the
    panel's curvature and `outside` the gradient from other panels; what a sub-block has is kept unless something is
    better. `solve`, `chain` and `left` belong to the sub-blocks' own curvature.

    `units` are the two floats that codes multiply, for each row; None where `scales` and `lows` are floats. `trials`
    are pairs of what to add to a sub-block's codes; `ranges` are lowest and highest code of scales and of minimums.
    """
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
        for u in range(m // sub):
            first, at = u * sub, u * sub * sub
            for j in range(first, first + sub):
                total = load(outside, j * n_rows + lane) if again else splat(ZERO)
                other = splat(ZERO)
                for i in range(0, first, 2):
                    total = multiply_add(splat(coupling[j * m + i]), load(local, i * LANES), total)
                    other = multiply_add(splat(coupling[j * m + i + 1]), load(local, (i + 1) * LANES), other)
                if again:
                    for i in range(first + sub, m, 2):
                        total = multiply_add(splat(coupling[j * m + i]), load(local, i * LANES), total)
                        other = multiply_add(splat(coupling[j * m + i + 1]), load(local, (i + 1) * LANES), other)
                store(sums, (j - first) * LANES, total + other)
            for j in range(sub):
                t = load(targets, (first + j) * n_rows + lane)
                for i in range(sub if again else j + 1):
                    t = multiply_add(splat(solve[at + j * sub + i]), load(sums, i * LANES), t)
                store(ts, j * LANES, t)
            place = u * n_rows + lane
            old_code, old_low = load(scales, place), load(lows, place)
            best = splat(INFINITY)
            best_code, best_low = old_code, old_low
            if units is not None:
                unit, low_unit = load(units, lane), load(units, n_rows + lane)
            if again:
                if units is None:
                    best = loss_of(
                        ts, chain, left, at, first, sub, old_code, old_low, kept, first * n_rows + lane, n_rows, gaps
                    )
                else:
                    best = loss_of(
                        ts,
                        chain,
                        left,
                        at,
                        first,
                        sub,
                        unit * old_code,
                        -(low_unit * old_low),
                        kept,
                        first * n_rows + lane,
                        n_rows,
                        gaps,
                    )
            start = best
            for trial in range(n_trials):
                if units is None:
                    code = from_halves(halves(old_code * splat(np.float32(1) + trials[2 * trial])))
                    low_code = from_halves(halves(multiply_add(old_code, splat(trials[2 * trial + 1]), old_low)))
                    loss = settle(ts, chain, left, at, first, sub, code, low_code, values, borders, found, gaps)
                else:
                    code = clamp(old_code + splat(trials[2 * trial]), ranges[0], ranges[1])
                    low_code = clamp(old_low + splat(trials[2 * trial + 1]), ranges[2], ranges[3])
                    loss = settle(
                        ts,
                        chain,
                        left,
                        at,
                        first,
                        sub,
                        unit * code,
                        -(low_unit * low_code),
                        values,
                        borders,
                        found,
                        gaps,
                    )
                better = loss < best
                best = select(better, loss, best)
                best_code = select(better, code, best_code)
                best_low = select(better, low_code, best_low)
            scale, low = best_code, best_low
            if units is not None:
                scale, low = unit * best_code, -(low_unit * best_low)
            settle(ts, chain, left, at, first, sub, scale, low, values, borders, found, gaps)
            store(scales, place, best_code)
            store(lows, place, best_low)
            better = best < start
            for j in range(sub):
                to = (first + j) * n_rows + lane
                value = load(found, j * LANES)
                if again:
                    value = select(better, value, load(kept, to))
                store(kept, to, value)
                error = load(targets, to) - multiply_add(value, scale, low)
                store(local, (first + j) * LANES, error)
                store(errors, to, error)
