"""The grids of the IQ formats: which groups of levels exist, and which of them lie near one that does not.

A group is 8 weights of 3 levels, or 4 weights of 8 levels. Its code packs its levels, the first one lowest, 2 or 3
bits each. A format stores the index of a grid point instead of the code, so a group whose rounded levels are no grid
point takes one of the points nearby: its neighbours, all points at the smallest few distances, nearer ones first and
then in order of index (iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c). The grids come from the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba.core import types

from quantkit.blocks.base import Block
from quantkit.blocks.lane_memory import load, scratch, store
from quantkit.blocks.lanes import (
    LANES,
    ONE,
    ZERO,
    Bytes,
    Codes,
    Floats,
    Ints,
    Shorts,
    minimum,
    select,
    smallest,
    splat,
)
from quantkit.blocks.types import GGMLType
from quantkit.compile.ahead import KernelJob
from quantkit.compile.kernel import kernel, piece
from quantkit.errors import QuantkitError

# How many distances count as near: the reference's constant for each grid.
_DISTANCES = {
    GGMLType.IQ2_XXS: 2,
    GGMLType.IQ2_XS: 2,
    GGMLType.IQ2_S: 1,
    GGMLType.IQ3_XXS: 2,
    GGMLType.IQ3_S: 3,
    GGMLType.IQ1_S: 3,
}
FAR = np.float32(np.inf)


class Grid(NamedTuple):
    """One format's grid for its encoder, as flat arrays: kernels take it as it is.

    - `index_of`, int16, by code: the index of the point, -1 if there is none.
    - `where`, int32, by code: -1 for a point, else `first << 10 | count`: the row in `lists` where its neighbours begin
      and their number.
    - `lists`, uint16: the codes of neighbours in rows of sixteen. The last neighbour fills its list's last row.
    """

    index_of: Shorts
    where: Ints
    lists: Codes


@kernel
def _list_neighbours(
    points: Floats, codes: Codes, width: int, n_levels: int, n_distances: int, index: Shorts, where: Ints, lists: Codes
) -> int:
    """Fill `where` and `lists` for every code that is no point. Returns the rows of `lists`, -1 where it is too short.

    `points` holds the first level of all points, then the second of all, and so on: `codes.size` is a multiple of 16,
    and at most 2048.
    """
    n = codes.size
    distances = scratch(np.float32, 128)
    rows = 0
    for code in range(where.size):
        valid = index[code] < 0
        for i in range(points.size // n):
            valid &= (code >> (width * i)) & ((1 << width) - 1) < n_levels
        if not valid:
            continue
        for j in range(0, n, LANES):
            total = splat(ZERO)
            for i in range(points.size // n):
                step = load(points, i * n + j) - splat(np.float32((code >> (width * i)) & ((1 << width) - 1)))
                total = total + step * step
            store(distances, j, total)
        if lists.size < rows * LANES + n + LANES:
            return -1
        at, reached = rows * LANES, -ONE
        for _ in range(n_distances):
            nearest = splat(FAR)
            for j in range(0, n, LANES):
                distance = load(distances, j)
                nearest = minimum(nearest, select(distance > splat(reached), distance, splat(FAR)))
            reached = smallest(nearest)
            for j in range(n):
                if distances[j] == reached:
                    lists[at] = codes[j]
                    at += 1
        where[code] = rows << 10 | (at - rows * LANES)
        while at % LANES:
            lists[at] = lists[at - 1]
            at += 1
        rows = at // LANES
    return rows


@lru_cache
def _levels(kind: GGMLType) -> tuple[np.ndarray, np.ndarray]:
    """What the levels of `kind` stand for, and the level of every weight of every point: shape (points, weights)."""
    from gguf import quants

    source = getattr(quants, kind.name)
    source.init_grid()
    stand_for = np.array(source.grid_map, np.float32)
    values = np.asarray(source.grid, np.float32).reshape(-1, source.grid_shape[1])
    return stand_for, np.searchsorted(stand_for, values)


@lru_cache
def grid_values(kind: GGMLType) -> Floats:
    """What the levels of each point decode to, point after point. IQ1_M uses the grid of IQ1_S."""
    stand_for, levels = _levels(kind)
    values: Floats = stand_for[levels].reshape(-1)
    return values


@lru_cache
def grid(kind: GGMLType) -> Grid:
    """The grid of `kind`, with its neighbours, built when first asked for. IQ1_M uses that of IQ1_S."""
    stand_for, levels = _levels(kind)
    n, dim = levels.shape
    width = 2 if stand_for.size == 3 else 3
    codes = (levels << (width * np.arange(dim))).sum(1).astype(np.uint16)
    index = np.full(1 << (width * dim), -1, np.int16)
    index[codes] = np.arange(n)
    where = np.full(index.size, -1, np.int32)
    points = np.ascontiguousarray(levels.T, np.float32).reshape(-1)
    lists, rows = np.empty(0, np.uint16), -1
    while rows < 0:
        lists = np.empty(max(1 << 18, 2 * lists.size), np.uint16)
        rows = _list_neighbours(points, codes, width, stand_for.size, _DISTANCES[kind], index, where, lists)
    return Grid(index, where, lists[: rows * LANES].copy())


@lru_cache
def sign_table() -> Floats:
    """Eight factors of 1 or -1 for every byte of signs, float32: bit i set makes weight i negative."""
    negative = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.asarray(1 - 2 * negative, np.float32).reshape(-1)


@lru_cache
def even_sign_table() -> Floats:
    """The same for every 7 stored bits: the eighth makes the number of signs even."""
    stored = np.arange(128)
    odd = ((stored[:, None] >> np.arange(7)) & 1).sum(1) & 1
    table: Floats = sign_table().reshape(-1, 8)[stored | odd << 7].reshape(-1)
    return table


@piece
def put_group(
    out: Floats, to: int, scale: np.float32, values: Floats, at: int, n: int, signs: Floats, first: int
) -> None:
    """Decode `n` weights: the scale, times the values of a point, times factors from a table of signs."""
    for i in range(n):
        out[to + i] = scale * values[at + i] * signs[first + i]


class GridBlock(Block):
    """A format with a grid: what it has, its kernels take besides what those of `Block` do.

    - `encoder(x, out, n_per_row, weights, grid)`, where no weights are an empty array: these kernels compile for
      seconds, and so once for both
    - `decoder(data, out, values)`, or with `signs` also the table of signs that this makes.
    """

    points: ClassVar[GGMLType]  # whose grid it is
    encoder: ClassVar[Callable[..., None]]
    decoder: ClassVar[Callable[..., None]]
    signs: ClassVar[Callable[[], Floats] | None] = None
    needs_weights: ClassVar[bool] = False

    @classmethod
    def encode(cls, x: Floats, out: Bytes, n_per_row: int, weights: Floats | None) -> None:
        """See Block. Raises QuantkitError where the format cannot do without weights."""
        if weights is None and cls.needs_weights:
            raise QuantkitError(
                f"{cls.type.name} cannot be encoded without importance weights: give an importance matrix"
            )
        cls.encoder(x, out, n_per_row, _NO_WEIGHTS if weights is None else weights, grid(cls.points))

    @classmethod
    def decode(cls, data: Bytes, out: Floats) -> None:
        """See Block."""
        cls.decoder(data, out, grid_values(cls.points), *([] if cls.signs is None else [cls.signs()]))

    @classmethod
    def encode_kernel(cls) -> tuple[Any, tuple[Any, ...]]:
        """See Block."""
        return cls.encoder, (_GRID,)

    @classmethod
    def decode_kernel(cls) -> tuple[Any, tuple[Any, ...]]:
        """See Block."""
        return cls.decoder, (_FLOATS,) if cls.signs is None else (_FLOATS, _FLOATS)


_NO_WEIGHTS = np.empty(0, np.float32)
_NO_WEIGHTS.flags.writeable = False  # as importance weights are: the same type for numba
_FLOATS, _SHORTS, _INTS, _CODES = (
    types.Array(dtype, 1, "C") for dtype in (types.float32, types.int16, types.int32, types.uint16)
)
_GRID = types.NamedTuple((_SHORTS, _INTS, _CODES), Grid)


def neighbour_job() -> KernelJob:
    """The kernel that every encoder with a grid needs first."""
    integer = types.int64
    return KernelJob(_list_neighbours, (_FLOATS, _CODES, integer, integer, integer, _SHORTS, _INTS, _CODES), 0.6)
