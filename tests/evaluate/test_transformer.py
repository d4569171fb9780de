"""The whole forward pass, against the same written plainly in float64, and against itself in other batches."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.progress import check_progress
from support.tiny import (
    BOS,
    FAMILIES,
    N_EMBD,
    N_VOCAB,
    plain_logits,
    relative_error,
    tiny_metadata,
    tiny_weights,
    write_gguf,
)

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.evaluate import transformer
from quantkit.evaluate.backends import load
from quantkit.evaluate.parts import aligned
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.machine import CORE_TYPE, Processor
from quantkit.sources.source import GGUFSource


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_metadata(), tiny_weights())


def some_tokens(n_seq: int, n_ctx: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, (n_seq, n_ctx)).astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GGMLType.F32, {}),
        (GGMLType.F16, {"tied": True}),
        (GGMLType.Q8_0, {"biases": True}),
        (GGMLType.BF16, {"factors": True}),
    ],
)
@pytest.mark.parametrize("n_ctx", [7, 150])
def test_logits_equal_the_plain_forward_pass(tmp_path, kind, options, n_ctx):
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(1, **options), kind)
    tokens = some_tokens(2, n_ctx)
    logits = Transformer(GGUFSource(path), Compute(threads=2)).logits(tokens)
    for row, expected in zip(logits, (plain_logits(path, t) for t in tokens), strict=True):
        assert relative_error(row, expected) < 2e-6


def test_linear_rope_scaling(tmp_path):
    extra = {"rope__scaling__type": (ValueType.STRING, "linear"), "rope__scaling__factor": (ValueType.FLOAT32, 4.0)}
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(**extra), tiny_weights(2))
    tokens = some_tokens(1, 40)
    assert relative_error(Transformer(GGUFSource(path)).logits(tokens)[0], plain_logits(path, tokens[0], 0.25)) < 2e-6


@pytest.mark.parametrize("n_ctx", [10, 300])
def test_results_do_not_depend_on_batch_threads_or_memory(model_path, n_ctx):
    tokens = some_tokens(7, n_ctx)
    source = GGUFSource(model_path)
    base = Transformer(source, Compute(threads=1)).log_likelihoods(tokens, n_ctx // 2)
    for n_threads, memory, step in [(1, None, 1), (2, None, 7), (3, None, 2), (4, 0, 3), (16, None, 7)]:
        model = Transformer(source, Compute(threads=n_threads, memory=memory))
        other = np.concatenate([model.log_likelihoods(tokens[i : i + step], n_ctx // 2) for i in range(0, 7, step)])
        np.testing.assert_allclose(other, base, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_activations_in_files_change_nothing(tmp_path, name):
    source, n_ctx = GGUFSource(family_path(tmp_path, name)), 70
    tokens, found = some_tokens(2 * aligned(n_ctx), n_ctx), []
    for memory in (1 << 30, 0):
        model = Transformer(source, Compute(threads=2, memory=memory))
        with model.exactly(n_ctx):
            found.append(model.log_likelihoods(tokens, 20))
            x = model.hidden(tokens, 0, n_ctx)
            assert isinstance(x, np.memmap) == (memory == 0)
            found.append(np.array(x))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])
    assert model.batch(n_ctx) > 1


@pytest.mark.parametrize("n_ctx", [8, 70, 600, 1100])
def test_exactly_the_same_bits_whatever_the_batch_threads_or_memory(model_path, n_ctx):
    n = 2 * aligned(n_ctx) + 1
    tokens, source = some_tokens(n, n_ctx), GGUFSource(model_path)
    found = []
    for n_threads, memory, step in [(1, None, n), (2, None, aligned(n_ctx)), (3, 0, n), (5, None, 2 * aligned(n_ctx))]:
        model = Transformer(source, Compute(threads=n_threads, memory=memory))
        with model.exactly(n_ctx):
            parts = [model.log_likelihoods(tokens[i : i + step], n_ctx // 2) for i in range(0, n, step)]
        found.append(np.concatenate(parts))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_scored_positions_alone_equal_all_of_them(model_path):
    tokens = some_tokens(3, 100)
    model = Transformer(GGUFSource(model_path), Compute(threads=2))
    full = model.logits(tokens)
    np.testing.assert_allclose(model.logits(tokens, 37, 61), full[:, 37:61], rtol=1e-4, atol=1e-4)
    wide = full.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected[:, 50:-1], tokens[:, 51:, None], axis=2)[..., 0]
    np.testing.assert_allclose(model.log_likelihoods(tokens, 50), expected, rtol=1e-5, atol=1e-6)


def test_later_tokens_change_nothing_before_them(model_path):
    model = Transformer(GGUFSource(model_path), Compute(threads=1))
    tokens = some_tokens(1, 90)
    changed = tokens.copy()
    changed[0, 60:] = (changed[0, 60:] + 1) % N_VOCAB
    np.testing.assert_array_equal(model.logits(tokens, 0, 60), model.logits(changed, 0, 60))


def test_perplexity_scores_the_second_half_of_chunks_that_begin_with_bos(model_path):
    text = "The quick brown fox jumps over the lazy dog. " * 20
    source = GGUFSource(model_path)
    seen = []
    result = perplexity(
        source,
        text,
        chunking=Chunking(n_ctx=64),
        compute=Compute(threads=2),
        progress=lambda *args: seen.append(args),
    )
    ids = np.concatenate([[BOS], np.frombuffer(text.encode(), np.uint8)])
    chunks = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    nll = []
    for chunk in chunks:
        logits = plain_logits(model_path, np.concatenate([[BOS], chunk[1:]]))[32:63]
        nll.append(np.log(np.exp(logits).sum(1)) - logits[np.arange(31), chunk[33:]])
    nll = np.array(nll)
    assert (result.n_chunks, result.n_tokens) == (len(chunks), nll.size)
    assert result.ppl.value == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.ppl.stderr == pytest.approx(nll.std() / np.sqrt(nll.size - 1) * np.exp(nll.mean()), rel=1e-4)
    assert result.chunk_nll == pytest.approx(nll.mean(1), rel=1e-5)
    assert result.running[-1] == result.ppl.value
    check_progress(seen, len(chunks))
    assert seen[-1][2] == result.running[-1]
    limited = perplexity(source, ids, chunking=Chunking(n_ctx=64, chunks=3, batch=2))
    assert limited.n_chunks == 3
    assert limited.ppl.value == pytest.approx(result.running[2], rel=1e-6)


def test_what_computes_is_told_and_what_would_be_faster(model_path, monkeypatch, caplog):
    model = load(model_path, Compute(threads=1))
    result = perplexity(model, some_tokens(1, 200)[0], chunking=Chunking(n_ctx=64))
    assert (result.backend, result.precision, result.blas) == ("numpy", "f32", model.blas)
    caplog.set_level("INFO", "quantkit")
    load(model_path, Compute(threads=1))
    assert f"backend numpy, f32, 1 thread, matrix products by {model.blas}" in caplog.text
    assert "import quantkit first" not in caplog.text
    zen5 = Processor("AuthenticAMD", 26, 2, frozenset(["avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"]))
    monkeypatch.setattr(Processor, "here", lambda: zen5)
    monkeypatch.setattr(transformer, "blas_name", lambda: "OpenBLAS Haswell")
    monkeypatch.delenv(CORE_TYPE, raising=False)
    load(model_path, Compute(threads=1))
    assert "import quantkit first, or set OPENBLAS_CORETYPE=SkylakeX" in caplog.text
    caplog.clear()
    monkeypatch.setenv(CORE_TYPE, "Haswell")
    load(model_path, Compute(threads=1))
    assert "import quantkit first" not in caplog.text


def test_text_that_is_too_short(model_path):
    with pytest.raises(QuantkitError, match=r"15 tokens, but 16 are needed"):
        perplexity(GGUFSource(model_path), "x" * 14, chunking=Chunking(n_ctx=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_ctx": 2}, "context of 2"), ({"chunks": 0}, "0 chunks"), ({"batch": 0}, "run 0 chunks")],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(QuantkitError, match=message):
        Chunking(**arguments)


def test_a_model_is_a_path_a_source_or_loaded(model_path):
    tokens = some_tokens(1, 200)[0]
    cut, compute = Chunking(n_ctx=64), Compute(threads=1)
    model = load(model_path, compute)
    results = [
        perplexity(model_path, tokens, chunking=cut, compute=compute),
        perplexity(str(model_path), tokens, chunking=cut, compute=compute),
        perplexity(GGUFSource(model_path), tokens, chunking=cut, compute=compute),
        perplexity(model, tokens, chunking=cut),
    ]
    assert len({result.ppl for result in results}) == 1
    assert load(model) is model
    with pytest.raises(QuantkitError, match="loaded already"):
        perplexity(model, tokens, chunking=cut, compute=compute)


def test_nan_names_the_first_layer_that_made_it(tmp_path):
    weights = tiny_weights()
    weights["blk.1.ffn_down.weight"][5, 7] = np.nan
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), weights)
    model = Transformer(GGUFSource(path), Compute(threads=1))
    for call in (model.logits, model.log_likelihoods):
        with pytest.raises(QuantkitError, match=r"blk\.1\b.*NaN"):
            call(some_tokens(2, 20))


def test_nan_in_the_output_matrix(tmp_path):
    weights = tiny_weights()
    weights["output.weight"][100, 7] = np.nan
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), weights)
    model = Transformer(GGUFSource(path), Compute(threads=1))
    for call in (model.logits, model.log_likelihoods):
        with pytest.raises(QuantkitError, match=r"output\.weight"):
            call(some_tokens(2, 20))


def test_unknown_architecture(tmp_path):
    metadata = tiny_metadata()
    metadata.set("general.architecture", ValueType.STRING, "nonesuch")
    path = write_gguf(tmp_path / "m.gguf", metadata, tiny_weights())
    with pytest.raises(QuantkitError, match=r"nonesuch.*quantkit architectures"):
        Transformer(GGUFSource(path))


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    weights = tiny_weights()
    del weights["blk.1.attn_v.weight"]
    path = write_gguf(tmp_path / "missing.gguf", tiny_metadata(), weights)
    with pytest.raises(QuantkitError, match=r"blk\.1\.attn_v\.weight is missing"):
        Transformer(GGUFSource(path)).logits(some_tokens(1, 5))
    weights = tiny_weights()
    weights["blk.0.ffn_up.weight"] = weights["blk.0.ffn_up.weight"][:, : N_EMBD // 2].copy()
    path = write_gguf(tmp_path / "misshapen.gguf", tiny_metadata(), weights)
    with pytest.raises(QuantkitError, match=r"blk\.0\.ffn_up\.weight has shape"):
        Transformer(GGUFSource(path)).logits(some_tokens(1, 5))


def test_token_outside_the_vocabulary(model_path):
    with pytest.raises(QuantkitError, match="token 258"):
        Transformer(GGUFSource(model_path)).logits(np.array([[1, 258]], np.int32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count_kv", 4),
        ("block_count", 1 << 30),
        ("rope.dimension_count", 99),
    ],
)
def test_impossible_metadata(tmp_path, key, value):
    metadata = tiny_metadata()
    metadata.set(f"llama.{key}", ValueType.UINT32, value)
    path = write_gguf(tmp_path / "m.gguf", metadata, tiny_weights())
    with pytest.raises(QuantkitError):
        Transformer(GGUFSource(path))


def family_path(tmp_path, name, **keys):
    family = FAMILIES[name]
    metadata = family.metadata()
    for key, value in keys.items():
        metadata.set(f"{family.arch}.{key.replace('__', '.')}", ValueType.UINT32, value)
    return write_gguf(tmp_path / f"{name}.gguf", metadata, family.weights(11))


@pytest.mark.parametrize("name", ["qwen3moe", "gemma2", "gpt2", "gptneox"])
def test_families_do_not_depend_on_batch_threads_or_memory(tmp_path, name):
    source = GGUFSource(family_path(tmp_path, name))
    tokens = some_tokens(5, 70)
    base = Transformer(source, Compute(threads=1)).log_likelihoods(tokens, 20)
    for n_threads, memory, step in [(1, None, 1), (2, None, 5), (3, 0, 2)]:
        model = Transformer(source, Compute(threads=n_threads, memory=memory))
        other = np.concatenate([model.log_likelihoods(tokens[i : i + step], 20) for i in range(0, 5, step)])
        np.testing.assert_allclose(other, base, rtol=1e-4)
    wide = Transformer(source, Compute(threads=2)).logits(tokens).astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected[:, 20:-1], tokens[:, 21:, None], axis=2)[..., 0]
    np.testing.assert_allclose(base, expected, rtol=1e-4)


def test_an_observer_sees_what_each_expert_multiplies(tmp_path):
    model = Transformer(GGUFSource(family_path(tmp_path, "mixtral")), Compute(threads=2))
    seen = Counter()

    def observer(names, rows, at, expert):
        seen.update({(name, expert): len(rows) for name in names})

    model.observer = observer
    model.logits(some_tokens(3, 50))
    n_layer = FAMILIES["mixtral"].n_layer
    for i in range(n_layer):
        for part in ("gate", "up", "down"):
            counts = [seen[f"blk.{i}.ffn_{part}_exps.weight", e] for e in range(8)]
            assert sum(counts) == 3 * 50 * 2
            assert all(counts)
        assert seen[f"blk.{i}.ffn_gate_inp.weight", None] == seen[f"blk.{i}.attn_q.weight", None] == 150


def test_a_text_longer_than_the_learned_positions(tmp_path):
    model = Transformer(GGUFSource(family_path(tmp_path, "gpt2")))
    model.logits(some_tokens(1, 320), 310)
    with pytest.raises(QuantkitError, match=r"321 tokens are too long .* 320 positions"):
        model.logits(some_tokens(1, 321))


def test_nan_of_an_expert_names_its_layer(tmp_path):
    family = FAMILIES["mixtral"]
    weights = family.weights(12)
    weights["blk.2.ffn_up_exps.weight"][:, 3] = np.nan
    model = Transformer(GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), weights)))
    with pytest.raises(QuantkitError, match=r"blk\.2\b.*NaN"):
        model.logits(some_tokens(1, 20))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mixtral", "expert_used_count", 9),
        ("mixtral", "expert_used_count", 0),
        ("qwen3moe", "expert_group_count", 4),
        ("gemma2", "attention__sliding_window", 0),
        ("gemma2", "attention__key_length_swa", 8),
        ("gemma2", "attn_logit_softcapping", 0),
        ("gemma2", "final_logit_softcapping", 0),
        ("gptneox", "rope__dimension_count", 5),
        ("granite", "logit_scale", 0),
        ("granite", "expert_count", 4),
        ("phi3", "expert_count", 4),
        ("qwen2", "nextn_predict_layers", 9),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(tmp_path, name, key, value):
    with pytest.raises(QuantkitError, match=r"^[^\n]*$"):
        Transformer(GGUFSource(family_path(tmp_path, name, **{key: value})))


def test_logits_of_models_that_see_later_tokens_are_refused(tmp_path):
    family = FAMILIES["qwen3"]
    metadata = family.metadata()
    metadata.set("qwen3.attention.causal", ValueType.BOOL, False)
    path = write_gguf(tmp_path / "m.gguf", metadata, family.weights(1))
    with pytest.raises(QuantkitError, match=r"an encoder \(qwen3\)"):
        Transformer(GGUFSource(path)).logits(np.zeros((1, 8), np.int32))


@pytest.mark.parametrize("extra", ["blk.1.attn_q_norm.weight", "blk.0.attn_q.scale", "cls.output.weight"])
def test_tensors_that_the_forward_pass_would_leave_out_are_refused(tmp_path, extra):
    weights = {**tiny_weights(), extra: np.ones(16, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), weights)
    with pytest.raises(QuantkitError, match=extra.replace(".", r"\.")):
        Transformer(GGUFSource(path))


@pytest.mark.parametrize(
    "missing", ["blk.3.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight"]
)
def test_missing_tensors_of_a_family_are_named(tmp_path, missing):
    family = FAMILIES["qwen3moe"]
    weights = family.weights(1)
    del weights[missing]
    path = write_gguf(tmp_path / "m.gguf", family.metadata(), weights)
    with pytest.raises(QuantkitError, match=rf"{missing} is missing"):
        Transformer(GGUFSource(path)).logits(some_tokens(1, 5))


HOSTILE = [
    (ValueType.UINT32, 0),
    (ValueType.UINT32, 1),
    (ValueType.UINT32, 7),
    (ValueType.UINT32, 2**32 - 1),
    (ValueType.UINT64, 2**64 - 1),
    (ValueType.INT32, -1),
    (ValueType.FLOAT32, 0.0),
    (ValueType.FLOAT32, -3.5),
    (ValueType.FLOAT32, 3e38),
    (ValueType.FLOAT64, 1e-300),
    (ValueType.FLOAT32, math.nan),
    (ValueType.STRING, "x"),
    (ValueType.BOOL, True),
    (ValueType.BOOL, False),
]


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(FAMILIES)), data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_metadata_is_refused_or_computed(tmp_path_factory, name, data):
    family = FAMILIES[name]
    metadata = family.metadata()
    keys = [key for key in metadata if key.startswith(family.arch) and not key.endswith("vocab_size")]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        kind, value = data.draw(st.sampled_from(HOSTILE))
        metadata.set(key, kind, value)
    path = write_gguf(tmp_path_factory.mktemp("hostile") / "m.gguf", metadata, family.weights(1))
    try:
        Transformer(GGUFSource(path), Compute(threads=1)).logits(some_tokens(1, 5))
    except QuantkitError as error:
        assert "\n" not in str(error)
