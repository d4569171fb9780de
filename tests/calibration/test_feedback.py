"""Rounding with error feedback."""

from __future__ import annotations

import numpy as np
import pytest
from support import block_rows

import quantkit
from quantkit import GGMLType, QuantkitError
from quantkit.calibration.curvature import Curvature
from quantkit.calibration.feedback import SUPPORTED, round_with_feedback

each_kind = pytest.mark.parametrize("kind", sorted(SUPPORTED), ids=lambda kind: kind.name)
N = 512


def inputs(n: int = N, n_tokens: int = 2048, seed: int = 1) -> np.ndarray:
    """Activations as models have them: columns of uneven size that have most of their variance in common."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((n_tokens, n // 4)) * np.exp(random.standard_normal(n // 4))
    mixed = hidden @ random.standard_normal((n // 4, n)) / np.sqrt(n / 4) + 0.5 * random.standard_normal((n_tokens, n))
    return np.asarray(mixed * np.exp(0.5 * random.standard_normal(n)))


def moments(n: int = N, n_tokens: int = 2048) -> np.ndarray:
    x = inputs(n, n_tokens)
    return np.asarray(x.T @ x / n_tokens)


def rows(n_rows: int = 40, n: int = N) -> np.ndarray:
    random = np.random.default_rng(2)
    return (0.02 * random.standard_normal((n_rows, n)) * np.exp(0.3 * random.standard_normal(n))).astype(np.float32)


def loss_of(weights: np.ndarray, data: np.ndarray, kind: GGMLType, h: np.ndarray) -> np.ndarray:
    errors = weights.astype(np.float64) - quantkit.dequantize_rows(data, kind)
    return np.einsum("ij,ij->i", errors @ h, errors)


@each_kind
def test_the_bytes_decode_to_what_was_scored_and_feedback_pays(kind: GGMLType) -> None:
    w, h = rows(), moments()
    curvature = Curvature.of(h)
    rounded = round_with_feedback(w, curvature, kind)
    assert rounded.data.shape == (len(w), kind.row_nbytes(N)) and rounded.data.dtype == np.uint8
    # Scores are float32 products: N terms, each rounded to a part in 2**24, of both signs.
    np.testing.assert_allclose(rounded.loss, loss_of(w, rounded.data, kind, h), rtol=1e-4)
    plain = quantkit.quantize_rows(w, kind, weights=np.diag(h))
    np.testing.assert_allclose(rounded.plain_loss, loss_of(w, plain, kind, h), rtol=1e-4)
    assert (rounded.loss <= rounded.plain_loss).all()
    assert rounded.loss.sum() < 0.8 * rounded.plain_loss.sum()


@each_kind
def test_hard_rows_never_lose(kind: GGMLType) -> None:
    w = block_rows.all_rows()
    largest = np.abs(w).max(1)
    w = np.ascontiguousarray(w[largest < 1e4])  # float16 scales hold no larger ones
    h = moments(w.shape[1])
    rounded = round_with_feedback(w, Curvature.of(h), kind)
    assert (rounded.loss <= rounded.plain_loss).all()
    scored = loss_of(w, rounded.data, kind, h)
    energy = np.einsum("ij,jk,ik->i", w, h, w, dtype=np.float64)
    np.testing.assert_allclose(rounded.loss, scored, rtol=1e-3, atol=1e-12 * energy.max())
    zero = ~w.any(1)
    assert zero.sum() >= 3
    assert not quantkit.dequantize_rows(rounded.data[zero], kind).any()


def test_threads_and_runs_do_not_change_the_bytes() -> None:
    w, h = rows(700), moments()
    for kind in (GGMLType.Q4_K, GGMLType.Q3_K, GGMLType.IQ4_NL):
        results = [round_with_feedback(w, Curvature.of(h), kind, threads=threads) for threads in (1, 2, 5, 1)]
        for other in results[1:]:
            assert np.array_equal(results[0].data, other.data)
            assert np.array_equal(results[0].loss, other.loss)


def test_rows_do_not_depend_on_their_number_being_even() -> None:
    w, curvature = rows(17), Curvature.of(moments())
    one = round_with_feedback(w[:1], curvature, GGMLType.Q4_K)
    assert one.data.shape == (1, GGMLType.Q4_K.row_nbytes(N))
    assert round_with_feedback(w[:0], curvature, GGMLType.Q4_K).data.shape == (0, GGMLType.Q4_K.row_nbytes(N))


def test_few_tokens_are_damped() -> None:
    w, h = rows(), moments(n_tokens=60)
    assert np.linalg.matrix_rank(h) < N / 4
    rounded = round_with_feedback(w, Curvature.of(h), GGMLType.Q4_K)
    assert np.isfinite(rounded.loss).all() and (rounded.loss <= rounded.plain_loss).all()
    with pytest.raises(QuantkitError, match="not positive definite: too few tokens"):
        Curvature.of(h, damping=0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_size_of_the_moments_does_not_matter(scale: float) -> None:
    w, h = rows(), moments()
    usual = round_with_feedback(w, Curvature.of(h), GGMLType.Q4_K)
    other = round_with_feedback(w, Curvature.of(h * scale), GGMLType.Q4_K)
    np.testing.assert_allclose(other.loss.sum(), usual.loss.sum() * scale, rtol=0.02)


def test_columns_that_saw_nothing() -> None:
    x = inputs()
    x[:, 100:140] = 0
    h = x.T @ x / len(x)
    rounded = round_with_feedback(rows(), Curvature.of(h), GGMLType.Q4_K)
    assert (rounded.loss <= rounded.plain_loss).all()


def test_an_outlier_among_inputs_and_weights() -> None:
    x, w = inputs(), rows()
    x[:, 7] *= 1000
    w[:, 300] *= 50
    h = x.T @ x / len(x)
    for kind in (GGMLType.Q4_K, GGMLType.Q2_K, GGMLType.Q4_0):
        rounded = round_with_feedback(w, Curvature.of(h), kind)
        assert (rounded.loss <= rounded.plain_loss).all()
        assert rounded.loss.sum() < rounded.plain_loss.sum()


def test_rows_of_32s() -> None:
    w, h = rows(20, 96), moments(96)
    rounded = round_with_feedback(w, Curvature.of(h), GGMLType.Q5_0)
    assert rounded.loss.sum() < rounded.plain_loss.sum()
    with pytest.raises(QuantkitError, match="a row of 96 weights cannot hold Q4_K: its blocks are of 256"):
        round_with_feedback(w, Curvature.of(h), GGMLType.Q4_K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:-1], "must be a square matrix"),
        (lambda h: h * np.where(np.arange(N) == 3, np.nan, 1), "not finite"),
        (lambda h: h * np.inf, "not finite"),
        (lambda h: h * 0, "all zero"),
        (lambda h: -h, "negative diagonal"),
        (lambda h: np.triu(h), "must be symmetric"),
        (lambda h: 4 * h - 3 * np.diag(np.diag(h)), "not positive definite"),
    ],
)
def test_bad_moments_are_refused(change, message) -> None:
    h = moments()
    with np.errstate(invalid="ignore"):
        bad = change(h)
    with pytest.raises(QuantkitError, match=message):
        Curvature.of(bad)


def test_what_does_not_fit_is_refused() -> None:
    curvature = Curvature.of(moments(256))
    with pytest.raises(QuantkitError, match="rows of 512 weights cannot be rounded by the moments of 256 columns"):
        round_with_feedback(rows(), curvature, GGMLType.Q4_K)
    with pytest.raises(QuantkitError, match="F16 cannot be rounded"):
        round_with_feedback(rows(n=256), curvature, GGMLType.F16)
    with pytest.raises(QuantkitError, match="damping of -1"):
        Curvature.of(moments(256), damping=-1)


def coupling(n_rows: int) -> np.ndarray:
    """Moments of outputs: uneven, and alike in many directions."""
    g = inputs(n_rows, 3000, seed=5)
    return np.asarray(g.T @ g / len(g))


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.IQ2_XS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_rows", [40, 256, 600])
def test_rows_make_up_for_each_other(kind: GGMLType, n_rows: int) -> None:
    w, h, b = rows(n_rows), moments(), coupling(n_rows)
    curvature = Curvature.of(h)
    alone = round_with_feedback(w, curvature, kind)
    together = round_with_feedback(w, curvature, kind, outputs=b)
    np.testing.assert_allclose(together.loss, loss_of(w, together.data, kind, h), rtol=1e-4)
    np.testing.assert_allclose(together.plain_loss, alone.plain_loss, rtol=1e-5)

    def coupled(data: np.ndarray) -> float:
        errors = w.astype(np.float64) - quantkit.dequantize_rows(data, kind)
        return float(np.einsum("ij,ij->", b @ errors, errors @ h))

    assert coupled(together.data) < 0.75 * coupled(alone.data)
    assert alone.loss.sum() < together.loss.sum() < together.plain_loss.sum()
    for threads in (1, 3):
        again = round_with_feedback(w, curvature, kind, outputs=b, threads=threads)
        assert np.array_equal(again.data, together.data)


def test_rows_that_do_not_share_are_rounded_about_as_well() -> None:
    w, h = rows(100), moments()
    curvature = Curvature.of(h)
    alone = round_with_feedback(w, curvature, GGMLType.Q4_K)
    together = round_with_feedback(w, curvature, GGMLType.Q4_K, outputs=np.eye(100))
    assert together.loss.sum() < 1.03 * alone.loss.sum()  # two sweeps instead of three
    one = round_with_feedback(w[:1], curvature, GGMLType.Q4_K, outputs=np.eye(1))
    assert np.array_equal(one.data, round_with_feedback(w[:1], curvature, GGMLType.Q4_K).data)


def test_outputs_that_do_not_fit_are_refused() -> None:
    curvature = Curvature.of(moments())
    with pytest.raises(QuantkitError, match=r"40 outputs cannot be coupled by moments of shape \(41, 41\)"):
        round_with_feedback(rows(), curvature, GGMLType.Q4_K, outputs=np.eye(41))
    with pytest.raises(QuantkitError, match="moments of outputs are not finite"):
        round_with_feedback(rows(), curvature, GGMLType.Q4_K, outputs=np.full((40, 40), np.nan))
