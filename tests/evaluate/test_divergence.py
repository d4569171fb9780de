"""Divergence: kernels against plain numpy, the whole against the plain forward pass and llama-perplexity's numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, requires_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from support.progress import check_progress
from support.tiny import BOS, N_VOCAB, plain_logits, tiny_metadata, tiny_weights, write_gguf

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels
from quantkit.evaluate.backends import load
from quantkit.evaluate.divergence import DivergenceResult, divergence, divergences
from quantkit.evaluate.parts import ROWS
from quantkit.evaluate.perplexity import opened_slices, perplexity
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.gguf import ValueType
from quantkit.formats.logits import LogitsFile
from quantkit.pipeline.run import quantize
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource

TEXT = "Sphinx of black quartz, judge my vow; pack my box with five dozen liquor jugs. " * 12
CUT, CUT64 = Chunking(n_ctx=96), Chunking(n_ctx=64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model in Q4_0, and the same in F32."""
    directory = tmp_path_factory.mktemp("pair")
    weights = tiny_weights(7)
    return (
        write_gguf(directory / "q4_0.gguf", tiny_metadata(), weights, GGMLType.Q4_0),
        write_gguf(directory / "f32.gguf", tiny_metadata(), weights),
    )


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def chunks_of(text: str, n_ctx: int) -> np.ndarray:
    ids = np.concatenate([[BOS], np.frombuffer(text.encode(), np.uint8)]).astype(np.int32)
    chunks = ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx).copy()
    chunks[:, 0] = BOS
    return chunks


def plain_log_probs(path: Path, chunks: np.ndarray) -> np.ndarray:
    first = chunks.shape[1] // 2
    return np.stack([log_softmax(plain_logits(path, chunk)[first:-1]) for chunk in chunks])


def with_error(x: np.ndarray) -> tuple[float, float]:
    return float(x.mean()), float(np.sqrt(((x * x).mean() - x.mean() ** 2) / (x.size - 1)))


def check(result: DivergenceResult, q: np.ndarray, b: np.ndarray, chunks: np.ndarray, tolerance: float) -> None:
    """Hold every statistic against its definition on log-probabilities [n_chunks, n_scored, n_vocab]."""
    first = chunks.shape[1] // 2
    targets = chunks[:, first + 1 :, None]
    nll, nll_base = (-np.take_along_axis(x, targets, 2)[..., 0] for x in (q, b))
    kld = (np.exp(b) * (b - q)).sum(-1)
    delta = np.exp(-nll) - np.exp(-nll_base)
    close = {"rel": tolerance, "abs": 1e-7}

    def same(estimate: object, expected: tuple[float, float]) -> None:
        assert (estimate.value, estimate.stderr) == pytest.approx(expected, **close)  # type: ignore[attr-defined]

    same(result.kld, with_error(kld))
    same(result.delta_p, with_error(delta))
    mean, error = with_error(delta**2)
    same(result.delta_p_rms, (mean**0.5, error / mean**0.5 / 2))
    ln, ln_base = with_error(nll), with_error(nll_base)
    same(result.ppl, (np.exp(ln[0]), np.exp(ln[0]) * ln[1]))
    same(result.ppl_base, (np.exp(ln_base[0]), np.exp(ln_base[0]) * ln_base[1]))
    # The error of a mean of differences is that of the formula with the covariance.
    ratio = with_error(nll - nll_base)
    same(result.ln_ratio, ratio)
    same(result.ratio, (np.exp(ratio[0]), np.exp(ratio[0]) * ratio[1]))
    difference = with_error(nll * np.exp(ln[0]) - nll_base * np.exp(ln_base[0]))
    same(result.difference, (np.exp(ln[0]) - np.exp(ln_base[0]), difference[1]))
    assert result.correlation == pytest.approx(np.corrcoef(nll.ravel(), nll_base.ravel())[0, 1], rel=1e-4)
    top = q.argmax(-1) == b.argmax(-1)
    five = [set(x) == set(y) for x, y in zip(*(a.argsort(-1)[..., -5:].reshape(-1, 5) for a in (q, b)), strict=True)]
    for estimate, hits in ((result.same_top, top), (result.same_top5, np.array(five))):
        p = hits.mean()
        same(estimate, (p, np.sqrt(p * (1 - p) / (hits.size - 1))))
    for percentiles, values in ((result.kld_percentiles, kld), (result.delta_p_percentiles, delta)):
        ordered = np.sort(values.ravel())
        assert percentiles[0.0] == pytest.approx(ordered[0], **close)
        assert percentiles[100.0] == pytest.approx(ordered[-1], **close)
        assert percentiles[50.0] == pytest.approx(np.median(ordered), **close)
        at = 0.9 * (ordered.size - 1)
        low, part = int(at), at - int(at)
        assert percentiles[90.0] == pytest.approx((1 - part) * ordered[low] + part * ordered[low + 1], **close)
    assert result.chunk_kld == pytest.approx(kld.mean(1).tolist(), **close)
    assert (result.n_chunks, result.n_tokens) == (len(chunks), kld.size)
    bands = result.by_position
    assert (bands[0].first, bands[-1].last) == (first, chunks.shape[1] - 2)
    for one in bands:
        part = slice(one.first - first, one.last - first + 1)
        assert one.mean_kld == pytest.approx(kld[:, part].mean(), **close)
        assert one.top_disagreement == pytest.approx(1 - top[:, part].mean())
    assert [one.first for one in bands[1:]] == [one.last + 1 for one in bands[:-1]]
    kinds = result.by_class
    assert sum(one.n_tokens for one in kinds) == kld.size and len(kinds) > 1
    assert sum(one.n_tokens * one.mean_kld for one in kinds) / kld.size == pytest.approx(kld.mean(), **close)
    assert sum(one.n_tokens * one.top_disagreement for one in kinds) / kld.size == pytest.approx(1 - top.mean())
    assert result.memory is not None and result.memory > 1 << 20
    assert 1 <= result.batch <= len(chunks)


def test_every_statistic_against_the_plain_forward_pass(pair: tuple[Path, Path]) -> None:
    chunks = chunks_of(TEXT, 96)
    q, b = (plain_log_probs(path, chunks) for path in pair)
    seen: list[tuple[float, int, float | None]] = []
    result = divergence(
        GGUFSource(pair[0]),
        GGUFSource(pair[1]),
        TEXT,
        chunking=CUT,
        compute=Compute(threads=2),
        progress=lambda *a: seen.append(a),
    )
    check(result, q, b, chunks, 2e-5)
    assert result.kld.value > 1e-4
    check_progress(seen, len(chunks))
    assert seen[-1][2] == pytest.approx(result.kld.value)


def test_a_stored_base_is_taken_as_it_is_stored(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As llama-perplexity takes it: 16-bit codes times the scale plus the minimum; -16 and less weighs nothing."""
    path = tmp_path / "base.logits"
    saved = perplexity(pair[1], TEXT, chunking=CUT, save_logits=path)
    chunks = chunks_of(TEXT, 96)
    exact = plain_log_probs(pair[1], chunks)
    file = LogitsFile(path)
    stored = np.stack([a[:, :1] * c.astype(np.float32) + a[:, 1:] for a, c in map(file.chunk, range(len(chunks)))])
    near = exact > exact.max(-1, keepdims=True) - 15.9
    assert np.abs(stored - exact)[near].max() < 16 / 65535
    assert saved.ppl.value == pytest.approx(perplexity(pair[1], TEXT, chunking=CUT).ppl.value, rel=1e-6)
    result = divergence(pair[0], path)
    opened = divergence(pair[0], LogitsFile(path))
    assert (opened.kld, opened.base) == (result.kld, str(path))
    q = plain_log_probs(pair[0], chunks)
    far = np.where(stored > -16, stored, -np.inf)
    kld = np.where(stored > -16, np.exp(far) * (stored - q), 0).sum(-1)
    assert result.kld.value == pytest.approx(kld.mean(), rel=2e-5)
    assert result.chunk_kld == pytest.approx(kld.mean(1).tolist(), rel=2e-5)
    nll_base = -np.take_along_axis(stored, chunks[:, 49:, None], 2)
    assert result.ppl_base.value == pytest.approx(np.exp(nll_base.astype(np.float64).mean()), rel=1e-6)
    assert divergence(pair[0], path, TEXT, chunking=Chunking(chunks=3)).chunk_kld == pytest.approx(result.chunk_kld[:3])
    direct = tmp_path / "direct.logits"
    divergence(*pair, TEXT, chunking=CUT, save_logits=direct)
    assert direct.read_bytes() == path.read_bytes()


def test_results_do_not_depend_on_batch_or_threads(pair: tuple[Path, Path]) -> None:
    def numbers(n_threads: int, batch: int | None) -> list[float]:
        result = divergence(*pair, TEXT, chunking=Chunking(n_ctx=96, batch=batch), compute=Compute(threads=n_threads))
        return [result.kld.value, result.kld.stderr, result.ratio.value, result.delta_p_rms.value, *result.chunk_kld]

    base = numbers(1, 1)
    for n_threads, batch in ((2, None), (3, 2), (1, 9)):
        assert numbers(n_threads, batch) == base


def test_long_contexts_go_in_slices_of_positions(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """However little memory there is, no more logits stand in it than of a slice: the numbers are the same."""
    n_ctx = 2600
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, 2 * n_ctx).astype(np.int32)
    model = load(pair[1], Compute(memory=1))
    slices = [some for some, _ in opened_slices([model], tokens.reshape(2, n_ctx), n_ctx // 2)]
    assert slices == [slice(0, ROWS), slice(ROWS, n_ctx - 1 - n_ctx // 2)]
    found = []
    for name, memory in (("much", 1 << 30), ("little", 1)):
        path, how = tmp_path / name, {"chunking": Chunking(n_ctx=n_ctx), "compute": Compute(memory=memory)}
        direct = divergence(*pair, tokens, save_logits=path, **how)
        stored = divergence(pair[0], path, **how)
        alone = perplexity(pair[1], tokens, save_logits=tmp_path / f"{name} alone", **how)
        assert (tmp_path / f"{name} alone").read_bytes() == path.read_bytes()
        found.append((path.read_bytes(), direct.chunk_kld, direct.ratio, stored.chunk_kld, alone.ppl))
    assert found[0] == found[1]


def test_several_models_in_one_pass_are_each_by_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_gguf(tmp_path / "q8_0.gguf", tiny_metadata(), tiny_weights(7), GGMLType.Q8_0)
    sources = [GGUFSource(path) for path in (third, *pair)]
    together = divergences(sources, sources[2], TEXT, chunking=CUT)
    for one, source in zip(together, sources, strict=True):
        alone = divergence(source, sources[2], TEXT, chunking=CUT)
        assert one.chunk_kld == pytest.approx(alone.chunk_kld, rel=1e-5, abs=1e-8)
        assert (one.ppl.value, one.same_top) == (pytest.approx(alone.ppl.value, rel=1e-6), alone.same_top)
    assert together[2].same_top.value == 1 and together[0].kld.value < together[1].kld.value


def test_a_model_does_not_diverge_from_itself(pair: tuple[Path, Path]) -> None:
    result = divergence(pair[1], pair[1], TEXT, chunking=Chunking(n_ctx=64, chunks=4))
    assert max(abs(v) for v in result.kld_percentiles.values()) < 1e-6
    assert (result.same_top.value, result.same_top5.value, result.delta_p_rms.value) == (1.0, 1.0, 0.0)
    assert (result.ln_ratio.value, result.correlation) == (0.0, pytest.approx(1.0))
    assert all(np.isfinite(e) for e in asdict(result)["difference"].values())


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(5, 3000),
    tile=st.integers(1, 1500),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    shift=st.sampled_from([0.0, -500.0, 900.0]),
    seed=st.integers(0, 99),
)
def test_tiles_make_the_whole(n: int, tile: int, spread: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = (rng.standard_normal((3, n)) * 6).astype(np.float32)
    q = (b + rng.standard_normal((3, n)) * spread + shift).astype(np.float32)
    targets = rng.integers(0, n, 3).astype(np.int32)
    state = np.zeros((3, logit_kernels.N_STATE))
    state[:, [logit_kernels.MAX, logit_kernels.BASE_MAX]] = -np.inf
    values, ids = np.full((3, 2, 5), -np.inf, np.float32), np.full((3, 2, 5), -1, np.int32)
    for at in range(0, n, tile):
        parts = (np.ascontiguousarray(x[:, at : at + tile]) for x in (q, b))
        logit_kernels.compare_tile(*parts, at, targets, state, values, ids)
    s = {name: state[:, getattr(logit_kernels, name)] for name in ("MAX", "SUM", "BASE_MAX", "BASE_SUM", "WEIGHTED")}
    kld = s["WEIGHTED"] / s["BASE_SUM"] - s["BASE_MAX"] - np.log(s["BASE_SUM"]) + s["MAX"] + np.log(s["SUM"])
    lq, lb = log_softmax(q), log_softmax(b)
    expected = (np.exp(lb) * (lb - lq)).sum(-1)
    # Float32 sums of differences as large as `shift`.
    np.testing.assert_allclose(kld, expected, rtol=1e-5, atol=1e-6 * (1 + abs(shift)))
    np.testing.assert_array_equal(state[:, logit_kernels.CHOSEN], q[np.arange(3), targets])
    np.testing.assert_array_equal(state[:, logit_kernels.BASE_CHOSEN], b[np.arange(3), targets])
    for i, x in enumerate((q, b)):
        np.testing.assert_array_equal(ids[:, i], np.argsort(-x, axis=1, kind="stable")[:, :5])


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 700), spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]), seed=st.integers(0, 99))
def test_packing_is_the_references(n: int, spread: float, seed: int) -> None:
    """llama-perplexity's steps in float32; the minimum may differ in its last bit, where exp and log do."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((4, n)) * spread - 3).astype(np.float32)
    targets = rng.integers(0, n, 4).astype(np.int32)
    affine, codes, nll = np.zeros((4, 2), np.float32), np.zeros((4, n), np.uint16), np.zeros(4)
    logit_kernels.pack(logits, targets, affine, codes, nll)
    for i, row in enumerate(logits):
        high = row.max()
        low = max(row.min(), np.float32(high - np.float32(16)))
        scale = np.float32((high - low) / np.float32(65535))
        total = np.float32(np.log(np.exp((row - high).astype(np.float64)).sum()))
        assert affine[i, 0] == scale
        assert affine[i, 1] == pytest.approx(np.float32(low - high) - total, rel=3e-7)
        expected = np.zeros(n)
        if scale:
            steps = np.rint(np.float32(1 / scale) * (row - low).astype(np.float32))
            expected = np.where(row > low, steps, 0)
        np.testing.assert_array_equal(codes[i], expected)
    np.testing.assert_allclose(nll, -log_softmax(logits)[np.arange(4), targets], rtol=1e-6, atol=1e-6)


def test_other_vocabularies_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    metadata = tiny_metadata()
    tokens = list(metadata.strings("tokenizer.ggml.tokens"))
    tokens[65] = "<other>"
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    other = GGUFSource(write_gguf(tmp_path / "other.gguf", metadata, tiny_weights()))
    with pytest.raises(QuantkitError, match=r"token 65 is .* against '<other>'"):
        divergence(pair[0], other, TEXT, chunking=CUT64)
    path = tmp_path / "base.logits"
    perplexity(pair[1], TEXT, chunking=Chunking(n_ctx=64, chunks=2), save_logits=path)
    data = bytearray(path.read_bytes())
    data[12:16] = np.int32(N_VOCAB - 2).tobytes()
    path.write_bytes(data)
    with pytest.raises(QuantkitError, match=f"{N_VOCAB} tokens, but the base .* has {N_VOCAB - 2}|outside its voc"):
        divergence(GGUFSource(pair[0]), path)


def test_another_text_than_the_files_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "base.logits"
    perplexity(pair[1], TEXT, chunking=CUT64, save_logits=path)
    for text in (TEXT[1:], TEXT[:400]):
        with pytest.raises(QuantkitError, match="another text"):
            divergence(GGUFSource(pair[0]), path, text)
    with pytest.raises(QuantkitError, match="copy it"):
        divergence(GGUFSource(pair[0]), path, save_logits=tmp_path / "again")
    with pytest.raises(QuantkitError, match="text"):
        divergence(GGUFSource(pair[0]), GGUFSource(pair[1]))
    with pytest.raises(QuantkitError, match="tokens, but"):
        divergence(GGUFSource(pair[0]), GGUFSource(pair[1]), "short", chunking=CUT64)


def test_nan_names_the_model_that_made_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["blk.1.ffn_up.weight"][3, 4] = np.nan
    broken = GGUFSource(write_gguf(tmp_path / "broken.gguf", tiny_metadata(), weights))
    for models in ((broken, GGUFSource(pair[1])), (GGUFSource(pair[1]), broken)):
        with pytest.raises(QuantkitError, match=r"broken\.gguf: layer 1"):
            divergence(*models, TEXT, chunking=CUT64)
    with pytest.raises(QuantkitError, match=r"broken\.gguf: layer 1"):
        perplexity(broken, TEXT, chunking=CUT64, save_logits=tmp_path / "f")
    assert not (tmp_path / "f").exists() and not list(tmp_path.glob("*.partial"))


@requires_shared
def test_llama_perplexitys_numbers(docs_llama: Path, tmp_path: Path) -> None:
    """llama-perplexity's numbers for this checkpoint in Q4_K_M, dequantized to F32 so that it rounds no activations.

    Twelve chunks of docs-test.txt, against its own logits file of the F32 checkpoint.
    """
    path = tmp_path / "q4_k_m.gguf"
    source = CheckpointSource(docs_llama)
    quantize(source, path, type="Q4_K_M")
    text = (SHARED / "data" / "docs-test.txt").read_text(encoding="utf-8")
    result = divergence(path, source, text, chunking=Chunking(chunks=12))
    assert result.ppl.value == pytest.approx(13.124439, rel=1e-4)
    assert result.ppl_base.value == pytest.approx(12.930352, rel=1e-4)
    assert (result.ln_ratio.value, result.ln_ratio.stderr) == pytest.approx((0.014899, 0.003507), rel=0.01)
    assert (result.difference.value, result.difference.stderr) == pytest.approx((0.194088, 0.046471), rel=0.01)
    assert result.correlation == pytest.approx(0.9975, abs=5e-5)
    assert (result.kld.value, result.kld.stderr) == pytest.approx((0.016417, 0.000403), rel=0.01)
    kld = {100.0: 0.340021, 99.9: 0.213601, 99.0: 0.102282, 95.0: 0.053594, 90.0: 0.03578, 50.0: 0.010539}
    assert {k: result.kld_percentiles[k] for k in kld} == pytest.approx(kld, rel=0.01)
    delta = {100.0: 0.30224, 99.9: 0.21399, 99.0: 0.10223, 90.0: 0.0187, 25.0: -0.00818, 1.0: -0.12058, 0.0: -0.35957}
    assert {k: result.delta_p_percentiles[k] for k in delta} == pytest.approx(delta, rel=0.01)
    assert (result.delta_p.value, result.delta_p.stderr) == pytest.approx((-0.00384, 0.00062), rel=0.01)
    assert (result.delta_p_rms.value, result.delta_p_rms.stderr) == pytest.approx((0.03472, 0.00136), rel=0.01)
    assert (result.same_top.value, result.same_top.stderr) == pytest.approx((0.92843, 0.00466), abs=5e-4)
