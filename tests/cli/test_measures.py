"""`quantkit perplexity` with a base and `quantkit imatrix`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINYLM
from make_checkpoints import make_checkpoint
from test_cli import error, run

import quantkit
from quantkit.formats.imatrix import ImportanceMatrix

TEXT = ROOT / "fixtures" / "tinylm-test.txt"
SOME = ("--text", TEXT, "--chunks", 4, "--n-ctx", 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measures") / "tinylm-Q4_0.gguf"
    run("quantize", TINYLM, "--type", "Q4_0", "-o", path)
    return path


def test_divergence_from_a_model_and_from_its_logits(model: Path, tmp_path: Path) -> None:
    stored = tmp_path / "base.logits"
    direct = json.loads(run("perplexity", model, "--base", TINYLM, *SOME, "--json").stdout)
    run("perplexity", TINYLM, *SOME, "--save-logits", stored)
    again = json.loads(run("perplexity", model, "--base-logits", stored, "--json").stdout)
    assert direct["n_tokens"] == again["n_tokens"] == 4 * 63
    assert again["kld"]["value"] == pytest.approx(direct["kld"]["value"], rel=0.02)
    assert set(direct["kld_percentiles"]) == {
        str(p) for p in (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
    }
    text = run("perplexity", model, "--base-logits", stored, "--chunks", 2).stdout
    for expected in ("PPL(model)", "PPL(base)", "Kullback-Leibler", "Δp", "same first five", "positions", "2 chunks"):
        assert expected in text


def test_bases_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    stored = tmp_path / "base.logits"
    stored.write_bytes(b"_logits_" + bytes(40))
    assert "damaged" in error("perplexity", model, "--base-logits", stored)
    assert "not a file of log-probabilities" in error("perplexity", model, "--base-logits", TEXT)
    line = error("perplexity", model, "--base-logits", stored, "--save-logits", tmp_path / "x")
    assert "leave out --base and --save-logits" in line


def test_imatrix_is_made_resumed_combined_and_used(tmp_path: Path) -> None:
    whole, part, both = (tmp_path / name for name in ("whole.gguf", "part.gguf", "both.dat"))
    run("imatrix", TINYLM, *SOME, "-o", whole)
    run("imatrix", TINYLM, "--text", TEXT, "--n-ctx", 128, "--chunks", 1, "-o", part)
    run("imatrix", TINYLM, *SOME, "--output-frequency", 2, "--resume", "-o", part)
    one, two = ImportanceMatrix.load(whole), ImportanceMatrix.load(part)
    assert (two.chunk_count, two.chunk_size, two.datasets) == (4, 128, [str(TEXT)])
    for name, entry in one.entries.items():
        np.testing.assert_allclose(two.entries[name].sums, entry.sums, rtol=1e-5)
    run("imatrix", "--in-file", whole, "--in-file", part, "-o", both)
    combined = ImportanceMatrix.load(both)
    assert combined.chunk_count == 8
    for name, entry in one.entries.items():
        np.testing.assert_allclose(combined.entries[name].weights(), entry.weights(), rtol=1e-5)
    run("imatrix", "--in-file", both, "--in-file", whole, "--n-ctx", 128, "-o", tmp_path / "three.gguf")
    three = ImportanceMatrix.load(tmp_path / "three.gguf")
    assert three.entries["blk.0.attn_q.weight"].counts.tolist() == [12 * 128]
    data = json.loads(run("imatrix", "--in-file", whole, "--show-statistics", "--json").stdout)
    assert len(data["tensors"]) == len(one.entries) and [x["block"] for x in data["layers"]] == [0, 1, 2]
    assert "E (norm)" in run("imatrix", "--in-file", whole, "--show-statistics").stdout
    run("quantize", TINYLM, "--type", "Q4_K_M", "--imatrix", whole, "-o", tmp_path / "q.gguf")


def test_imatrix_says_what_is_missing(tmp_path: Path) -> None:
    assert "nothing to do" in error("imatrix")
    assert "-o" in error("imatrix", "--in-file", TEXT)
    assert "not an importance matrix" in error("imatrix", "--in-file", TEXT, "-o", tmp_path / "x")
    assert "--resume" in error("imatrix", "--in-file", TEXT, "--resume", "-o", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_vectors_of_texts(tmp_path: Path) -> None:
    encoder = make_checkpoint("tiny-bert", tmp_path)
    (tmp_path / "texts.txt").write_text("the other\n\nhats on\n", encoding="utf-8")
    args = ("embed", encoder, "-p", "the hats", "-f", tmp_path / "texts.txt")
    data = json.loads(run(*args, "--json").stdout)
    assert data["texts"] == ["the hats", "the other", "hats on"]
    np.testing.assert_allclose(data["vectors"], quantkit.embed(encoder, data["texts"]), rtol=1e-5, atol=1e-7)
    printed = [[float(word) for word in line.split()] for line in run(*args).stdout.splitlines()]
    assert printed == data["vectors"]
    assert "computes on the CPU in f32, not on cuda" in error(*args, "--device", "cuda")
    longer = json.loads(run("embed", encoder, "-p", "the hats", "--pooling", "mean", "--raw", "--json").stdout)
    assert np.linalg.norm(longer["vectors"][0]) > 1.5

    assert "there is no pooling 'max'" in error("embed", encoder, "-p", "a", "--pooling", "max")
    assert "there is no text" in run("embed", encoder, code=2).stderr
    assert "its metadata names no pooling" in error("embed", TINYLM, "-p", "a")
