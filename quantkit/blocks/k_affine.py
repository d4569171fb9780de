"""The K-quants with a scale and a minimum for each sub-block: Q2_K, Q4_K, Q5_K.

Layouts: ggml-common.h. Algorithms: quantize_row_*_ref and quantize_row_*_impl in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, put_half
from quantkit.blocks.lane_memory import load, part, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ZERO,
    Bytes,
    F32x16,
    Floats,
    Ints,
    absolute,
    maximum,
    minimum,
    select,
    splat,
    sqrt,
    to_float,
)
from quantkit.blocks.layout import Layout
from quantkit.blocks.searches import (
    AffineTrials,
    affine_search,
    clamped_ints,
    level_of,
    nearest_ints,
    positive_search,
    sum_of_squares,
    weigh,
)
from quantkit.blocks.tiles import SUPER, block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.fixed import Fixed
from quantkit.compile.kernel import kernel, piece

Q2, Q4, Q5 = GGMLType.Q2_K.layout, GGMLType.Q4_K.layout, GGMLType.Q5_K.layout


@piece
def put_scales(out: Bytes, at: int, j: int, ls: int, lm: int) -> None:
    """Pack the 6-bit scale and minimum of sub-block `j` into the 12 bytes at `at`, in order of j (Q4_K, Q5_K)."""
    if j < 4:
        out[at + j] = np.uint8(ls)
        out[at + j + 4] = np.uint8(lm)
    else:
        out[at + j + 4] = np.uint8((ls & 0xF) | ((lm & 0xF) << 4))
        out[at + j - 4] |= np.uint8((ls >> 4) << 6)
        out[at + j] |= np.uint8((lm >> 4) << 6)


@piece
def get_scales(data: Bytes, at: int, j: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block `j`."""
    if j < 4:
        return np.int32(data[at + j] & 63), np.int32(data[at + j + 4] & 63)
    scale = (data[at + j + 4] & 0xF) | ((data[at + j - 4] >> 6) << 4)
    low = (data[at + j + 4] >> 4) | ((data[at + j] >> 6) << 4)
    return np.int32(scale), np.int32(low)


@piece
def put_head_6(out: Bytes, at: int, d: np.float32, dmin: np.float32, codes: Ints, lane: int) -> None:
    """The first 16 bytes of Q4_K and of Q5_K, which are alike: from the codes of 8 scales and 8 minimums in `lane`."""
    put_half(out, at + Q4.d, d)
    put_half(out, at + Q4.dmin, dmin)
    for j in range(8):
        put_scales(out, at + Q4.scales, j, codes[j * LANES + lane], codes[(8 + j) * LANES + lane])


@piece
def put_clamped_head_6(out: Bytes, at: int, d: np.float32, dmin: np.float32, codes: Ints, lane: int) -> None:
    """`put_head_6` for Q5_K, which alone clamps the codes that a search has wrapped around 0."""
    for j in range(16):
        codes[j * LANES + lane] = minimum(np.int32(63), codes[j * LANES + lane])
    put_head_6(out, at, d, dmin, codes, lane)


@piece
def get_step_6(data: Bytes, at: int, j: int) -> tuple[np.float32, np.float32]:
    """The scale and the minimum of sub-block `j` of Q4_K and Q5_K, as float32."""
    scale, low = get_scales(data, at + Q4.scales, j)
    return get_half(data, at + Q4.d) * np.float32(scale), get_half(data, at + Q4.dmin) * np.float32(low)


@piece
def put_head_4(out: Bytes, at: int, d: np.float32, dmin: np.float32, codes: Ints, lane: int) -> None:
    """The scales, minimums and float16 of Q2_K, from the codes of 16 scales and 16 minimums in `lane`."""
    put_half(out, at + Q2.d, d)
    put_half(out, at + Q2.dmin, dmin)
    for j in range(16):
        out[at + Q2.scales + j] = np.uint8((codes[j * LANES + lane] | (codes[(16 + j) * LANES + lane] << 4)) & 0xFF)


@piece
def get_step_4(data: Bytes, at: int, j: int) -> tuple[np.float32, np.float32]:
    """The scale and the minimum of sub-block `j` of Q2_K, as float32."""
    code = np.int32(data[at + Q2.scales + j])
    return get_half(data, at + Q2.d) * np.float32(code & 15), get_half(data, at + Q2.dmin) * np.float32(code >> 4)


@piece
def pack_q2(levels: Bytes, out: Bytes, at: int) -> None:
    """Four runs of 32 weights share 32 bytes, the first in the lowest bits."""
    for half in range(2):
        for i in range(0, 32, LANES):
            v = half * 128 + i
            low = load(levels, v) | (load(levels, v + 32) << splat(2))
            high = (load(levels, v + 64) << splat(4)) | (load(levels, v + 96) << splat(6))
            store(out, at + Q2.qs + half * 32 + i, low | high)


@piece
def pack_q4(levels: Bytes, out: Bytes, at: int) -> None:
    """Two sub-blocks share 32 bytes: the even one in the low nibbles."""
    for pair in range(4):
        for i in range(0, 32, LANES):
            low = load(levels, pair * 64 + i)
            high = load(levels, pair * 64 + 32 + i)
            store(out, at + Q4.qs + pair * 32 + i, low | (high << splat(4)))


@piece
def pack_q5(levels: Bytes, out: Bytes, at: int) -> None:
    """As Q4_K, the fifth bits apart: sub-block j's are bit j of 32 bytes before."""
    for i in range(0, 32, LANES):
        top = splat(0)
        for pair in range(4):
            low = load(levels, pair * 64 + i)
            high = load(levels, pair * 64 + 32 + i)
            store(out, at + Q5.qs + pair * 32 + i, (low & splat(15)) | ((high & splat(15)) << splat(4)))
            top = top | ((low >> splat(4)) << splat(2 * pair)) | ((high >> splat(4)) << splat(2 * pair + 1))
        store(out, at + Q5.qh + i, top)


@piece
def weigh_by_size(xs: Floats, n: int, ws: Floats) -> None:
    """Without importance weights, Q4_K and Q5_K weigh by the sub-block's root mean square plus the magnitude."""
    average = sqrt(sum_of_squares(xs, n) / splat(np.float32(n)))
    for i in range(n):
        store(ws, i * LANES, average + absolute(load(xs, i * LANES)))


@piece
def weigh_by_magnitude(xs: Floats, n: int, ws: Floats) -> None:
    """Without importance weights, Q2_K weighs by the magnitude."""
    for i in range(n):
        store(ws, i * LANES, absolute(load(xs, i * LANES)))


@piece
def code_by_largest(values: Floats, codes: Ints, n: int, top: int) -> F32x16:
    """Quantize the scales (or minimums) of each super-block so that the largest is `top`. Returns the steps."""
    zero, limit = splat(ZERO), splat(np.float32(top))
    most = zero
    for j in range(n):
        most = maximum(load(values, j * LANES), most)
    inverse = select(most > zero, limit / most, zero)
    for j in range(n):
        code = nearest_ints(inverse * load(values, j * LANES)) & splat(0xFF)
        store(codes, j * LANES, minimum(splat(top), code))
    return most / limit


@dataclass(frozen=True)
class AffineFormat(Fixed):
    """A format with scales and minimums, as `encode_affine` needs it."""

    layout: Layout
    n: int  # weights of a sub-block
    top_code: int  # the highest code of a scale or minimum
    factor: np.float32  # importance weights grow with so many mean squares of the super-block
    plain: AffineTrials  # without importance weights; then weights are those of:
    weigh_plain: Any  # piece(xs, n, ws)
    weighted: AffineTrials
    put_head: Any  # piece(out, at, d, dmin, codes, lane): write scales and minimums
    get_step: Any  # piece(data, at, j): read those of a sub-block
    pack: Any  # piece(levels, out, at): lay out the levels

    @property
    def count(self) -> int:
        """How many sub-blocks a super-block has."""
        return SUPER // self.n


@piece
def encode_affine(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None, fmt: AffineFormat) -> None:
    """Encode super-blocks, sixteen at a time."""
    n, count, top = fmt.n, fmt.count, fmt.weighted.top
    starts, columns = scratch(np.int64, 1), scratch(np.int64, 1)
    xs = scratch(np.float32, SUPER)
    ws, ls = scratch(np.float32, fmt.n), scratch(np.float32, fmt.n)
    values = scratch(np.float32, 32)  # scales, then minimums, of up to 16 sub-blocks
    answers = scratch(np.float32, 32)  # inverse scales and bases of the best levels
    codes = scratch(np.int32, 32)
    sums = scratch(np.float32, fmt.count)
    steps = scratch(np.float32, 2)
    levels = scratch(np.uint8, 16)
    n_blocks = x.size // SUPER
    for first in range(0, n_blocks, LANES):
        used = block_starts(first, n_blocks, SUPER, n_per_row, starts, columns)
        spread(x, starts, 0, SUPER, xs)
        if weights is not None:
            sigma = splat(fmt.factor) * sum_of_squares(xs, SUPER) / splat(np.float32(SUPER))
        for j in range(count):
            xs_j = part(xs, j * n * LANES, n * LANES)
            if weights is None:
                fmt.weigh_plain(xs_j, n, ws)
                found = affine_search(xs_j, ws, ls, n, fmt.plain)
            else:
                spread(weights, columns, j * n, n, ws)
                store(sums, j * LANES, weigh(xs_j, ws, n, sigma))
                found = affine_search(xs_j, ws, ls, n, fmt.weighted)
            store(values, j * LANES, found.scale)
            store(values, (count + j) * LANES, -found.low)
            store(answers, j * LANES, found.inverse)
            store(answers, (count + j) * LANES, found.base)
        for which in range(2):  # scales, minimums
            some = part(values, which * count * LANES, count * LANES)
            some_codes = part(codes, which * count * LANES, count * LANES)
            if weights is None:
                store(steps, which * LANES, code_by_largest(some, some_codes, count, fmt.top_code))
            else:
                store(steps, which * LANES, positive_search(some, sums, some_codes, count, fmt.top_code))
        for lane in range(used):
            at, start = (first + lane) * fmt.layout.nbytes, (first + lane) * SUPER
            fmt.put_head(out, at, steps[lane], steps[LANES + lane], codes, lane)
            for j in range(count):
                step, low = fmt.get_step(out, at, j)
                if step != ZERO:
                    for i in range(j * n, (j + 1) * n, LANES):
                        level = clamped_ints((load(x, start + i) + splat(low)) / splat(step), 0, top)
                        store(levels, i, level)
                else:  # the search's own levels stay
                    inverse, base = answers[j * LANES + lane], answers[(count + j) * LANES + lane]
                    for i in range(j * n, (j + 1) * n):
                        levels[i] = level_of(x[start + i], inverse, base, 0, top)
            fmt.pack(levels, out, at)


@piece
def decode_6(data: Bytes, out: Floats, layout: Layout, five: bool) -> None:
    """Decode Q4_K and Q5_K, which has the fifth bits between its head and its nibbles."""
    for block in range(out.size // SUPER):
        at = block * layout.nbytes
        for j in range(8):
            step, low = get_step_6(data, at, j)
            source, to, shift = at + layout.qs + (j // 2) * 32, block * SUPER + j * 32, (j & 1) * 4
            for i in range(0, 32, LANES):
                level = (load(data, source + i) >> splat(shift)) & splat(15)
                if five:
                    level = level | (((load(data, at + Q5.qh + i) >> splat(j)) & splat(1)) << splat(4))
                store(out, to + i, splat(step) * to_float(level) - splat(low))


def _trials(top: int, first: float, count: int, absolute: bool = False) -> AffineTrials:
    return AffineTrials(top, np.float32(first), np.float32(0.1), count, absolute)


def _weighted_trials(top: int) -> AffineTrials:
    return AffineTrials(top, np.float32(-0.9), np.float32(0.05), 37)


Q2_K_FORMAT = AffineFormat(
    layout=Q2, n=16, top_code=15, factor=np.float32(1), plain=_trials(3, -0.5, 16, absolute=True),
    weigh_plain=weigh_by_magnitude, weighted=_weighted_trials(3),
    put_head=put_head_4, get_step=get_step_4, pack=pack_q2,
)  # fmt: skip
Q4_K_FORMAT = AffineFormat(
    layout=Q4, n=32, top_code=63, factor=np.float32(2), plain=_trials(15, -1, 21), weigh_plain=weigh_by_size,
    weighted=_weighted_trials(15), put_head=put_head_6, get_step=get_step_6, pack=pack_q4,
)  # fmt: skip
Q5_K_FORMAT = AffineFormat(
    layout=Q5, n=32, top_code=63, factor=np.float32(2), plain=_trials(31, -0.5, 16), weigh_plain=weigh_by_size,
    weighted=_weighted_trials(31), put_head=put_clamped_head_6, get_step=get_step_6, pack=pack_q5,
)  # fmt: skip


class Q2_K(Block, type=GGMLType.Q2_K):
    """2 bits with 4-bit scales and minimums for every 16 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q2_K_ref and quantize_row_q2_K_impl."""
        encode_affine(x, out, n_per_row, weights, Q2_K_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q2_K."""
        for block in range(out.size // SUPER):
            at = block * Q2.nbytes
            for j in range(16):
                step, low = get_step_4(data, at, j)
                source, to, shift = at + Q2.qs + (j // 8) * 32 + (j & 1) * 16, block * SUPER + j * 16, (j // 2 & 3) * 2
                level = (load(data, source) >> splat(shift)) & splat(3)
                store(out, to, splat(step) * to_float(level) - splat(low))


class Q4_K(Block, type=GGMLType.Q4_K):
    """4 bits with 6-bit scales and minimums for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q4_K_ref and quantize_row_q4_K_impl."""
        encode_affine(x, out, n_per_row, weights, Q4_K_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q4_K."""
        decode_6(data, out, Q4, False)


class Q5_K(Block, type=GGMLType.Q5_K):
    """5 bits with 6-bit scales and minimums for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_row_q5_K_ref and quantize_row_q5_K_impl."""
        encode_affine(x, out, n_per_row, weights, Q5_K_FORMAT)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_q5_K."""
        decode_6(data, out, Q5, True)
