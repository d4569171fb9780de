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
while they disagree:

    trials     4   5   6   7   8   9  10  11  12      codes of one group in one lane: a run of nine equal ones
    search     a                               b      the ends: different points
                               a                      the middle: as on the left, so 5 to 7 are a without a search
                                       b              the middle of what is left: as on the right, so 11 is b
                                   ?                  between a and b: one more search
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from quantkit.blocks.bytes import put_word
from quantkit.blocks.grids import Grid
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ONE,
    ZERO,
    Bytes,
    Codes,
    F32x16,
    Floats,
    I32x16,
    Ints,
    Longs,
    Mask16,
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
from quantkit.compile.fixed import Fixed
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


class Shape(NamedTuple):
    """The groups of a grid: their weights, the bits of a level in a code, and the highest level.

    Numbers for numba, so that it compiles each piece once for all formats; for LLVM they are constants once inlined.
    """

    dim: int
    width: int
    top: int


@dataclass(frozen=True)
class GridFormat(Fixed):
    """A format with a grid, as `encode_on_grid` needs it."""

    shape: Shape
    n: int  # weights of a sub-block
    even: bool  # whether only seven signs of eight are stored
    factor: np.float32  # sigma is so many mean squares of the super-block
    share: np.float32  # of sigma that is added to the square of a weight, in place of importance weights
    n_trials: int
    spacing: np.float32  # between the inverse scales that are tried
    again: int  # what is rounded once more with the best scale
    epsilon: np.float32  # a sub-block with nothing larger is empty
    start: Any  # piece(tile, trials, largest, format): extreme and first scale of each lane, and which lanes are empty
    put: Any  # piece(out, block, lane, tile, codes, found, index): lay out a super-block, whose lanes begin at `lane`

    @property
    def supers(self) -> int:
        """How many super-blocks fill the lanes."""
        return LANES * self.n // SUPER

    @property
    def code_vectors(self) -> int:
        """Space for the codes of all trials."""
        return self.n // self.shape.dim * self.n_trials

    @property
    def scale_vectors(self) -> int:
        """Space for the scales of all trials of each lane, to the end of the last vector that begins with one."""
        return self.n_trials + 2 * LANES


class Tile(NamedTuple):
    """Sixteen sub-blocks of `n` weights, one in each lane."""

    n: int
    even: bool  # see GridFormat
    xs: Floats  # weights, of which `take_signs` leaves the magnitudes
    ws: Floats  # their importance
    roots: Floats  # of the importance: distances from grid points are weighted by these
    signs: Ints  # eight bits for each group of eight weights
    empty: Ints  # 1 in the lanes of empty sub-blocks
    starts: Longs  # where the sub-blocks begin
    columns: Longs  # and in their rows
    sigmas: Floats


class Trials(NamedTuple):
    """What `n` scales make of a tile.

    - `codes`: of group k in trial t, in lanes from `16 * (k * n + t)` on.
    - `scales`: of trial t in lane l, at `l * (n + 16) + t`: sixteen trials of a lane are a vector.
    """

    n: int
    codes: Ints
    scales: Floats


class Work(NamedTuple):
    """Scratch of a search."""

    slack: Floats  # by group, in lanes: how much farther the second nearest must be to be sure of the nearest
    tables: Floats  # eight terms of each weight of a group
    terms: Floats
    winners: Ints
    ends: Longs
    sure: Bytes


class Run(NamedTuple):
    """Trials first..end-1, in which `group` of `lane` has the same levels, whose neighbours are at `place`."""

    group: int
    lane: int
    first: int
    end: int
    place: int  # see Grid.where


@piece
def highest(shape: Shape) -> int:
    """What the highest level stands for: levels are 1, 3, 5..."""
    return 2 * shape.top + 1


@piece
def code_position(trials: Trials, group: int, trial: int) -> int:
    """Where the codes of a group in a trial begin."""
    return (group * trials.n + trial) * LANES


@piece
def scale_position(trials: Trials, lane: int, trial: int) -> int:
    """Where the scale of a lane in a trial is."""
    return lane * (trials.n + LANES) + trial


@piece
def put_scales(trials: Trials, trial: int, scale: F32x16, work: Work) -> None:
    """Keep the scales of a trial, each with its lane's."""
    store(work.terms, 0, scale)
    for lane in range(LANES):
        trials.scales[scale_position(trials, lane, trial)] = work.terms[lane]


@piece
def sum_of_squares(x: Floats, start: int) -> np.float32:
    """The sum of the squares of a super-block, one after another."""
    total = ZERO
    for i in range(SUPER):
        total += x[start + i] * x[start + i]
    return total


@piece
def take_tile(
    x: Floats, first: int, n_per_row: int, weights: Floats, factor: np.float32, share: np.float32, tile: Tile
) -> int:
    """Fill `tile` from super-block `first` on. Returns how many super-blocks that took.

    sigma is `factor` times the mean square of the super-block. Importance weights are multiplied by the root of sigma
    plus the square of the weight; without them, that square plus `share` of sigma stands for them. Lanes beyond the
    last sub-block repeat it.
    """
    n, xs, ws, sigmas = tile.n, tile.xs, tile.ws, tile.sigmas
    lanes = SUPER // n  # of a super-block
    used = block_starts(first * lanes, x.size // n, n, n_per_row, tile.starts, tile.columns)
    spread(x, tile.starts, 0, n, xs)
    if weights.size or share != ZERO:
        for lane in range(0, LANES, lanes):
            sigma = factor * sum_of_squares(x, tile.starts[lane] // SUPER * SUPER) / np.float32(SUPER)
            for i in range(lanes):
                sigmas[lane + i] = sigma
    if weights.size == 0:
        for i in range(n):
            v = load(xs, i * LANES)
            store(ws, i * LANES, splat(share) * load(sigmas, 0) + v * v if share != ZERO else v * v)
    else:
        spread(weights, tile.columns, 0, n, ws)
        weigh(xs, ws, n, load(sigmas, 0))
    return used // lanes


@piece
def hide_odd_sign(tile: Tile, first: int, sign: I32x16, odd: I32x16) -> I32x16:
    """Make the signs of eight weights from `first` on even: the weight that matters least keeps the wrong one.

    Its magnitude becomes negative. `odd` is 1 in lanes where that is needed. Returns the signs, of which seven count.
    """
    least, least_at = splat(INFINITY), splat(0)
    for i in range(8):
        x = load(tile.xs, (first + i) * LANES)
        loss = load(tile.ws, (first + i) * LANES) * x * x
        if i == 0:
            least = loss
        else:
            less = loss < least
            least = select(less, loss, least)
            least_at = select(less, splat(i), least_at)
    for i in range(8):
        x = load(tile.xs, (first + i) * LANES)
        store(tile.xs, (first + i) * LANES, select((odd == splat(1)) & (least_at == splat(i)), -x, x))
    return (sign ^ (odd << least_at)) & splat(127)


@piece
def take_signs(tile: Tile) -> F32x16:
    """Make the weights of `tile` magnitudes, and keep their signs. Returns the largest of each lane."""
    zero = splat(ZERO)
    largest = zero
    for k in range(tile.n // 8):
        sign, odd = splat(0), splat(0)
        for i in range(8):
            at = (8 * k + i) * LANES
            x = load(tile.xs, at)
            flipped = select(x >= zero, splat(0), splat(1))
            sign = sign | (flipped << splat(i))
            odd = odd ^ flipped
            store(tile.xs, at, select(x >= zero, x, -x))
        if tile.even:
            sign = hide_odd_sign(tile, 8 * k, sign, odd)
        store(tile.signs, k * LANES, sign)
        for i in range(8):
            largest = maximum(largest, load(tile.xs, (8 * k + i) * LANES))
    return largest


@piece
def rounded_code(xs: Floats, first: int, inverse: F32x16, shape: Shape) -> I32x16:
    """The code of the group of weights from `first` on, rounded to levels 0..top, which stand for 1, 3, 5..."""
    code = splat(0)
    for i in range(shape.dim):
        level = nearest_ints(splat(HALF) * (inverse * load(xs, (first + i) * LANES) - splat(ONE)))
        code = code | (maximum(splat(0), minimum(splat(shape.top), level)) << splat(shape.width * i))
    return code


@piece
def square_terms(
    xs: Floats, us: Floats, first: int, lane: int, scale: np.float32, levels: F32x16, tables: Floats, dim: int
) -> None:
    """The terms `u * (scale * level - x)**2` of one lane's group from weight `first` on, for eight levels each."""
    scaled = splat(scale) * levels
    for i in range(0, dim, 2):
        at = (first + i) * LANES + lane
        diff = scaled - pair(xs[at], xs[at + LANES])
        store(tables, 8 * i, pair(us[at], us[at + LANES]) * diff * diff)


@piece
def nearest_point(lists: Codes, place: int, tables: Floats, dim: int, width: int) -> tuple[int, np.float32]:
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
def nearest_points(
    run: Run, start: int, trials: Trials, tile: Tile, lists: Codes, shape: Shape, terms: Floats
) -> I32x16:
    """The nearest neighbours of sixteen trials from `start` on: a trial in each lane.

    Candidates come one after another, so that their order decides between equals.
    """
    mask, first = (1 << shape.width) - 1, run.group * shape.dim
    scale = load(trials.scales, scale_position(trials, run.lane, start))
    for level in range(shape.top + 1):
        scaled = scale * splat(np.float32(2 * level + 1))
        if shape.dim == 4:  # too many levels to keep the terms of all
            store(terms, level * LANES, scaled)
        else:
            for i in range(shape.dim):
                source = (first + i) * LANES + run.lane
                diff = scaled - splat(tile.xs[source])
                store(terms, (i * (mask + 1) + level) * LANES, splat(tile.roots[source]) * diff * diff)
    at = np.int64(run.place >> 10) * LANES
    best = splat(INFINITY)
    codes = splat(np.int32(lists[at]))
    for j in range(at, at + np.int64(run.place & 1023)):
        code = np.int64(lists[j])
        distance = splat(ZERO)
        for i in range(shape.dim):
            level = (code >> (shape.width * i)) & mask
            if shape.dim == 4:
                source = (first + i) * LANES + run.lane
                diff = load(terms, level * LANES) - splat(tile.xs[source])
                term = splat(tile.roots[source]) * diff * diff
            else:
                term = load(terms, (i * (mask + 1) + level) * LANES)
            distance = term if i == 0 else distance + term
        nearer = distance < best
        best = select(nearer, distance, best)
        codes = select(nearer, splat(code), codes)
    return codes


@piece
def search_all(run: Run, trials: Trials, tile: Tile, work: Work, grid: Grid, shape: Shape) -> None:
    """Replace the codes of a run by a search for each of its trials, sixteen at a time."""
    for start in range(run.first, run.end, LANES):
        codes = nearest_points(run, start, trials, tile, grid.lists, shape, work.terms)
        store(work.winners, 0, codes | splat(REPLACED))
        for i in range(minimum(LANES, run.end - start)):
            trials.codes[code_position(trials, run.group, start + i) + run.lane] = work.winners[i]


@piece
def search_ends(run: Run, trials: Trials, tile: Tile, work: Work, grid: Grid, shape: Shape) -> None:
    """Replace the codes of a run by searches at its ends, and between ends that do not agree for sure.

    `known` is the last trial up to which all is done, `ends` a stack of the trials to go on with, the next on top.
    """
    levels = to_float(((lane_numbers() & splat((1 << shape.width) - 1)) << splat(1)) + splat(1))
    slack = work.slack[run.group * LANES + run.lane]
    work.ends[0], work.ends[1] = run.end - 1, run.first
    depth, known = minimum(run.end - 1 - run.first, 1), run.first
    while depth >= 0:
        end = work.ends[depth]
        here = code_position(trials, run.group, end) + run.lane
        if trials.codes[here] < REPLACED:
            scale = trials.scales[scale_position(trials, run.lane, end)]
            first = run.group * shape.dim
            square_terms(tile.xs, tile.roots, first, run.lane, scale, levels, work.tables, shape.dim)
            point, margin = nearest_point(grid.lists, run.place, work.tables, shape.dim, shape.width)
            trials.codes[here] = point | REPLACED
            work.sure[end] = 1 if margin > slack else 0
        known_at = code_position(trials, run.group, known) + run.lane
        alike = trials.codes[here] == trials.codes[known_at] and work.sure[end] + work.sure[known] == 2
        if alike or end - known <= 1:
            for at in range(known_at + LANES, here, LANES):
                trials.codes[at] = trials.codes[here]
            known = end
            depth -= 1
        else:
            depth += 1
            work.ends[depth] = (known + end) // 2


@piece
def replace_by_points(trials: Trials, tile: Tile, work: Work, grid: Grid, shape: Shape) -> None:
    """Replace the codes that are no grid points by their nearest neighbours, in all trials of all lanes."""
    for group in range(tile.n // shape.dim):
        for lane in range(LANES):
            base = code_position(trials, group, 0) + lane
            first = 0
            while first < trials.n:
                code = trials.codes[base + first * LANES]
                end = first + 1
                while end < trials.n and trials.codes[base + end * LANES] == code:
                    end += 1
                place = grid.where[code]
                if place >= 0:
                    run = Run(group, lane, first, end, place)
                    if end - first > 1 and place & 1023 <= LANES:
                        search_all(run, trials, tile, work, grid, shape)
                    else:
                        search_ends(run, trials, tile, work, grid, shape)
                first = end


@piece
def fit(trials: Trials, trial: int, tile: Tile, shape: Shape) -> tuple[F32x16, F32x16]:
    """The sums of w*x*q and of w*q*q for the codes of one trial."""
    sum_qx, sum_q2 = splat(ZERO), splat(ZERO)
    for k in range(tile.n // shape.dim):
        doubled = load(trials.codes, code_position(trials, k, trial)) << splat(1)
        for i in range(shape.dim):
            at = (k * shape.dim + i) * LANES
            q = to_float(((doubled >> splat(shape.width * i)) & splat(2 * (1 << shape.width) - 2)) | splat(1))
            w = load(tile.ws, at)
            sum_qx = sum_qx + w * load(tile.xs, at) * q
            sum_q2 = sum_q2 + w * q * q
    return sum_qx, sum_q2


@piece
def weigh_distances(tile: Tile, work: Work, shape: Shape, longest: F32x16) -> None:
    """The roots of the importance, and the slack of each group: see the top. `longest` is the largest scaled level."""
    for k in range(tile.n // shape.dim):
        total, most = splat(ZERO), splat(ZERO)
        for i in range(shape.dim):
            at = (k * shape.dim + i) * LANES
            root = sqrt(load(tile.ws, at))
            store(tile.roots, at, root)
            reach = longest + absolute(load(tile.xs, at))
            most = maximum(most, reach)
            total = total + root * reach * reach
        safe = (total > splat(LEAST_SUM)) & (most < splat(MOST))
        store(work.slack, k * LANES, select(safe, total * splat(MARGIN), splat(INFINITY)))


@piece
def round_trials(
    trials: Trials, tile: Tile, work: Work, shape: Shape, extreme: F32x16, middle: int, spacing: np.float32
) -> None:
    """The scale of each trial and the codes that it rounds to. `extreme` is the highest level's in the middle trial."""
    for trial in range(trials.n):
        inverse = splat(np.float32(highest(shape)) + np.float32(trial - middle) * spacing) / extreme
        put_scales(trials, trial, splat(ONE) / inverse, work)
        for k in range(tile.n // shape.dim):
            code = rounded_code(tile.xs, k * shape.dim, inverse, shape)
            store(trials.codes, code_position(trials, k, trial), code)


@piece
def choose_trial(trials: Trials, chosen: Trials, tile: Tile, shape: Shape, scale: F32x16, again: int) -> F32x16:
    """The scale that fits best, `scale` where none does. Its codes become the `chosen` ones."""
    best = splat(ZERO)
    groups = tile.n // shape.dim
    for k in range(groups):
        store(chosen.codes, k * LANES, splat(REPLACED if again == ROUND_ANY else 0))
    for trial in range(trials.n):
        sum_qx, sum_q2 = fit(trials, trial, tile, shape)
        better = (sum_q2 > splat(ZERO)) & (sum_qx * sum_qx > best * sum_q2)
        if bits(better):
            this_scale = sum_qx / sum_q2
            scale = select(better, this_scale, scale)
            best = select(better, this_scale * sum_qx, best)
            for k in range(groups):
                code = load(trials.codes, code_position(trials, k, trial))
                store(chosen.codes, k * LANES, select(better, code, load(chosen.codes, k * LANES)))
    return scale


@piece
def round_again(chosen: Trials, tile: Tile, work: Work, shape: Shape, scale: F32x16, again: int) -> Mask16:
    """Round the chosen codes that `again` says with the scale that was best for them. Returns in which lanes."""
    groups = tile.n // shape.dim
    lanes = scale > splat(ZERO)
    if again != ROUND_ALL:
        replaced = splat(0)
        for k in range(groups):
            replaced = replaced | load(chosen.codes, k * LANES)
        lanes = lanes & (replaced >= splat(REPLACED))
    put_scales(chosen, 0, scale, work)
    for k in range(groups):
        old = load(chosen.codes, k * LANES)
        new = rounded_code(tile.xs, k * shape.dim, splat(ONE) / scale, shape)
        use = lanes & (old >= splat(REPLACED)) if again == ROUND_REPLACED else lanes
        store(chosen.codes, k * LANES, select(use, new, old & splat(REPLACED - 1)))
    return lanes


@piece
def grid_search(
    tile: Tile,
    trials: Trials,
    chosen: Trials,
    work: Work,
    grid: Grid,
    shape: Shape,
    extreme: F32x16,
    scale: F32x16,
    spacing: np.float32,
    again: int,
) -> F32x16:
    """The scales of sixteen sub-blocks; the codes of their grid points are the `chosen` ones.

    `extreme` stands for the highest level in the middle one of the trials, whose inverse scales are `spacing` apart;
    `scale` answers where no trial fits. Then the best scale rounds once more: what, `again` says (ROUND_ALL, ROUND_ANY,
    which is also where no trial fits, or ROUND_REPLACED), and the scale is fitted to what came of it.
    """
    center, middle = np.float32(highest(shape)), trials.n // 2
    largest_scale = splat(ONE) / (splat(center - np.float32(middle) * spacing) / extreme)
    weigh_distances(tile, work, shape, largest_scale * splat(center))
    round_trials(trials, tile, work, shape, extreme, middle, spacing)
    replace_by_points(trials, tile, work, grid, shape)
    scale = choose_trial(trials, chosen, tile, shape, scale, again)
    lanes = round_again(chosen, tile, work, shape, scale, again)
    replace_by_points(chosen, tile, work, grid, shape)
    sum_qx, sum_q2 = fit(chosen, 0, tile, shape)
    return select(lanes & (sum_q2 > splat(ZERO)), sum_qx / sum_q2, scale)


@piece
def settle(scale: F32x16, empty: Mask16, tile: Tile, codes: Ints, groups: int) -> F32x16:
    """Make scales positive by inverting signs, and make empty lanes zero: their signs, codes and scales."""
    zero = splat(ZERO)
    negative = scale < zero
    for k in range(tile.n // 8):
        sign = load(tile.signs, k * LANES)
        sign = select(negative, (sign ^ splat(-1)) & splat(127 if tile.even else 255), sign)
        store(tile.signs, k * LANES, select(empty, splat(0), sign))
    for k in range(groups):
        store(codes, k * LANES, select(empty, splat(0), load(codes, k * LANES) & splat(REPLACED - 1)))
    store(tile.empty, 0, select(empty, splat(1), splat(0)))
    return select(empty, zero, select(negative, -scale, scale))


@piece
def start_with_largest(tile: Tile, trials: Trials, largest: F32x16, fmt: GridFormat) -> tuple[F32x16, F32x16, Mask16]:
    """The largest magnitude is the highest level."""
    empty = largest < splat(fmt.epsilon)
    extreme = select(empty, splat(ONE), largest)
    return extreme, extreme / splat(np.float32(highest(fmt.shape))), empty


@piece
def encode_on_grid(x: Floats, out: Bytes, n_per_row: int, weights: Floats, grid: Grid, fmt: GridFormat) -> None:
    """Encode super-blocks, as many at a time as fill the lanes."""
    tile = Tile(
        fmt.n, fmt.even,
        scratch(np.float32, fmt.n), scratch(np.float32, fmt.n), scratch(np.float32, fmt.n),
        scratch(np.int32, 4), scratch(np.int32, 1),
        scratch(np.int64, 1), scratch(np.int64, 1), scratch(np.float32, 1),
    )  # fmt: skip
    trials = Trials(fmt.n_trials, scratch(np.int32, fmt.code_vectors), scratch(np.float32, fmt.scale_vectors))
    chosen = Trials(1, scratch(np.int32, 8), scratch(np.float32, 33))
    work = Work(
        scratch(np.float32, 8), scratch(np.float32, 5), scratch(np.float32, 32),
        scratch(np.int32, 1), scratch(np.int64, 1), scratch(np.uint8, 2),
    )  # fmt: skip
    found = scratch(np.float32, 1)
    groups = fmt.n // fmt.shape.dim
    for first in range(0, x.size // SUPER, fmt.supers):
        count = take_tile(x, first, n_per_row, weights, fmt.factor, fmt.share, tile)
        extreme, initial, empty = fmt.start(tile, trials, take_signs(tile), fmt)
        scale = grid_search(
            tile, trials, chosen, work, grid, fmt.shape, extreme, initial, fmt.spacing, np.int64(fmt.again)
        )
        store(found, 0, settle(scale, empty, tile, chosen.codes, np.int64(groups)))
        for i in range(count):
            fmt.put(out, first + i, i * LANES // fmt.supers, tile, chosen.codes, found, grid.index_of)


@piece
def most_of(found: Floats, first: int, n: int) -> np.float32:
    """The largest of `n` scales, none below zero."""
    most = ZERO
    for j in range(n):
        most = maximum(found[first + j], most)
    return most


@piece
def scale_code(scale: np.float32, inverse: np.float32, top: int) -> int:
    """A sub-block's scale as a level 0..top, which stand for 1, 3, 5... of the super-block's."""
    return level_of(inverse * scale, HALF, ONE, 0, top)


@piece
def put_scale_codes(found: Floats, first: int, n: int, inverse: np.float32, out: Bytes, at: int) -> None:
    """The codes 0..15 of `n` scales, two in a byte."""
    for j in range(0, n, 2):
        low, high = scale_code(found[first + j], inverse, 15), scale_code(found[first + j + 1], inverse, 15)
        out[at + j // 2] = np.uint8(low | (high << 4))


@piece
def put_signs_and_scale(signs: Ints, lane: int, scale: np.float32, inverse: np.float32, out: Bytes, at: int) -> None:
    """Four bytes: the signs of four groups, 7 bits each, and in the highest bits the code 0..15 of the scale."""
    word = np.int64(scale_code(scale, inverse, 15)) << 28
    for k in range(4):
        word |= np.int64(signs[k * LANES + lane]) << (7 * k)
    put_word(out, at, word)
