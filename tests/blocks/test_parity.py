"""Bytes and values are the reference's: ggml 0.25.3 in llama_cpp, and libgguf, which needs no compiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from conftest import requires_libgguf, requires_reference
from support import block_rows
from support.block_reference import Ggml

from quantkit import GGMLType, blocks

KINDS = blocks.encodable()
WEIGHTS = block_rows.importance()
# llama.cpp decides where libgguf 0.2.2 differs from it; and what it lacks.
NOT_IN_LIBGGUF = {GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q2_0}
DIFFERS_IN_LIBGGUF = {GGMLType.IQ1_M}


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return block_rows.all_rows()


def same_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal bit for bit, any NaN being as good as another."""
    return (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))


def weighted_loss(rows: np.ndarray, decoded: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The squared error of each row, each column's times its weight; 0 where a row is not finite."""
    with np.errstate(all="ignore"):
        squares = (decoded.astype(np.float64) - rows) ** 2
        loss = (squares if weights is None else squares * weights).sum(1)
    return np.where(np.isfinite(loss), loss, 0)


def wrong_rows(ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """The names (or numbers) of rows whose bytes differ."""
    names = list(block_rows.named_rows())
    bad = np.nonzero((ours != theirs).any(axis=1))[0]
    return [names[i] if i < len(names) else f"random {i - len(names)}" for i in bad]


def cases(kinds: list[GGMLType], weights: Iterable[str]) -> list[Any]:
    """Every kind with every importance, but for None where ggml wants some."""
    allowed = ((k, w) for k in kinds for w in weights if WEIGHTS[w] is not None or k not in block_rows.NEED_WEIGHTS)
    return [pytest.param(kind, which, id=f"{kind.name}-{which}") for kind, which in allowed]


@requires_reference
def test_these_need_weights(ggml: Ggml) -> None:
    assert {kind for kind in KINDS if ggml.requires_weights(kind)} == block_rows.NEED_WEIGHTS


@requires_reference
@pytest.mark.parametrize(("kind", "weights"), cases(KINDS, WEIGHTS))
def test_encode_is_ggmls(ggml: Ggml, rows: np.ndarray, kind: GGMLType, weights: str) -> None:
    rows = block_rows.encodable_by_ggml(rows, kind, WEIGHTS[weights])
    ours = blocks.encode(rows, kind, WEIGHTS[weights])
    assert wrong_rows(ours, ggml.encode(rows, kind, WEIGHTS[weights])) == []


@requires_reference
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decode_is_ggmls(ggml: Ggml, kind: GGMLType) -> None:
    n_blocks = 9 * 256 // kind.block_size if kind.is_quantized else 5003  # an odd length for the plain types
    data = np.random.default_rng(4).integers(0, 256, (64, n_blocks * kind.type_size), np.uint8)
    assert same_floats(blocks.decode(data, kind), ggml.decode(data, kind)).all()


@requires_libgguf
@pytest.mark.parametrize(
    ("kind", "weights"), cases([k for k in KINDS if k not in NOT_IN_LIBGGUF], ["none", "uneven", "with zeros"])
)
def test_encode_and_decode_are_libggufs(rows: np.ndarray, kind: GGMLType, weights: str) -> None:
    import libgguf

    rows = block_rows.encodable_by_ggml(rows[::3], kind, WEIGHTS[weights])
    ours = blocks.encode(rows, kind, WEIGHTS[weights])
    theirs = libgguf.quantize_rows(rows, int(kind), WEIGHTS[weights])
    if kind in DIFFERS_IN_LIBGGUF:
        # Its sums are those of an older ggml, in another order: nearly equal splits fall the other way, which for
        # most rows hardly changes the error.
        loss, other = (weighted_loss(rows, blocks.decode(data, kind), WEIGHTS[weights]) for data in (ours, theirs))
        lossy = other > 0
        assert abs(np.median(loss[lossy] / other[lossy]) - 1) < 1e-5
        assert lossy.mean() > 0.8
    else:
        assert np.array_equal(ours, theirs)
    assert same_floats(blocks.decode(theirs, kind), libgguf.dequantize_rows(theirs, int(kind))).all()


@requires_reference
@pytest.mark.parametrize("kind", [GGMLType.MXFP4, GGMLType.NVFP4], ids=lambda kind: kind.name)
def test_float4_scales_follow_the_logarithm_of_the_reference(ggml: Ggml, kind: GGMLType) -> None:
    # log2f rounds up just below powers of two, how far below depends on the power. UE4M3 rounds a sixth of the largest
    # to 3 bits in its own way, and so the step from 240 to 256.
    below = (2**24 - np.arange(130)[None, :]) * 2.0**-24
    exact = np.ldexp(below, np.arange(-148, 129)[:, None]).reshape(-1)
    sixths = np.ldexp(1 + np.arange(160)[None, :] / 160, np.arange(-14, 12)[:, None]).reshape(-1) * 6
    largest = np.concatenate([exact[exact < 2.0**128], sixths, 6 * np.linspace(200, 460, 2000)]).astype(np.float32)
    rows = np.zeros((largest.size, 64), np.float32)
    rows[:] = largest[:, None] * np.random.default_rng(5).uniform(-1, 1, rows.shape).astype(np.float32)
    rows[:, ::16] = largest[:, None]
    assert np.array_equal(blocks.encode(rows, kind), ggml.encode(rows, kind))
