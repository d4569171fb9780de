"""Vectors of texts: against transformers (recorded) and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference, requires_torch
from make_checkpoints import make_checkpoint
from record_embeddings import tokens
from support.conversion import convert
from support.families import ENCODERS, EVALUATED, OWN_CODE
from support.llama_reference import llama_vector
from support.program import refusal

import quantkit
from quantkit.errors import QuantkitError
from quantkit.evaluate.attention import buckets
from quantkit.evaluate.backends import load
from quantkit.evaluate.embeddings import POOLINGS, embed, pooled, pooling_of
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

GOLDENS = ROOT / "tests" / "goldens" / "embeddings"
RECORDED = sorted(path.stem for path in GOLDENS.glob("*.json"))
ONE = Compute(threads=1)


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=requires_torch)])
@pytest.mark.parametrize("name", RECORDED)
def test_vectors_are_those_of_transformers(tmp_path: Path, name: str, backend: str) -> None:
    """In all lengths and poolings; our GELU is llama.cpp's, an approximation whose error is about 1e-4."""
    model = load(CheckpointSource(make_checkpoint(name, tmp_path), "f32"), Compute(threads=1, backend=backend))
    for text in json.loads((GOLDENS / f"{name}.json").read_text())["texts"]:
        for pooling in POOLINGS:
            vector = pooled(model, tokens(text["length"]), pooling)
            assert cosine(vector, text[pooling]) > 0.9999
            assert np.abs(vector - text[pooling]).max() < 0.02


@requires_reference
@pytest.mark.parametrize("name", [name for name in ENCODERS if name in EVALUATED])
def test_vectors_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f32")
    model, ids = Transformer(GGUFSource(path), ONE), tokens(48)
    for pooling, number in POOLINGS.items():
        ours, theirs = pooled(model, ids, pooling), llama_vector(path, ids.tolist(), number)
        assert cosine(ours, theirs) > 0.99995


@requires_reference
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-xlm-roberta", "tiny-qwen3-embedding"])
def test_texts(tmp_path: Path, name: str) -> None:
    """From text to vector with the pooling that the checkpoint's modules say."""
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f16")
    texts = ["The other hat is on the table.", "it"]
    vectors = quantkit.embed(path, texts, compute=ONE)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    vocabulary = Vocabulary.from_metadata(GGUFSource(path).metadata)
    for text, vector in zip(texts, vectors, strict=True):
        assert cosine(vector, llama_vector(path, vocabulary.encode(text).tolist(), -1)) > 0.9999


def test_later_tokens_count_in_an_encoder_and_not_in_a_decoder(tmp_path: Path) -> None:
    for name, causal in (("tiny-bert", False), ("tiny-qwen3-embedding", True)):
        model = Transformer(CheckpointSource(make_checkpoint(name, tmp_path), "f32"), ONE)
        short, long = (model.hidden(tokens(48)[None, :n].astype(np.int32), 0, 8) for n in (20, 48))
        assert (np.abs(short - long).max() < 1e-5) == causal
        assert model.spec.causal == causal


@requires_torch
@pytest.mark.parametrize("n_buckets", [4, 8, 32, 36, 64, 128, 256, 508])
def test_learned_distances_are_looked_up_as_in_transformers(n_buckets: int) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(1 - 600, 600)
    expected = T5Attention._relative_position_bucket(distances, num_buckets=n_buckets, max_distance=128)
    np.testing.assert_array_equal(buckets(n_buckets, 600), expected.numpy())


def test_the_importance_of_an_encoder_and_its_decoder_left_alone(tmp_path: Path) -> None:
    source = CheckpointSource(make_checkpoint("tiny-t5", tmp_path))
    matrix = quantkit.importance_matrix(source, tokens(96).astype(np.int32), chunking=Chunking(n_ctx=32), compute=ONE)
    matrices = {name for name in matrix.weights() if name.startswith("enc.blk.")}
    assert matrices == set(matrix.weights()) and len(matrices) == 2 * 7
    assert {name for name in source.tensors if name.startswith("dec.")}


def test_an_encoder_has_no_perplexity(tmp_path: Path) -> None:
    path = convert(make_checkpoint("tiny-bert", tmp_path), tmp_path / "m.gguf", "f16")
    (tmp_path / "text.txt").write_text("the other hats on it " * 40)
    told = refusal("perplexity", path, "--text", tmp_path / "text.txt", "--n-ctx", "16")
    assert "an encoder (bert): its tokens see those after them" in told
    assert "an encoder" in refusal("generate", path, "--prompt", "the")


@pytest.mark.parametrize("name", ["tiny-t5-encoder", "tiny-qwen3-reranker"])
def test_what_goes_by_predictions_is_refused(tmp_path: Path, name: str) -> None:
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f16")
    (tmp_path / "text.txt").write_text("the other hats on it " * 400)
    calibrated = ("--calibration", tmp_path / "text.txt", "-o", tmp_path / "out.gguf")
    told = refusal("quantize", path, "Q4_K_M", "--rounding", "yaqa", *calibrated)
    assert "rounding yaqa goes by what a model predicts" in told
    assert "choosing types goes by what" in refusal("quantize", path, "--target-size", "Q4_K_M", *calibrated)


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="there is no pooling 'max'"):
        embed(TINYLM, ["a"], pooling="max", compute=ONE)
    model = Transformer(CheckpointSource(TINYLM), ONE)
    with pytest.raises(QuantkitError, match="names no pooling: choose mean, cls, last"):
        pooling_of(model, None)
    with pytest.raises(QuantkitError, match="without tokens"):
        pooled(model, [], "mean")
    roberta = Transformer(CheckpointSource(make_checkpoint("tiny-roberta", tmp_path)), ONE)
    with pytest.raises(QuantkitError, match="learned 256 positions"):
        pooled(roberta, tokens(257), "mean")
    assert embed(model, ["a b", "c"], pooling="last", normalise=False).shape == (2, model.spec.n_embd)


def test_every_encoder_that_transformers_has_is_recorded() -> None:
    assert set(RECORDED) == {name for name in ENCODERS if name in EVALUATED and name not in OWN_CODE}
