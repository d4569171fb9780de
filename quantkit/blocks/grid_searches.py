"""The search for scales and grid points that the IQ2 and IQ3 formats share, sixteen sub-blocks at once.

The reference tries a number of scales for a sub-block. For each one it rounds the weights to levels, replaces every
group of levels that is no grid point by its best neighbour, and keeps the scale and levels with the best fit. Here
each lane has a sub-block, as in `searches`, for all of that but the choice of a neighbour. That has a trial in each
lane where a run of trials has up to 16 neighbours to choose from, and a neighbour in each lane otherwise. Sub-blocks
are stored transposed: weight i of sixteen sub-blocks is `xs[16 * i : 16 * i + 16]`.

**Fewer searches than trials.** Consecutive trials often round a group to the same levels, so they choose from the same
neighbours. The distance of neighbour j at scale s is `s*s*A_j - 2*s*B_j + C`, hence `(D_j - D_k) / s` is linear in s:
a neighbour that is nearest at two scales is nearest at every scale between them. That holds for exact arithmetic; it
holds for rounded sums as well when the others are farther by more than the rounding errors can hide. For distances of
at most 8 terms `w * (s*q - x)**2` these are below `2**-19 * S`, S being the sum of `w * (s*q_max + |x|)**2` (sixteen
units in the last place, doubled for safety). Scales differ by less than a factor 2, so a margin of `2**-16 * S` at both
ends is enough. So with a neighbour in each lane, the search of a run starts at its ends, and goes on in the middle
while they disagree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.bytes import put_word
from quantkit.blocks.lane_memory import load, store
from quantkit.blocks.lanes import (
    LANES,
    ONE,
    ZERO,
    absolute,
    bits,
    first_lane,
    get,
    lane_numbers,
    lookup,
    maximum,
    minimum,
    pair,
    select,
    smallest,
    splat,
    sqrt,
    to_float,
)
from quantkit.blocks.searches import level_of, nearest_ints, weigh
from quantkit.blocks.tiles import SUPER, block_starts, spread
from quantkit.compile.kernel import piece

HALF = np.float32(0.5)
INFINITY = np.float32(np.inf)
MARGIN = np.float32(2.0**-16)
# Outside of these sums and numbers the bound above would have to count underflow too.
LEAST_SUM = np.float32(1e-20)
MOST = np.float32(1e10)
# What is rounded once more with the best scale: every group; every group if one was replaced; the replaced ones.
ROUND_ALL, ROUND_ANY, ROUND_REPLACED = 0, 1, 2
REPLACED = 1 << 16  # a code with this bit is of a point that took the place of levels outside the grid


@piece
def sum_of_squares(x: Any, start: Any) -> Any:
    """The sum of the squares of a super-block, one after another."""
    total = ZERO
    for i in range(SUPER):
        total += x[start + i] * x[start + i]
    return total


@piece
def tile_space(n: Any) -> Any:
    """What `take_tile` fills: weights and their importance; and its scratch."""
    return (
        np.empty(n * LANES, np.float32),
        np.empty(n * LANES, np.float32),
        (np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.float32)),
    )


@piece
def take_tile(x: Any, first: Any, n: Any, n_per_row: Any, weights: Any, factor: Any, share: Any, tile: Any) -> Any:
    """Sixteen sub-blocks of `n` weights, from super-block `first` on. Returns how many super-blocks these are.

    sigma is `factor` times the mean square of the super-block. Importance weights are multiplied by the root of sigma
    plus the square of the weight; without them, that square plus `share` of sigma stands for them. Lanes beyond the
    last sub-block repeat it.
    """
    xs, ws, (starts, columns, sigmas) = tile
    lanes = SUPER // n  # of a super-block
    used = block_starts(first * lanes, x.size // n, n, n_per_row, starts, columns)
    spread(x, starts, 0, n, xs)
    if weights is not None or share != 0:
        for lane in range(0, LANES, lanes):
            start = starts[lane] // SUPER * SUPER
            sigmas[lane : lane + lanes] = np.float32(factor) * sum_of_squares(x, start) / np.float32(SUPER)
    if weights is None:
        for i in range(n):
            v = load(xs, i * LANES)
            store(ws, i * LANES, splat(np.float32(share)) * load(sigmas, 0) + v * v if share != 0 else v * v)
    else:
        spread(weights, columns, 0, n, ws)
        weigh(xs, ws, n, load(sigmas, 0))
    return used // lanes


@piece
def take_signs(xs: Any, ws: Any, n: Any, even: Any, signs: Any) -> Any:
    """Make `xs` magnitudes, and write 8 sign bits for every group of 8 to `signs`. Returns the largest of each lane.

    With `even`, only seven bits are stored because each group has an even number of signs; where it has not, the
    weight that matters least keeps the wrong sign: its magnitude becomes negative.
    """
    zero = splat(ZERO)
    largest = zero
    for k in range(n // 8):
        sign = splat(0)
        odd = splat(0)
        least = zero
        least_at = splat(0)
        for i in range(8):
            at = (8 * k + i) * LANES
            x = load(xs, at)
            flipped = select(x >= zero, splat(0), splat(1))
            sign = sign | (flipped << splat(i))
            odd = odd ^ flipped
            if even:
                loss = load(ws, at) * x * x
                if i == 0:
                    least = loss
                else:
                    less = loss < least
                    least = select(less, loss, least)
                    least_at = select(less, splat(i), least_at)
            store(xs, at, select(x >= zero, x, -x))
        if even:
            sign = (sign ^ (odd << least_at)) & splat(127)
            for i in range(8):
                at = (8 * k + i) * LANES
                x = load(xs, at)
                store(xs, at, select((odd == splat(1)) & (least_at == splat(i)), -x, x))
        store(signs, k * LANES, sign)
        for i in range(8):
            x = load(xs, (8 * k + i) * LANES)
            largest = x if k == 0 and i == 0 else maximum(largest, x)
    return largest


@piece
def rounded_code(xs: Any, first: Any, inverse: Any, dim: Any, width: Any, top: Any) -> Any:
    """The code of the group of weights from `first` on, rounded to levels 0..top, which stand for 1, 3, 5..."""
    code = splat(0)
    for i in range(dim):
        level = nearest_ints(splat(HALF) * (inverse * load(xs, (first + i) * LANES) - splat(ONE)))
        code = code | (maximum(splat(0), minimum(splat(top), level)) << splat(width * i))
    return code


@piece
def nearest_point(lists: Any, place: Any, tables: Any, dim: Any, width: Any) -> Any:
    """The nearest of the neighbours at `place` (see Grid.where), and how much farther the second is.

    `tables` holds for each weight of the group eight terms, one a level, whose sum in order is the distance.
    """
    first = np.int64(place >> 10) * LANES
    count = (np.int64(place & 1023) + LANES - 1) // LANES
    best, second = splat(INFINITY), splat(INFINITY)
    codes, rows = splat(0), splat(0)
    for row in range(count):
        code = load(lists, first + row * LANES)
        distance = lookup(load(tables, 0), code)
        for i in range(1, dim):
            distance = distance + lookup(load(tables, 8 * i), code >> splat(width * i))
        nearer = distance < best
        second = minimum(second, maximum(distance, best))
        best = select(nearer, distance, best)
        codes = select(nearer, code, codes)
        rows = select(nearer, splat(row), rows)
    least = smallest(best)
    ties = bits(best == splat(least))
    lane = first_lane(ties) & 15
    if count > 1 and ties & (ties - np.uint32(1)):
        for other in range(LANES):  # equal distances: the first in the list wins
            if get(best, other) == least and get(rows, other) < get(rows, lane):
                lane = np.int64(other)
    margin = smallest(select(lane_numbers() == splat(lane), second, best)) - least
    return get(codes, lane), margin


@piece
def square_terms(xs: Any, us: Any, first: Any, lane: Any, scale: Any, levels: Any, tables: Any, dim: Any) -> None:
    """The terms `w * (scale * level - x)**2` of one lane's group from weight `first` on, for eight levels each."""
    scaled = splat(scale) * levels
    for i in range(0, dim, 2):
        at = (first + i) * LANES + lane
        diff = scaled - pair(xs[at], xs[at + LANES])
        store(tables, 8 * i, pair(us[at], us[at + LANES]) * diff * diff)


@piece
def nearest_points(
    lists: Any, place: Any, xs: Any, us: Any, first: Any, lane: Any, scales: Any, at: Any, terms: Any, shape: Any
) -> Any:
    """The nearest of the neighbours at `place` for sixteen scales, from `scales[at]` on: a trial in each lane.

    Candidates come one after another, so that their order decides between equals. `terms` is scratch.
    """
    dim, width, top = shape
    mask = (1 << width) - 1
    scale = load(scales, at)
    for level in range(top + 1):
        scaled = scale * splat(np.float32(2 * level + 1))
        if dim == 4:  # too many levels to keep the terms of all
            store(terms, level * LANES, scaled)
        else:
            for i in range(dim):
                source = (first + i) * LANES + lane
                diff = scaled - splat(xs[source])
                store(terms, (i * (mask + 1) + level) * LANES, splat(us[source]) * diff * diff)
    start = np.int64(place >> 10) * LANES
    best = splat(INFINITY)
    codes = splat(np.int32(lists[start]))
    for j in range(start, start + np.int64(place & 1023)):
        code = np.int64(lists[j])
        distance = splat(ZERO)
        for i in range(dim):
            level = (code >> (width * i)) & mask
            if dim == 4:
                source = (first + i) * LANES + lane
                diff = load(terms, level * LANES) - splat(xs[source])
                term = splat(us[source]) * diff * diff
            else:
                term = load(terms, (i * (mask + 1) + level) * LANES)
            distance = term if i == 0 else distance + term
        nearer = distance < best
        best = select(nearer, distance, best)
        codes = select(nearer, splat(code), codes)
    return codes


@piece
def replace_by_points(
    codes: Any,
    scales: Any,
    n_trials: Any,
    slack: Any,
    searched: Any,
    xs: Any,
    us: Any,
    n: Any,
    tables: Any,
    grid: Any,
    shape: Any,
) -> None:
    """Replace the codes that are no grid points by their nearest neighbours, in all trials of all lanes."""
    where, lists = grid.where, grid.lists
    dim, width, _ = shape
    ends, sure, terms, winners = searched
    stride = n_trials + LANES
    levels = to_float(((lane_numbers() & splat((1 << width) - 1)) << splat(1)) + splat(1))
    for k in range(n // dim):
        for lane in range(LANES):
            base = k * n_trials * LANES + lane
            trial = 0
            while trial < n_trials:
                code = codes[base + trial * LANES]
                end = trial + 1
                while end < n_trials and codes[base + end * LANES] == code:
                    end += 1
                place = where[code]
                if place >= 0 and end - trial > 1 and place & 1023 <= LANES:
                    for part in range(trial, end, LANES):
                        start = lane * stride + part
                        best_codes = nearest_points(lists, place, xs, us, k * dim, lane, scales, start, terms, shape)
                        store(winners, 0, best_codes | splat(REPLACED))
                        for at in range(min(LANES, end - part)):
                            codes[base + (part + at) * LANES] = winners[at]
                elif place >= 0:
                    # The run's ends first; then halve what lies between two trials until they agree for sure.
                    low, at, depth = trial, trial, 0
                    ends[0] = end - 1
                    while True:
                        here = base + at * LANES
                        if codes[here] < REPLACED:
                            square_terms(xs, us, k * dim, lane, scales[lane * stride + at], levels, tables, dim)
                            best, margin = nearest_point(lists, place, tables, dim, width)
                            codes[here] = best | REPLACED
                            sure[at] = margin > slack[k * LANES + lane]
                        if at - low > 1:
                            if codes[here] == codes[base + low * LANES] and sure[at] and sure[low]:
                                for between in range(low + 1, at):
                                    codes[base + between * LANES] = codes[here]
                                low = at
                                depth -= 1
                            else:
                                depth += 1
                                ends[depth] = (low + at) // 2
                        elif at > low:
                            low = at
                            depth -= 1
                        if low == end - 1:
                            break
                        at = ends[depth]
                trial = end


@piece
def fit(codes: Any, n_trials: Any, trial: Any, xs: Any, ws: Any, n: Any, shape: Any) -> Any:
    """The sums of w*x*q and of w*q*q for the codes of one trial."""
    dim, width, _ = shape
    sum_qx, sum_q2 = splat(ZERO), splat(ZERO)
    for k in range(n // dim):
        doubled = load(codes, (k * n_trials + trial) * LANES) << splat(1)
        for i in range(dim):
            at = (k * dim + i) * LANES
            q = to_float(((doubled >> splat(width * i)) & splat(2 * (1 << width) - 2)) | splat(1))
            w = load(ws, at)
            sum_qx = sum_qx + w * load(xs, at) * q
            sum_q2 = sum_q2 + w * q * q
    return sum_qx, sum_q2


@piece
def grid_search(
    xs: Any,
    ws: Any,
    us: Any,
    n: Any,
    shape: Any,
    extreme: Any,
    scale: Any,
    n_trials: Any,
    step: Any,
    refit: Any,
    grid: Any,
    work: Any,
) -> Any:
    """The scales of sixteen sub-blocks of `n` weights; the codes of their grid points are left in `work`.

    `xs` magnitudes, `ws` weights, `us` scratch. `shape` is weights in a group, bits of a level and highest level.
    `extreme` stands for the highest level in the middle one of `n_trials` inverse scales, which are `step` apart;
    `scale` answers where no trial fits. After the trials, the best scale is used to round once more, see `refit`:
    ROUND_ALL, ROUND_ANY (also where no trial fits) or ROUND_REPLACED.
    """
    dim, width, top = shape
    codes, scales, slack, tables, chosen, searched = work
    scales_of_trial = searched[2]  # free until the search
    groups = n // dim
    center = np.float32(2 * top + 1)
    half = n_trials // 2
    zero, one = splat(ZERO), splat(ONE)
    longest = one / (splat(center - np.float32(half) * step) / extreme) * splat(center)
    for k in range(groups):
        total = zero
        most = zero
        for i in range(dim):
            at = (k * dim + i) * LANES
            w = sqrt(load(ws, at))
            store(us, at, w)
            reach = longest + absolute(load(xs, at))
            most = maximum(most, reach)
            total = total + w * reach * reach
        safe = (total > splat(LEAST_SUM)) & (most < splat(MOST))
        store(slack, k * LANES, select(safe, total * splat(MARGIN), splat(INFINITY)))
    for trial in range(n_trials):
        inverse = splat(center + np.float32(trial - half) * step) / extreme
        store(scales_of_trial, 0, one / inverse)
        for lane in range(LANES):
            scales[lane * (n_trials + LANES) + trial] = scales_of_trial[lane]
        for k in range(groups):
            store(codes, (k * n_trials + trial) * LANES, rounded_code(xs, k * dim, inverse, dim, width, top))
    replace_by_points(codes, scales, n_trials, slack, searched, xs, us, n, tables, grid, shape)

    best = zero
    for k in range(groups):
        store(chosen, k * LANES, splat(REPLACED if refit == ROUND_ANY else 0))
    for trial in range(n_trials):
        sum_qx, sum_q2 = fit(codes, n_trials, trial, xs, ws, n, shape)
        better = (sum_q2 > zero) & (sum_qx * sum_qx > best * sum_q2)
        if bits(better):
            this_scale = sum_qx / sum_q2
            scale = select(better, this_scale, scale)
            best = select(better, this_scale * sum_qx, best)
            for k in range(groups):
                code = load(codes, (k * n_trials + trial) * LANES)
                store(chosen, k * LANES, select(better, code, load(chosen, k * LANES)))

    again = scale > zero
    if refit != ROUND_ALL:
        replaced = splat(0)
        for k in range(groups):
            replaced = replaced | load(chosen, k * LANES)
        again = again & (replaced >= splat(REPLACED))
    inverse = one / scale
    store(scales_of_trial, 0, scale)
    for lane in range(LANES):
        scales[lane * (1 + LANES)] = scales_of_trial[lane]
    for k in range(groups):
        old = load(chosen, k * LANES)
        new = rounded_code(xs, k * dim, inverse, dim, width, top)
        use = again & (old >= splat(REPLACED)) if refit == ROUND_REPLACED else again
        store(chosen, k * LANES, select(use, new, old & splat(REPLACED - 1)))
    replace_by_points(chosen, scales, 1, slack, searched, xs, us, n, tables, grid, shape)
    sum_qx, sum_q2 = fit(chosen, 1, 0, xs, ws, n, shape)
    return select(again & (sum_q2 > zero), sum_qx / sum_q2, scale)


@piece
def settle(scale: Any, empty: Any, signs: Any, n_signs: Any, mask: Any, codes: Any, n_codes: Any) -> Any:
    """Make scales positive, turning the signs round, and make empty lanes zero: their signs, codes and scales."""
    zero = splat(ZERO)
    negative = scale < zero
    for k in range(n_signs):
        sign = load(signs, k * LANES)
        sign = select(negative, (sign ^ splat(-1)) & splat(mask), sign)
        store(signs, k * LANES, select(empty, splat(0), sign))
    for k in range(n_codes):
        store(codes, k * LANES, select(empty, splat(0), load(codes, k * LANES) & splat(REPLACED - 1)))
    return select(empty, zero, select(negative, -scale, scale))


@piece
def most_of(found: Any, first: Any, n: Any) -> Any:
    """The largest of `n` scales, none below zero."""
    most = ZERO
    for j in range(n):
        most = max(most, found[first + j])
    return most


@piece
def scale_code(scale: Any, inverse: Any, top: Any) -> Any:
    """A sub-block's scale as a level 0..top, which stand for 1, 3, 5... of the super-block's."""
    return level_of(inverse * scale, HALF, ONE, 0, top)


@piece
def put_scale_codes(found: Any, first: Any, n: Any, inverse: Any, out: Any, at: Any) -> None:
    """The codes 0..15 of `n` scales, two in a byte."""
    for j in range(0, n, 2):
        low, high = scale_code(found[first + j], inverse, 15), scale_code(found[first + j + 1], inverse, 15)
        out[at + j // 2] = np.uint8(low | (high << 4))


@piece
def put_signs_and_scale(signs: Any, lane: Any, scale: Any, inverse: Any, out: Any, at: Any) -> None:
    """Four bytes: the signs of four groups, 7 bits each, and in the highest bits the code 0..15 of the scale."""
    word = np.int64(scale_code(scale, inverse, 15)) << 28
    for k in range(4):
        word |= np.int64(signs[k * LANES + lane]) << (7 * k)
    put_word(out, at, word)


@piece
def work_space(n_groups: Any, n_trials: Any) -> Any:
    """Scratch for `grid_search`: codes, scales, slack, tables, chosen codes, and what was searched."""
    return (
        np.empty(n_groups * n_trials * LANES, np.int32),
        np.zeros((n_trials + 2 * LANES) * LANES, np.float32),
        np.empty(n_groups * LANES, np.float32),
        np.empty(8 * 8 + LANES, np.float32),
        np.empty(n_groups * LANES, np.int32),
        (
            np.empty(n_trials, np.int64),
            np.empty(n_trials, np.bool_),
            np.empty(8 * 4 * LANES, np.float32),
            np.empty(LANES, np.int32),
        ),
    )
