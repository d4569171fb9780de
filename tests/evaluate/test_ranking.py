"""Scores of classifiers and rerankers: against transformers (recorded) and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference, requires_torch
from make_checkpoints import make_checkpoint
from record_embeddings import tokens as ids_of
from support.conversion import convert, write
from support.families import CLASSIFIERS
from support.llama_reference import llama_vector
from support.program import call, refusal

import quantkit
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.embeddings import RANK
from quantkit.evaluate.ranking import Classifier, labels, pair, rank, ranks, tokens
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

GOLDENS = ROOT / "tests" / "goldens" / "scores"
# llama.cpp has neither BERT's dense layer, which its converter leaves out, nor DistilBERT's ReLU.
OTHERWISE = {"tiny-bert-classifier", "tiny-distilbert-classifier"}
ONE = Compute(threads=1)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=requires_torch)])
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDENS.glob("*.json")))
def test_scores_are_those_of_transformers(tmp_path: Path, name: str, backend: str) -> None:
    """In all lengths; our GELU is llama.cpp's, an approximation whose error is about 1e-4."""
    source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    head = Classifier(load(source, Compute(threads=1, backend=backend)))
    for text in json.loads((GOLDENS / f"{name}.json").read_text())["texts"]:
        np.testing.assert_allclose(head.scores(ids_of(text["length"])), text["scores"], rtol=1e-3, atol=2e-3)


def test_all_that_llama_cpp_computes_as_transformers_are_recorded() -> None:
    assert {path.stem for path in GOLDENS.glob("*.json")} == {*CLASSIFIERS} - OTHERWISE


@requires_reference
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f32")
    head, ids = Classifier(Transformer(GGUFSource(path), ONE)), ids_of(48)
    theirs = llama_vector(path, ids.tolist(), RANK, head.n_out)
    assert np.ptp(theirs) > 0.01 or head.n_out == 1
    # llama.cpp looks GELU up in a table of float16.
    np.testing.assert_allclose(head.scores(ids), theirs, rtol=2e-3, atol=2e-3)


@requires_reference
@pytest.mark.parametrize(
    ("name", "adds_separator", "between"),
    [
        ("tiny-bert-classifier", False, "[SEP]"),
        ("tiny-xlm-roberta-reranker", False, "</s>"),
        ("tiny-xlm-roberta-reranker", True, "</s></s>"),
    ],
)
def test_pairs_are_separated_as_llama_embedding_does(
    tmp_path: Path, name: str, adds_separator: bool, between: str
) -> None:
    import llama_cpp

    source = CheckpointSource(make_checkpoint(name, tmp_path), "f16")
    source.metadata.set("tokenizer.ggml.add_sep_token", ValueType.BOOL, adds_separator)
    if adds_separator:
        source.metadata.set("tokenizer.ggml.seperator_token_id", ValueType.UINT32, 2)
    path = write(source, tmp_path / "m.gguf")
    metadata = GGUFSource(path).metadata
    vocabulary = Vocabulary.from_metadata(metadata)
    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        theirs = llm.tokenize(f"the other hats{between}on it".encode(), add_bos=True, special=True)
    finally:
        llm.close()
    assert tokens(metadata, vocabulary, ("the other hats", "on it")).tolist() == theirs
    assert tokens(metadata, vocabulary, f"the other hats{between}on it").tolist() == theirs
    (score,) = rank(path, [("the other hats", "on it")], compute=ONE)
    theirs_score = llama_vector(path, theirs, RANK, len(score))
    np.testing.assert_allclose(score, theirs_score, rtol=2e-3, atol=4e-3)


def test_a_pair_stands_in_the_prompt_of_the_model(tmp_path: Path) -> None:
    source = CheckpointSource(make_checkpoint("tiny-qwen3-reranker", tmp_path), "f16")
    vocabulary = Vocabulary.from_metadata(source.metadata)
    text = vocabulary.decode(tokens(source.metadata, vocabulary, ("{document}?", "it is")))
    assert "<Query>: {document}?\n<Document>: it is<|im_end|>" in text
    assert labels(source.metadata, 2) == ["yes", "no"]
    np.testing.assert_allclose(rank(source, [("a", "b")], compute=ONE).sum(axis=1), 1, rtol=1e-6)


def test_the_command(tmp_path: Path) -> None:
    path = make_checkpoint("tiny-bert-classifier", tmp_path)
    (tmp_path / "pairs.txt").write_text("the hats\ton it\nthe other\n", encoding="utf-8")
    told = json.loads(call("embed", path, "-f", tmp_path / "pairs.txt", "--json").stdout)
    assert told["texts"] == ["the hats\ton it", "the other"]
    assert told["labels"] == ["no", "maybe", "yes"]
    np.testing.assert_allclose(told["scores"], quantkit.rank(path, [("the hats", "on it"), "the other"]), rtol=1e-5)
    line = call("embed", path, "-p", "the other", "--pooling", "rank").stdout.split()
    assert line[::2] == told["labels"]
    assert [float(x) for x in line[1::2]] == told["scores"][1]
    vectors = json.loads(call("embed", path, "-p", "the other", "--pooling", "mean", "--json").stdout)["vectors"]
    assert np.shape(vectors) == (1, 256)


def test_wrong_requests(tmp_path: Path) -> None:
    assert "it has no classifier" in refusal("embed", TINYLM, "-p", "a", "--pooling", "rank")
    path = convert(make_checkpoint("tiny-qwen3-reranker", tmp_path), tmp_path / "m.gguf", "f16")
    (tmp_path / "text.txt").write_text("the other hats on it " * 40)
    told = refusal("perplexity", path, "--text", tmp_path / "text.txt", "--n-ctx", "16")
    assert "a reranker (qwen3): it gives texts scores" in told
    assert "a reranker" in refusal("generate", path, "--prompt", "the")
    with pytest.raises(QuantkitError, match="one tab between them, not 2"):
        pair("a\tb\tc")
    assert (pair("a\tb"), pair("a")) == (("a", "b"), "a")
    model = Transformer(CheckpointSource(TINYLM), ONE)
    assert (ranks(model, None), ranks(model, "rank"), ranks(model, "mean")) == (False, True, False)
    vocabulary = Vocabulary.from_metadata(model.source.metadata)
    with pytest.raises(QuantkitError, match="nothing to put between two texts"):
        tokens(model.source.metadata, vocabulary, ("a", "b"))


def test_a_damaged_classifier(tmp_path: Path) -> None:
    source = CheckpointSource(make_checkpoint("tiny-qwen3-reranker", tmp_path), "f16")
    source.metadata.set("tokenizer.chat_template.rerank", ValueType.STRING, "{document}" * 9)
    with pytest.raises(QuantkitError, match=r"does not have \{query\} and \{document\} once"):
        rank(source, [("a", "b")], compute=ONE)
    model = Transformer(source, ONE)
    assert model.spec.shapes["cls.output.weight"] == (2, model.spec.n_embd)


@pytest.mark.parametrize("name", ["tiny-bert-classifier", "tiny-qwen3-reranker"])
def test_the_classifier_is_rounded_without_moments(tmp_path: Path, name: str) -> None:
    """Importance matrices leave it out, and error feedback rounds it as it is."""
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f16")
    (tmp_path / "text.txt").write_text("the other hats are on the table, it is said. " * 60)
    text = ("--text", tmp_path / "text.txt", "--n-ctx", 32, "--chunks", 4)
    call("imatrix", path, *text, "-o", tmp_path / "i.gguf")
    options = ("--rounding", "gptq", "--calibration", tmp_path / "text.txt", "--n-ctx", 32, "--chunks", 16)
    call("quantize", path, tmp_path / "q.gguf", "Q4_0", *options)
    call("quantize", path, tmp_path / "p.gguf", "Q4_0")
    rounded, plain = GGUFSource(tmp_path / "q.gguf"), GGUFSource(tmp_path / "p.gguf")
    head = [tensor for tensor in rounded.tensors if tensor.startswith("cls")]
    assert head
    for tensor in head:
        rows = rounded.tensors[tensor].n_rows
        assert rounded.read(tensor, 0, rows).tobytes() == plain.read(tensor, 0, rows).tobytes()
    assert rank(tmp_path / "q.gguf", ["the hats"], compute=ONE).shape[0] == 1
