"""The grids of the IQ formats: which groups of levels exist, and which of them lie near one that does not.

A group is 8 weights of 3 levels, or 4 weights of 8 levels. Its code packs its levels, the first one lowest, 2 or 3
bits each. A format stores the index of a grid point instead of the code, so a group whose rounded levels are no grid
point takes one of the points nearby: its neighbours, all points at the smallest few distances, nearer ones first and
then in order of index (iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c). The grids come from the gguf package.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from quantkit.blocks.lanes import LANES
from quantkit.blocks.types import GGMLType
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


class Grid(NamedTuple):
    """One format's grid, as flat arrays: kernels take it as it is.

    - `values`, float32: what the levels of each point decode to, point after point.
    - `index_of`, int16, by code: the index of the point, -1 if there is none.
    - `where`, int32, by code: -1 for a point, else `first << 10 | count`: the row in `lists` where its neighbours begin
      and their number.
    - `lists`, uint16: the codes of neighbours in rows of sixteen. The last neighbour fills its list's last row.
    """

    values: np.ndarray
    index_of: np.ndarray
    where: np.ndarray
    lists: np.ndarray


@kernel
def _list_neighbours(points: Any, width: Any, n_levels: Any, n_distances: Any, index: Any, where: Any) -> Any:
    """The lists for every code that is no point. `points` is int16 of shape (weights of a group, points)."""
    dim, n = points.shape
    lists = np.empty(1 << 16, np.uint16)
    codes = np.zeros(n, np.uint16)
    for j in range(n):
        for i in range(dim):
            codes[j] |= points[i, j] << (width * i)
    distance = np.empty(n, np.int16)
    rows = 0
    for code in range(where.size):
        valid = True
        for i in range(dim):
            valid &= (code >> (width * i)) & ((1 << width) - 1) < n_levels
        if not valid or index[code] >= 0:
            continue
        distance[:] = 0
        for i in range(dim):
            level = np.int16((code >> (width * i)) & ((1 << width) - 1))
            for j in range(n):
                step = np.int16(points[i, j] - level)
                distance[j] += np.int16(step * step)
        first = rows * LANES
        if lists.size < first + n + LANES:
            longer = np.empty(2 * lists.size, np.uint16)
            for i in range(first):  # a copy by slices would compile two seconds longer, for its error message
                longer[i] = lists[i]
            lists = longer
        at, reached = first, np.int16(-1)
        for _ in range(n_distances):
            nearest = np.int16(32767)
            for j in range(n):
                beyond = distance[j] if distance[j] > reached else np.int16(32767)
                nearest = min(nearest, beyond)
            reached = nearest
            for j in range(n):
                if distance[j] == reached:
                    lists[at] = codes[j]
                    at += 1
        where[code] = rows << 10 | (at - first)
        while at % LANES:
            lists[at] = lists[at - 1]
            at += 1
        rows = at // LANES
    return lists[: rows * LANES].copy()


@lru_cache
def grid(kind: GGMLType) -> Grid:
    """The grid of `kind`, built when first asked for. IQ1_M uses that of IQ1_S."""
    from gguf import quants

    source = getattr(quants, kind.name)
    source.init_grid()
    dim = source.grid_shape[1]
    values = np.ascontiguousarray(source.grid, np.float32).reshape(-1)
    n_levels = len(source.grid_map)
    width = 2 if n_levels == 3 else 3
    levels = np.searchsorted(np.array(source.grid_map, np.float32), values).reshape(-1, dim)
    codes = (levels << (width * np.arange(dim))).sum(1).astype(np.int32)
    index = np.full(1 << (width * dim), -1, np.int16)
    index[codes] = np.arange(codes.size)
    where = np.full(index.size, -1, np.int32)
    points = np.ascontiguousarray(levels.T, np.int16)
    lists = _list_neighbours(points, width, n_levels, _DISTANCES[kind], index, where)
    return Grid(values, index, where, lists)


@lru_cache
def sign_table() -> np.ndarray:
    """Eight factors of 1 or -1 for every byte of signs, float32: bit i set makes weight i negative."""
    negative = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.asarray(1 - 2 * negative, np.float32).reshape(-1)


@lru_cache
def even_sign_table() -> np.ndarray:
    """The same for every 7 stored bits: the eighth makes the number of signs even."""
    stored = np.arange(128)
    odd = ((stored[:, None] >> np.arange(7)) & 1).sum(1) & 1
    table: np.ndarray = sign_table().reshape(-1, 8)[stored | odd << 7].reshape(-1)
    return table


@piece
def put_group(out: Any, to: Any, scale: Any, values: Any, at: Any, n: Any, signs: Any, first: Any) -> None:
    """Decode `n` weights: the scale, times the values of a point, times factors from a table of signs."""
    for i in range(n):
        out[to + i] = scale * values[at + i] * signs[first + i]


def require_weights(weights: np.ndarray | None, kind: GGMLType) -> np.ndarray:
    """`weights`, which `kind` cannot do without. Raises QuantkitError if they are None."""
    if weights is None:
        raise QuantkitError(f"{kind.name} cannot be encoded without importance weights: give an importance matrix")
    return weights
