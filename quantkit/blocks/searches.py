"""The scale searches that block formats share, sixteen sub-blocks at once.

A search looks for the scale, and for affine formats the minimum, that make the rounded sub-block closest to the
original by weighted square error. Algorithms and orders of operations are those of ggml-quants.c, named in each
docstring. Sub-blocks are stored transposed: element i of sixteen sub-blocks is `xs[16 * i : 16 * i + 16]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from quantkit.blocks.lane_memory import load, store
from quantkit.blocks.lanes import (
    ALL,
    LANES,
    ONE,
    ZERO,
    F32x16,
    Floats,
    I32x16,
    Ints,
    Mask16,
    absolute,
    as_float_bits,
    as_int_bits,
    bits,
    float_bits,
    maximum,
    minimum,
    select,
    splat,
    sqrt,
    to_float,
)
from quantkit.compile.kernel import piece

# Adding 1.5 * 2**23 leaves the number, rounded half to even, in the low bits: right up to 2**22 in magnitude.
MAGIC = np.float32(12582912.0)
MAGIC_LIMIT = np.float32(4194303.0)
GROUP_MAX_EPS = np.float32(1e-15)


@piece
def nearest_int(value: np.float32) -> int:
    """A float32 rounded half to even as the reference does it, with its results beyond 2**22 and for NaN."""
    return (float_bits(value + MAGIC) & np.int32(0x007FFFFF)) - np.int32(0x00400000)


@piece
def nearest_ints(values: F32x16) -> I32x16:
    """`nearest_int` of each lane."""
    return (as_int_bits(values + splat(MAGIC)) & splat(0x007FFFFF)) - splat(0x00400000)


@piece
def clamped_ints(values: F32x16, low: int, high: int) -> I32x16:
    """`nearest_int` of each lane, held between the integers `low` and `high`."""
    return maximum(splat(low), minimum(splat(high), nearest_ints(values)))


@piece
def levels(values: F32x16, low: int, high: int, tame: bool) -> F32x16:
    """`clamped_ints` as floats. `tame` values are known to lie within 2**22, which saves two instructions."""
    if not tame:
        return to_float(clamped_ints(values, low, high))
    magic = splat(MAGIC)
    return minimum(maximum(values + magic, splat(MAGIC + np.float32(low))), splat(MAGIC + np.float32(high))) - magic


@piece
def reciprocals(x: F32x16) -> F32x16:
    """1 / x, and 0 for 0."""
    return select(x != splat(ZERO), splat(ONE) / x, splat(ZERO))


@piece
def sum_of_squares(xs: Floats, n: int) -> F32x16:
    """The sum of squares of each lane's first `n` elements, added up in order."""
    total = splat(ZERO)
    for i in range(n):
        x = load(xs, i * LANES)
        total = total + x * x
    return total


@piece
def weigh(xs: Floats, ws: Floats, n: int, sigma: F32x16) -> F32x16:
    """Turn importances in `ws` into weights: times sqrt(sigma + x squared). Returns their sums."""
    total = splat(ZERO)
    for i in range(n):
        x = load(xs, i * LANES)
        w = load(ws, i * LANES) * sqrt(sigma + x * x)
        store(ws, i * LANES, w)
        total = total + w
    return total


@piece
def affine_sums(
    xs: Floats, ws: Floats, ls: Floats, n: int, inverse: F32x16, low: F32x16, nmax: int, tame: bool
) -> tuple[F32x16, F32x16, F32x16]:
    """Leave the levels of one inverse scale in `ls`; return the sums of w l, w l l and w x l. `tame`: see `levels`."""
    sum_l, sum_l2, sum_xl = splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(n):
        x = load(xs, i * LANES)
        level = levels(inverse * (x - low), 0, nmax, tame)
        store(ls, i * LANES, level)
        weighted = load(ws, i * LANES) * level
        sum_l = sum_l + weighted
        sum_l2 = sum_l2 + weighted * level
        sum_xl = sum_xl + weighted * x
    return sum_l, sum_l2, sum_xl


class AffineTrials(NamedTuple):
    """Which inverse scales an affine search tries, and what it counts.

    The smallest weight of a sub-block is level 0. The largest would be the highest level, `top`: it is tried at
    `top + first`, at one `step` more, and so on, `n_trials` times.
    """

    top: int
    first: np.float32
    step: np.float32
    n_trials: int
    absolute: bool = False  # whether it counts absolute instead of square errors


class Affine(NamedTuple):
    """What an affine search has found, in each lane.

    `x ~ scale * level + low`, and the best levels are `clamp(nearest_int(inverse * (x - base)))`.
    """

    scale: F32x16
    low: F32x16
    inverse: F32x16
    base: F32x16


@piece
def affine_search(xs: Floats, ws: Floats, ls: Floats, n: int, trials: AffineTrials) -> Affine:
    """Scale and minimum for `x ~ scale * l + low` (make_qkx2_quants and make_qkx3_quants).

    `ws` are the weights, `ls` scratch of the size of `xs`.
    """
    zero, nmax = splat(ZERO), trials.top
    nmaxs = splat(np.float32(nmax))
    x = load(xs, 0)
    w = load(ws, 0)
    lowest, high, sum_w, sum_x = x, x, w, w * x
    for i in range(1, n):
        x = load(xs, i * LANES)
        w = load(ws, i * LANES)
        lowest = minimum(x, lowest)
        high = maximum(x, high)
        sum_w = sum_w + w
        sum_x = sum_x + w * x
    data_low = select(lowest > zero, zero, lowest)
    flat = high == data_low
    # Flat lanes are answered at the end; until then give them a range that keeps their numbers small.
    low = select(flat, zero, data_low)
    high = select(flat, splat(ONE), high)

    inverse = nmaxs / (high - low)
    scale = splat(ONE) / inverse
    best_inverse, best_base = inverse, low
    error = zero
    for i in range(n):
        x = load(xs, i * LANES)
        level = levels(inverse * (x - low), 0, nmax, False)
        diff = scale * level + low - x
        error = error + load(ws, i * LANES) * (absolute(diff) if trials.absolute else diff * diff)
    best_error = error

    for trial in range(trials.n_trials):
        inverse = splat(trials.first + trials.step * np.float32(trial) + np.float32(nmax)) / (high - low)
        # Rounding is monotonic, so when both ends of the data are within 2**22, all of it is.
        ends = maximum(absolute(inverse * (high - low)), absolute(inverse * (lowest - low)))
        if bits(ends <= splat(MAGIC_LIMIT)) == ALL:
            sum_l, sum_l2, sum_xl = affine_sums(xs, ws, ls, n, inverse, low, nmax, True)
        else:
            sum_l, sum_l2, sum_xl = affine_sums(xs, ws, ls, n, inverse, low, nmax, False)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = this_low > zero
        this_low = select(above, zero, this_low)
        this_scale = select(above, sum_xl / sum_l2, this_scale)
        error = zero
        for i in range(n):
            diff = this_scale * load(ls, i * LANES) + this_low - load(xs, i * LANES)
            error = error + load(ws, i * LANES) * (absolute(diff) if trials.absolute else diff * diff)
        better = (determinant > zero) & (error < best_error)
        best_inverse = select(better, inverse, best_inverse)
        best_base = select(better, low, best_base)
        best_error = select(better, error, best_error)
        scale = select(better, this_scale, scale)
        low = select(better, this_low, low)

    scale = select(flat, zero, scale)
    low = select(flat, data_low, low)
    best_inverse = select(flat, zero, best_inverse)
    best_base = select(flat, data_low, best_base)
    return Affine(scale, low, best_inverse, best_base)


@piece
def peak(xs: Floats, n: int) -> tuple[F32x16, F32x16]:
    """The largest magnitude, and the element that has it, the first of equals."""
    amax, extreme = splat(ZERO), splat(ZERO)
    for i in range(n):
        x = load(xs, i * LANES)
        ax = absolute(x)
        larger = ax > amax
        amax = select(larger, ax, amax)
        extreme = select(larger, x, extreme)
    return amax, extreme


@piece
def extremes(xs: Floats, n: int) -> tuple[F32x16, Mask16]:
    """The element of largest magnitude, the first of equals, and the mask of sub-blocks that are all but zero.

    There the extreme is 1, to keep what is computed from it small.
    """
    amax, extreme = peak(xs, n)
    empty = amax < splat(GROUP_MAX_EPS)
    return select(empty, splat(ONE), extreme), empty


@piece
def signed_sums(
    xs: Floats, ws: Floats | None, ls: Floats | None, n: int, inverse: F32x16, nmax: int, tame: bool
) -> tuple[F32x16, F32x16]:
    """The sums of w x l and w l l for one inverse scale, whose levels go to `ls` unless it is None.

    `ws` are the weights, or None for x squared. `tame` as in `levels`.
    """
    sum_lx, sum_l2 = splat(ZERO), splat(ZERO)
    for i in range(n):
        x = load(xs, i * LANES)
        level = levels(inverse * x, -nmax, nmax - 1, tame)
        if ls is not None:
            store(ls, i * LANES, level)
        w = x * x if ws is None else load(ws, i * LANES)
        sum_lx = sum_lx + w * x * level
        sum_l2 = sum_l2 + w * level * level
    return sum_lx, sum_l2


class Signed(NamedTuple):
    """What a signed search has found, in each lane: `x ~ scale * level`, the best levels being those of `inverse`.

    Sub-blocks that are all but zero are `empty`; there both are 0.
    """

    scale: F32x16
    inverse: F32x16
    empty: Mask16


@piece
def signed_search(xs: Floats, ws: Floats | None, n: int, nmax: int) -> Signed:
    """Scale for `x ~ scale * l`, l in -nmax..nmax-1 (make_qx_quants with rmse_type 1).

    `ws` are the weights, or None for x squared.
    """
    zero = splat(ZERO)
    extreme, empty = extremes(xs, n)
    best, scale, best_inverse = zero, zero, zero
    for trial in range(19):
        # The reference tries the plain scale first, then the 18 around it.
        step = np.float32(0) if trial == 0 else np.float32(trial - 10 if trial < 10 else trial - 9)
        inverse = splat(-(np.float32(nmax) + np.float32(0.1) * step)) / extreme
        if bits(absolute(inverse * extreme) <= splat(MAGIC_LIMIT)) == ALL:
            sum_lx, sum_l2 = signed_sums(xs, ws, None, n, inverse, nmax, True)
        else:
            sum_lx, sum_l2 = signed_sums(xs, ws, None, n, inverse, nmax, False)
        if trial == 0:
            scale = select(sum_l2 != zero, sum_lx / sum_l2, zero)
            best = scale * sum_lx
            best_inverse = inverse
        else:
            better = (sum_l2 > zero) & (sum_lx * sum_lx > best * sum_l2)
            this_scale = sum_lx / sum_l2
            scale = select(better, this_scale, scale)
            best = select(better, this_scale * sum_lx, best)
            best_inverse = select(better, inverse, best_inverse)
    return Signed(select(empty, zero, scale), select(empty, zero, best_inverse), empty)


@piece
def first_levels(xs: Floats, ls: Floats, n: int, nmax: int) -> tuple[F32x16, F32x16, Mask16]:
    """Levels, stored in `ls`, that put the extreme at -nmax; and the sums of w x l and w l l, w being x squared."""
    extreme, empty = extremes(xs, n)
    sum_lx, sum_l2 = signed_sums(xs, None, ls, n, splat(-np.float32(nmax)) / extreme, nmax, False)
    return sum_lx, sum_l2, empty


@piece
def refine_level(x: F32x16, old: F32x16, sum_lx: F32x16, sum_l2: F32x16, nmax: int) -> tuple[F32x16, F32x16, F32x16]:
    """Move one level to where the others want it, if that is better. Returns by how much, and the sums."""
    w = x * x
    wx = w * x
    rest_lx = sum_lx - wx * old
    rest_l2 = sum_l2 - w * old * old
    level = levels(x * rest_l2 / rest_lx, -nmax, nmax - 1, False)
    new_lx = rest_lx + wx * level
    new_l2 = rest_l2 + w * level * level
    # A lane that must not move gets a score that exceeds nothing. Joining masks with & would be clearer, and a third
    # slower: LLVM keeps joined masks in bytes, and the way there and back is on the critical path. That these scores
    # are three different ones keeps LLVM from joining the masks itself.
    score = select(level != old, new_lx * new_lx * sum_l2, as_float_bits(splat(0x7FC00001)))
    score = select(rest_lx > splat(ZERO), score, as_float_bits(splat(0x7FC00002)))
    score = select(new_l2 > splat(ZERO), score, as_float_bits(splat(0x7FC00003)))
    better = score > sum_lx * sum_lx * new_l2
    # And selecting between the two levels would become a masked store, which is slow on some processors.
    change = select(better, level - old, splat(ZERO))
    return change, select(better, new_lx, sum_lx), select(better, new_l2, sum_l2)


@piece
def refined_search(xs: Floats, ys: Floats, xls: Floats, yls: Floats, n: int, nmax: int) -> tuple[F32x16, F32x16]:
    """Scales for `x ~ scale * l`, l in -nmax..nmax-1, by moving one level at a time (make_q3_quants with do_rmse).

    Leaves the levels, counted from 0 (0 too where the sub-block is all but zero), as float32 in `xls`. Each step waits
    for the one before, so two sets of sub-blocks, `xs` and `ys`, take turns.
    """
    x_lx, x_l2, x_empty = first_levels(xs, xls, n, nmax)
    y_lx, y_l2, y_empty = first_levels(ys, yls, n, nmax)
    # A lane in which nothing changed stays as it is in later rounds, so all may go on until the last has settled.
    for _ in range(5):
        moved = splat(ZERO)
        for i in range(n):
            x_level, y_level = load(xls, i * LANES), load(yls, i * LANES)
            x_change, x_lx, x_l2 = refine_level(load(xs, i * LANES), x_level, x_lx, x_l2, nmax)
            y_change, y_lx, y_l2 = refine_level(load(ys, i * LANES), y_level, y_lx, y_l2, nmax)
            store(xls, i * LANES, x_level + x_change)
            store(yls, i * LANES, y_level + y_change)
            moved = moved + absolute(x_change) + absolute(y_change)
        if bits(moved != splat(ZERO)) == 0:
            break
    zero, middle = splat(ZERO), splat(np.float32(nmax))
    for i in range(n):
        store(xls, i * LANES, select(x_empty, zero, load(xls, i * LANES) + middle))
        store(yls, i * LANES, select(y_empty, zero, load(yls, i * LANES) + middle))
    x_scale = select(x_empty | ~(x_l2 > zero), zero, x_lx / x_l2)
    return x_scale, select(y_empty | ~(y_l2 > zero), zero, y_lx / y_l2)


@piece
def positive_search(xs: Floats, ws: Floats, codes: Ints, n: int, nmax: int) -> F32x16:
    """Scale for `x ~ scale * l`, l in 0..nmax, for x that should not be negative (make_qp_quants).

    `ws` are the weights. Leaves the levels, as the 8 bits that the reference keeps, in the int32 `codes`.
    """
    zero, byte, top = splat(ZERO), splat(0xFF), splat(nmax)
    most = zero
    for i in range(n):
        most = maximum(most, load(xs, i * LANES))
    empty = most < splat(GROUP_MAX_EPS)
    most = select(empty, splat(ONE), most)
    plain = splat(np.float32(nmax)) / most
    best_inverse, best = plain, zero
    for i in range(n):
        x = load(xs, i * LANES)
        level = to_float(nearest_ints(plain * x) & byte)
        diff = x - splat(ONE) / plain * level
        best = best + load(ws, i * LANES) * diff * diff
    for trial in range(-4, 5):
        if trial == 0:
            continue
        inverse = splat(np.float32(0.1) * np.float32(trial) + np.float32(nmax)) / most
        scale = splat(ONE) / inverse
        error = zero
        for i in range(n):
            x = load(xs, i * LANES)
            diff = x - scale * to_float(minimum(top, nearest_ints(inverse * x)))
            error = error + load(ws, i * LANES) * diff * diff
        better = error < best
        best = select(better, error, best)
        best_inverse = select(better, inverse, best_inverse)
    sum_lx, sum_l2 = zero, zero
    for i in range(n):
        x = load(xs, i * LANES)
        code = minimum(top, nearest_ints(best_inverse * x))
        store(codes, i * LANES, code & byte)
        level = to_float(code)
        w = load(ws, i * LANES)
        sum_lx = sum_lx + w * x * level
        sum_l2 = sum_l2 + w * level * level
    for _ in range(5):
        moved = np.uint32(0)
        for i in range(n):
            x = load(xs, i * LANES)
            w = load(ws, i * LANES)
            old_code = load(codes, i * LANES)
            old = to_float(old_code)
            rest_lx = sum_lx - w * x * old
            rest_l2 = sum_l2 - w * old * old
            code = minimum(top, nearest_ints(x * rest_l2 / rest_lx))
            better = (rest_lx > zero) & (rest_l2 > zero) & (code != old_code)
            if bits(better):
                level = to_float(code)
                new_lx = rest_lx + w * x * level
                new_l2 = rest_l2 + w * level * level
                better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
                sum_lx = select(better, new_lx, sum_lx)
                sum_l2 = select(better, new_l2, sum_l2)
                store(codes, i * LANES, select(better, code & byte, old_code))
                moved |= bits(better)  # also where -1 replaces the byte 255
        if moved == 0:
            break
    for i in range(n):
        store(codes, i * LANES, select(empty, splat(0), load(codes, i * LANES)))
    return select(empty | ~(sum_l2 > zero), zero, sum_lx / sum_l2)


@piece
def level_of(x: np.float32, inverse: np.float32, base: np.float32, low: int, high: int) -> int:
    """One level of a search's result: `clamp(nearest_int(inverse * (x - base)), low, high)`."""
    return maximum(np.int32(low), minimum(np.int32(high), nearest_int(inverse * (x - base))))
