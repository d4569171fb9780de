"""Rounding with error feedback through torch, as on a GPU: held against the processor's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import requires_torch
from support import block_rows
from test_feedback import N, loss_of, moments, rows
from test_rounding import SOME, TEST, rounded

import quantkit
from quantkit import GGMLType, QuantkitError
from quantkit.blocks.parts import parts
from quantkit.calibration.feedback import Curvature, round_with_feedback
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.sources.source import GGUFSource, open_model

pytestmark = requires_torch

each_kind = pytest.mark.parametrize("kind", sorted(parts()), ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def rounder():
    import torch

    from quantkit.calibration.feedback_torch import TorchRounder

    return TorchRounder(torch.device("cpu"))


@each_kind
def test_loses_what_the_processor_loses(rounder, kind: GGMLType) -> None:
    w, h = rows(), moments()
    own = round_with_feedback(w, Curvature.of(h), kind)
    found = rounder.round(w, rounder.curvature(h, 0.01), kind)
    # Scores are float32 products: N terms, each rounded to a part in 2**24, of both signs.
    np.testing.assert_allclose(found.loss, loss_of(w, found.data, kind, h), rtol=1e-4)
    np.testing.assert_allclose(found.plain_loss, own.plain_loss, rtol=1e-4)
    # A sum rounded otherwise moves a level now and then, and all levels after it.
    assert found.loss.sum() == pytest.approx(own.loss.sum(), rel=0.02)
    assert (found.data == own.data).mean() > 0.9


@each_kind
def test_hard_rows_never_lose(rounder, kind: GGMLType) -> None:
    w = block_rows.all_rows()
    w = np.ascontiguousarray(w[np.abs(w).max(1) < 1e4])  # float16 scales hold no larger ones
    h = moments(w.shape[1])
    found = rounder.round(w, rounder.curvature(h, 0.01), kind)
    assert (found.loss <= found.plain_loss).all()
    energy = np.einsum("ij,jk,ik->i", w, h, w, dtype=np.float64)
    np.testing.assert_allclose(found.loss, loss_of(w, found.data, kind, h), rtol=1e-3, atol=1e-12 * energy.max())
    zero = ~w.any(1)
    assert zero.sum() >= 3
    assert not quantkit.dequantize_rows(found.data[zero], kind).any()


def test_runs_and_threads_do_not_change_the_bytes(rounder) -> None:
    w, curvature = rows(300), rounder.curvature(moments(), 0.01)
    results = [rounder.round(w, curvature, GGMLType.Q4_K, threads=threads) for threads in (1, 3, 1)]
    for other in results[1:]:
        assert np.array_equal(results[0].data, other.data)


def test_rows_of_32s_and_no_rows(rounder) -> None:
    curvature = rounder.curvature(moments(352), 0.01)
    found = rounder.round(rows(20, 352), curvature, GGMLType.Q5_0)
    own = round_with_feedback(rows(20, 352), Curvature.of(moments(352)), GGMLType.Q5_0)
    assert found.loss.sum() == pytest.approx(own.loss.sum(), rel=0.02)
    assert rounder.round(rows(0, 352), curvature, GGMLType.Q5_0).data.shape == (0, GGMLType.Q5_0.row_nbytes(352))
    with pytest.raises(QuantkitError, match="a row of 352 weights cannot hold Q4_K"):
        rounder.round(rows(20, 352), curvature, GGMLType.Q4_K)
    with pytest.raises(QuantkitError, match="rows of 512 weights cannot be rounded by the moments of 352 columns"):
        rounder.round(rows(), curvature, GGMLType.Q4_K)


@pytest.mark.parametrize("n_rows", [2, 40, 300])
def test_coupled_outputs(rounder, n_rows: int) -> None:
    w, h, outputs = rows(n_rows), moments(), moments(n_rows, 4096).astype(np.float32)
    own, found = (
        method(w, curvature, GGMLType.Q4_K, outputs=outputs)
        for method, curvature in ((round_with_feedback, Curvature.of(h)), (rounder.round, rounder.curvature(h, 0.01)))
    )

    def together(data: np.ndarray) -> float:
        errors = w.astype(np.float64) - quantkit.dequantize_rows(data, GGMLType.Q4_K)
        return float(np.einsum("ij,jk,lk,il->", errors, h, errors, outputs, optimize=True))

    alone = rounder.round(w, rounder.curvature(h, 0.01), GGMLType.Q4_K)
    np.testing.assert_allclose(found.loss, loss_of(w, found.data, GGMLType.Q4_K, h), rtol=1e-4)
    assert together(found.data) == pytest.approx(together(own.data), rel=0.02)
    if n_rows > 16:  # of fewer there is but one group
        assert together(found.data) < together(alone.data)
    with pytest.raises(QuantkitError, match=r"outputs cannot be coupled by moments of shape \(1, 1\)"):
        rounder.round(w, rounder.curvature(h, 0.01), GGMLType.Q4_K, outputs=outputs[:1, :1])


def test_grids_are_the_processors(rounder) -> None:
    assert rounder.note(GGMLType.Q4_K) == ""
    assert rounder.note(GGMLType.IQ2_XS) == "rounded by the processor, not by cpu"
    w, h = rows(20), moments()
    found = rounder.round(w, rounder.curvature(h, 0.01), GGMLType.IQ2_XS)
    own = round_with_feedback(w, Curvature.of(h), GGMLType.IQ2_XS)
    # The factors are those of another library.
    assert found.loss.sum() == pytest.approx(own.loss.sum(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:-1], "must be a square matrix"),
        (lambda h: h * np.where(np.arange(N) == 3, np.nan, 1), "not finite"),
        (lambda h: h * 0, "all zero"),
        (lambda h: -h, "negative diagonal"),
        (lambda h: np.triu(h), "must be symmetric"),
        (lambda h: 4 * h - 3 * np.diag(np.diag(h)), "not positive definite"),
    ],
)
def test_bad_moments_are_refused(rounder, change, message) -> None:
    with pytest.raises(QuantkitError, match=message):
        rounder.curvature(change(moments()), 0.01)


def test_a_file_loses_what_the_processors_loses(tmp_path: Path) -> None:
    import torch
    from conftest import TINYLM

    source = open_model(TINYLM)
    losses = []
    for gpu in (None, torch.device("cpu")):
        model = load(source, Compute(backend="torch", threads=2), keep=False)
        model.gpu = gpu
        folder = tmp_path / str(gpu)
        rounded(source, folder, ("Q4_K_M",), model=model)
        few = Chunking(n_ctx=SOME.n_ctx, chunks=40)
        losses.append(quantkit.divergence(GGUFSource(folder / "Q4_K_M.gguf"), source, TEST, chunking=few).kld.value)
    assert losses[1] < 1.02 * losses[0]
