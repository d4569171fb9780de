"""Blocks taken apart and put together again."""

from __future__ import annotations

import numpy as np
import pytest
from support import block_rows

from quantkit import GGMLType, blocks
from quantkit.blocks.grids import grid_values
from quantkit.blocks.parts import grid_parts, parts

each_kind = pytest.mark.parametrize("kind", list(parts()), ids=lambda kind: kind.name)


@each_kind
def test_a_block_put_together_from_its_parts_decodes_to_what_they_say(kind: GGMLType) -> None:
    of = parts()[kind]
    random = np.random.default_rng(1)
    n_blocks, count = 37, kind.block_size // of.n_sub
    levels = random.integers(0, len(of.values), (n_blocks, kind.block_size)).astype(np.uint8)
    floats = random.uniform(0.01, 2, (n_blocks, 2)).astype(np.float16).astype(np.float32)
    if kind == GGMLType.MXFP4:  # its scales are powers of two, the least of them below float32's normal range
        floats[:, 0] = np.ldexp(np.float32(1), np.linspace(-128, 127, n_blocks).astype(int))
    if not of.affine:
        floats[:, 1] = 0
    if of.scale_codes is None:
        codes = np.zeros(0, np.int32)
        scale, low = floats[:, 0, None], floats[:, 1, None]
    else:
        codes = np.zeros((n_blocks, 2, count), np.int32)
        codes[:, 0] = random.integers(of.scale_codes[0], of.scale_codes[1] + 1, (n_blocks, count))
        codes[:, 1] = random.integers(0, of.top_low + 1, (n_blocks, count))
        scale, low = floats[:, 0, None] * codes[:, 0], -floats[:, 1, None] * codes[:, 1]
    out = np.empty((n_blocks, kind.type_size), np.uint8)
    of.put(levels.reshape(-1), codes.reshape(-1), floats.reshape(-1), out.reshape(-1))

    with np.errstate(over="ignore"):  # the values of the largest MXFP4 scales
        values = of.values[levels].reshape(n_blocks, -1, of.n_sub) * scale.astype(np.float32)[..., None]
        expected = (values + low.astype(np.float32)[..., None]).reshape(n_blocks, -1)
    assert np.array_equal(blocks.decode(out, kind), expected)
    again, floats_again = np.full_like(codes, -1), np.full_like(floats, -1)
    of.take(out.reshape(-1), again.reshape(-1), floats_again.reshape(-1))
    assert np.array_equal(again, codes) and np.array_equal(floats_again, floats)


@each_kind
def test_every_byte_of_the_encoders_blocks_is_in_their_parts(kind: GGMLType) -> None:
    of = parts()[kind]
    # Sub-blocks with a scale of 0 keep levels that nothing shows: rows whose scales are all in range have none.
    rows = block_rows.random_rows(20)
    data = blocks.encode(rows, kind, block_rows.importance()["uneven"])
    n_blocks = data.size // kind.type_size
    codes = np.zeros((n_blocks, 2, kind.block_size // of.n_sub) if of.scale_codes else 0, np.int32)
    floats = np.empty((n_blocks, 2), np.float32)
    of.take(data.reshape(-1), codes.reshape(-1), floats.reshape(-1))
    scale, low = floats[:, 0, None], floats[:, 1, None]
    if of.scale_codes is not None:
        scale, low = scale * codes[:, 0].astype(np.float32), -(low * codes[:, 1].astype(np.float32))
    weights = blocks.decode(data, kind).reshape(n_blocks, -1, of.n_sub)
    decoded = of.values[:, None] * scale.reshape(-1) + low.reshape(-1)  # [levels, sub-blocks]
    levels = np.empty(weights.reshape(-1, of.n_sub).shape, np.uint8)
    for level in range(len(of.values)):
        levels[weights.reshape(-1, of.n_sub) == decoded[level][:, None]] = level
    out = np.empty_like(data)
    of.put(levels.reshape(-1), codes.reshape(-1), floats.reshape(-1), out.reshape(-1))
    assert np.array_equal(blocks.decode(out, kind), blocks.decode(data, kind))
    shown = (scale.reshape(-1) != 0).reshape(n_blocks, -1).all(1)
    if kind != GGMLType.MXFP4:  # which has two forms of zero
        assert shown.sum() > 10
        assert np.array_equal(out.reshape(n_blocks, -1)[shown], data.reshape(n_blocks, -1)[shown])


@pytest.mark.parametrize("kind", list(grid_parts()), ids=lambda kind: kind.name)
def test_a_block_of_points_decodes_to_what_its_parts_say(kind: GGMLType) -> None:
    of = grid_parts()[kind]
    random = np.random.default_rng(1)
    n_blocks, count = 37, 256 // of.n_sub
    values = grid_values(GGMLType.IQ1_S if kind == GGMLType.IQ1_M else kind)
    values = values.reshape(-1, 8 if of.magnitudes is None or len(of.magnitudes) == 3 else 4)
    points = random.integers(0, len(values), (n_blocks, 256 // values.shape[1])).astype(np.uint16)
    codes = random.integers(0, of.top_scale + 1, (n_blocks, count)).astype(np.int32)
    floats = random.uniform(0.01, 2, n_blocks).astype(np.float16).astype(np.float32)
    expected = values[points].reshape(n_blocks, 32, 8)
    if of.magnitudes is None:
        signs = random.integers(0, 2, (n_blocks, 32)).astype(np.uint8)
        if of.one_shift:
            signs = np.repeat(signs[:, ::4], 4, 1)
        expected = expected + np.where(signs, -0.125, 0.125).astype(np.float32)[..., None]
    else:
        signs = random.integers(0, 256, (n_blocks, 32)).astype(np.uint8)
        minus = signs[..., None] >> np.arange(8) & 1
        if of.even:
            minus[..., 7] = minus[..., :7].sum(-1) & 1
            signs = (minus << np.arange(8)).sum(-1).astype(np.uint8)
        expected = expected * np.where(minus, -1, 1).astype(np.float32)
    scale = (floats * np.float32(of.unit))[:, None] * (codes + np.float32(0.5))
    expected = expected.reshape(n_blocks, count, of.n_sub) * scale[..., None]
    out = np.empty((n_blocks, kind.type_size), np.uint8)
    of.put(points.reshape(-1), signs.reshape(-1), codes.reshape(-1), floats, out.reshape(-1))
    assert np.array_equal(blocks.decode(out, kind), expected.reshape(n_blocks, -1))
    shifts, codes_again, floats_again = np.zeros_like(signs), np.full_like(codes, -1), np.full_like(floats, -1)
    of.take(out.reshape(-1), shifts.reshape(-1), codes_again.reshape(-1), floats_again)
    assert np.array_equal(codes_again, codes) and np.array_equal(floats_again, floats)
    if of.magnitudes is None:
        assert np.array_equal(shifts, signs)
