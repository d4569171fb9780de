"""The grid formats: their tables by definition, and the corners of their searches against ggml."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import block_rows
from support.block_reference import Ggml

from quantkit import GGMLType, QuantkitError, blocks

# Type: weights in a group, bits of a level, levels, and how many distances count as near (ggml-quants.c).
GRIDS = {
    GGMLType.IQ2_XXS: (8, 2, 3, 2),
    GGMLType.IQ2_XS: (8, 2, 3, 2),
    GGMLType.IQ2_S: (8, 2, 3, 1),
    GGMLType.IQ1_S: (8, 2, 3, 3),
    GGMLType.IQ3_XXS: (4, 3, 8, 2),
    GGMLType.IQ3_S: (4, 3, 8, 3),
}
KINDS = [*GRIDS, GGMLType.IQ1_M]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.mark.parametrize("kind", GRIDS, ids=lambda kind: kind.name)
def test_neighbours_by_definition(kind: GGMLType) -> None:
    from quantkit.blocks.grids import grid, grid_values

    dim, width, n_levels, n_distances = GRIDS[kind]
    table, values = grid(kind), grid_values(kind)
    shifts = width * np.arange(dim)
    codes = np.flatnonzero(table.index_of >= 0)
    codes = codes[np.argsort(table.index_of[codes])]
    assert np.array_equal(table.index_of[codes], np.arange(values.size // dim))
    points = (codes[:, None] >> shifts) & ((1 << width) - 1)
    assert points.max() < n_levels
    values = values.reshape(-1, dim)
    assert all(len(set(values[points == level].tolist())) == 1 for level in range(n_levels))
    places = table.where[table.where >= 0]
    ends = (places >> 10) + -(-(places & 1023) // 16)
    assert (places[0] >> 10) == 0 and np.array_equal(ends[:-1], places[1:] >> 10) and ends[-1] * 16 == table.lists.size
    random = np.random.default_rng(7)
    for levels in random.integers(0, n_levels, (300, dim)):
        code = int((levels << shifts).sum())
        distance = ((points - levels) ** 2).sum(axis=1)
        place = int(table.where[code])
        if distance.min() == 0:
            assert place == -1 and table.index_of[code] == distance.argmin()
            continue
        assert table.index_of[code] == -1
        first, count = place >> 10, place & 1023
        found = table.lists[first * 16 : (first + -(-count // 16)) * 16].tolist()
        order = np.argsort(distance, kind="stable")
        near = distance[order] <= np.unique(distance)[n_distances - 1]
        expected = codes[order[near]].tolist()
        assert count == len(expected) and found == expected + [expected[-1]] * (-len(expected) % 16)


@pytest.mark.parametrize("kind", sorted(block_rows.NEED_WEIGHTS), ids=lambda kind: kind.name)
def test_formats_that_need_weights_say_so(kind: GGMLType) -> None:
    with pytest.raises(QuantkitError, match=f"{kind.name} cannot be encoded without importance weights"):
        blocks.encode(np.ones((1, 256), np.float32), kind)


@requires_reference
@each_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_numbers_and_ties(ggml: Ggml, kind: GGMLType, data: st.DataObject) -> None:
    # Few values and few weights, many of them zero: equal distances, equal sort keys, empty sub-blocks.
    row = data.draw(hnp.arrays(np.int8, 256, elements=st.integers(-7, 7), fill=st.integers(-1, 1)))
    scale = np.float32(data.draw(st.sampled_from([1, 0.01, 3e-8, 1e-9, 1e-13])))
    weights = data.draw(hnp.arrays(np.int8, 256, elements=st.integers(0, 3), fill=st.integers(0, 1)))
    rows = row[None].astype(np.float32) * scale
    for importance in [weights.astype(np.float32), *([] if kind in block_rows.NEED_WEIGHTS else [None])]:
        assert np.array_equal(blocks.encode(rows, kind, importance), ggml.encode(rows, kind, importance))


@requires_reference
@each_kind
def test_many_blocks_like_a_models(ggml: Ggml, kind: GGMLType) -> None:
    # Enough that choices between nearly equal distances, and sums that differ in the last place, come up.
    random = np.random.default_rng(8)
    rows = (0.02 * random.standard_t(5, (96, 2048))).astype(np.float32)
    weights = random.chisquare(1, 2048).astype(np.float32)
    for importance in [weights, *([] if kind in block_rows.NEED_WEIGHTS else [None])]:
        assert np.array_equal(blocks.encode(rows, kind, importance), ggml.encode(rows, kind, importance))


@requires_reference
def test_iq3_s_leaves_no_gap_for_empty_sub_blocks(ggml: Ggml) -> None:
    rows = np.repeat(block_rows.random_rows(1, 256), 256, axis=0)
    rows.reshape(256, 8, 32)[(np.arange(256)[:, None] >> np.arange(8)) & 1 == 1] = 0
    assert np.array_equal(blocks.encode(rows, GGMLType.IQ3_S), ggml.encode(rows, GGMLType.IQ3_S))


@each_kind
def test_rows_beyond_the_reference_do_not_fail(kind: GGMLType) -> None:
    # ggml ends the process where a sum is infinite. Ours writes something, and reads it again.
    rows = np.stack(list(block_rows.named_rows().values()))
    for name in ("uniform", "largest", "denormal"):
        data = blocks.encode(rows, kind, block_rows.importance()[name])
        assert blocks.decode(data, kind).shape == rows.shape
