"""The formats of 4 bits that choose from a table of 16 uneven values: IQ4_NL, IQ4_XS.

Layouts: ggml-common.h. Algorithm: quantize_row_iq4_nl_impl in ggml-quants.c.
"""

from __future__ import annotations

import gguf
import numpy as np

from quantkit.blocks.base import Block
from quantkit.blocks.bytes import get_half, get_nibble, get_short, get_values, put_half, put_short
from quantkit.blocks.lane_memory import load, part, scratch, store
from quantkit.blocks.lanes import LANES, ONE, ZERO, Bytes, F32x16, Floats, I32x16, select, splat, to_float
from quantkit.blocks.searches import clamped_ints, extremes, peak, reciprocals, sum_of_squares, weigh
from quantkit.blocks.tiles import SUPER, block_starts, spread
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import kernel, piece

QK = 32
NL, XS = GGMLType.IQ4_NL.layout, GGMLType.IQ4_XS.layout
VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
STEPS = np.diff(VALUES)
# Half way between neighbours the upper one is taken. The reference compares two distances, which are exact near there.
BORDERS = (VALUES[1:] + VALUES[:-1]) / np.float32(2)


@piece
def nearest_values(x: F32x16) -> F32x16:
    """The table's value nearest to each lane; the largest for NaN."""
    value = splat(VALUES[0])
    for i in range(15):
        value = value + select(x < splat(BORDERS[i]), splat(ZERO), splat(STEPS[i]))
    return value


@piece
def nearest_indices(x: F32x16) -> I32x16:
    """The index of `nearest_values`."""
    index = splat(0)
    for i in range(15):
        index = index + select(x < splat(BORDERS[i]), splat(0), splat(1))
    return index


@piece
def table_search(xs: Floats, ws: Floats | None) -> F32x16:
    """Scale for `x ~ scale * value`, of 32 weights; 0 where they are all but zero. `ws` None stands for x squared."""
    zero = splat(ZERO)
    extreme, empty = extremes(xs, QK)
    scale, best = zero, zero
    for trial in range(-8, 8):
        if trial == -8:  # the plain scale, which the reference computes in its own way
            inverse = splat(ONE) / (-extreme / splat(VALUES[0]))
        else:
            inverse = splat(np.float32(trial) + VALUES[0]) / extreme
        sum_qx, sum_q2 = zero, zero
        for i in range(QK):
            x = load(xs, i * LANES)
            w = x * x if ws is None else load(ws, i * LANES)
            q = nearest_values(inverse * x)
            wq = w * q
            sum_qx = sum_qx + wq * x
            sum_q2 = sum_q2 + wq * q
        this_scale = sum_qx / sum_q2
        some = sum_q2 > zero
        if trial == -8:
            scale = select(some, this_scale, zero)
            best = scale * sum_qx
        else:
            better = some & (sum_qx * sum_qx > best * sum_q2)
            scale = select(better, this_scale, scale)
            best = select(better, this_scale * sum_qx, best)
    return select(empty, zero, scale)


@piece
def put_nibbles(x: Floats, start: int, inverse: np.float32, out: Bytes, at: int) -> None:
    """The indices of 32 weights in 16 bytes, the first half in the low nibbles."""
    low = nearest_indices(splat(inverse) * load(x, start))
    high = nearest_indices(splat(inverse) * load(x, start + LANES))
    store(out, at, low | (high << splat(4)))


class IQ4_NL(Block, type=GGMLType.IQ4_NL):
    """4 bits, the index of a table's value, and a float16 scale for 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_iq4_nl. Sixteen blocks at a time."""
        starts = scratch(np.int64, 1)
        columns = scratch(np.int64, 1)
        xs = scratch(np.float32, QK)
        ws = scratch(np.float32, QK)
        scales = scratch(np.float32, 1)
        inverses = scratch(np.float32, 1)
        n_blocks = x.size // QK
        for first in range(0, n_blocks, LANES):
            used = block_starts(first, n_blocks, QK, n_per_row, starts, columns)
            spread(x, starts, 0, QK, xs)
            if weights is None:
                scale = table_search(xs, None)
            else:
                spread(weights, columns, 0, QK, ws)
                weigh(xs, ws, QK, sum_of_squares(xs, QK) * splat(np.float32(2 / QK)))
                scale = table_search(xs, ws)
            store(scales, 0, scale)
            store(inverses, 0, reciprocals(scale))
            for lane in range(used):
                at = (first + lane) * NL.nbytes
                put_half(out, at + NL.d, scales[lane])
                put_nibbles(x, starts[lane], inverses[lane], out, at + NL.qs)

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_iq4_nl."""
        for block in range(out.size // QK):
            at = block * NL.nbytes
            get_values(data, at + NL.qs, 16, VALUES, get_half(data, at + NL.d), out, block * QK)


class IQ4_XS(Block, type=GGMLType.IQ4_XS):
    """4 bits, the index of a table's value, with a 6-bit scale for every 32 weights."""

    @staticmethod
    @kernel
    def encode(x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block; after quantize_iq4_xs."""
        starts = scratch(np.int64, 1)
        columns = scratch(np.int64, 1)
        xs = scratch(np.float32, SUPER)
        ws = scratch(np.float32, QK)
        scales = scratch(np.float32, 8)
        inverses = scratch(np.float32, 8)
        codes = scratch(np.int32, 8)
        steps = scratch(np.float32, 1)
        n_blocks = x.size // SUPER
        for first in range(0, n_blocks, LANES):
            used = block_starts(first, n_blocks, SUPER, n_per_row, starts, columns)
            spread(x, starts, 0, SUPER, xs)
            if weights is not None:
                sigma = sum_of_squares(xs, SUPER) * splat(np.float32(2 / SUPER))
            for j in range(8):
                xs_j = part(xs, j * QK * LANES, QK * LANES)
                if weights is None:
                    scale = table_search(xs_j, None)
                else:
                    spread(weights, columns, j * QK, QK, ws)
                    weigh(xs_j, ws, QK, sigma)
                    scale = table_search(xs_j, ws)
                store(scales, j * LANES, scale)
            _, extreme = peak(scales, 8)
            step = -extreme / splat(np.float32(32))
            store(steps, 0, step)
            for j in range(8):
                code = clamped_ints(reciprocals(step) * load(scales, j * LANES), -32, 31)
                store(codes, j * LANES, code + splat(32))
                store(inverses, j * LANES, reciprocals(step * to_float(code)))
            for lane in range(used):
                at, start = (first + lane) * XS.nbytes, (first + lane) * SUPER
                put_half(out, at + XS.d, steps[lane])
                top = 0
                for j in range(8):
                    top |= (codes[j * LANES + lane] >> 4) << (2 * j)
                    put_nibbles(x, start + j * QK, inverses[j * LANES + lane], out, at + XS.qs + j * 16)
                put_short(out, at + XS.scales_h, top)
                for j in range(4):
                    low, high = codes[2 * j * LANES + lane], codes[(2 * j + 1) * LANES + lane]
                    out[at + XS.scales_l + j] = np.uint8((low & 15) | ((high & 15) << 4))

    @staticmethod
    @kernel
    def decode(data: Bytes, out: Floats) -> None:
        """See Block; after dequantize_row_iq4_xs."""
        for block in range(out.size // SUPER):
            at = block * XS.nbytes
            d = get_half(data, at + XS.d)
            top = get_short(data, at + XS.scales_h)
            for j in range(8):
                code = get_nibble(data, at + XS.scales_l, j) | (((top >> (2 * j)) & 3) << 4)
                step = d * np.float32(code - 32)
                get_values(data, at + XS.qs + j * 16, 16, VALUES, step, out, block * SUPER + j * QK)
