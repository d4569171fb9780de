"""Options that would do nothing are errors, at planning, and errors name an option that the command has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call, refusal

from quantkit.formats.gguf import GGUFFile
from quantkit.formats.imatrix import ImportanceMatrix

TEXT = ROOT / "fixtures" / "tinylm-test.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("idle") / "tinylm-BF16.gguf"
    call("convert", TINYLM, "-o", path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-type", "attn_z=Q8_0"], "matches no tensor's name"),
        (["--tensor-type", "attn_v=I8"], "cannot be encoded in I8"),
        (["--tensor-type", "attn_v"], "malformed tensor type"),
        (["--output-tensor-type", "i32"], "cannot be encoded in I32"),
        (["--prune-layers", "9"], "there is no layer 9"),
        (["--prune-layers", "0,1,2"], "no layer would be left"),
        (["--prune-layers", ""], "not a list of layers"),
        (["--include-weights", "ffn"], "without an importance matrix there are no weights to choose; make one with"),
        (["--override-kv", "key"], "malformed override"),
        (["--override-kv", "key=int:x"], "not an int"),
        (["--override-kv", "key=date:1"], "unknown type 'date'"),
        (["--split-max-size", "big"], "not a size"),
        (["--split-max-size", ""], "not a size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quantize_refuses_at_planning(options: list[str], message: str, model: Path, tmp_path: Path) -> None:
    for rest in (["--dry-run"], ["-o", tmp_path / "x.gguf"]):
        assert message in refusal("quantize", model, "--type", "Q4_K_M", *options, *rest)
    assert list(tmp_path.iterdir()) == []


def test_no_type_at_all(model: Path, tmp_path: Path) -> None:
    assert "Name a file type" in call("quantize", model, "--type", "", "-o", tmp_path / "x", code=2).stderr
    assert "no file type" in refusal("report", model, "--types", ",", "--text", TEXT, "-o", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_to_choose_are_in_the_matrix(model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    call("imatrix", model, "--text", TEXT, "--n-ctx", 64, "--chunks", 1, "-o", matrix)
    for option in ("--include-weights", "--exclude-weights"):
        line = refusal("quantize", model, "--type", "Q4_0", "--imatrix", matrix, option, "fnn", "--dry-run")
        assert "no tensor with 'fnn' in its name" in line


def test_errors_name_the_options_of_the_command(model: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q8.gguf"
    call("quantize", model, "--type", "Q8_0", "-o", quantized)
    assert refusal("quantize", quantized, "--type", "Q4_0").endswith("--allow-requantize does it anyway")
    line = refusal("quantize", model, "--type", "IQ1_S", "-o", tmp_path / "x.gguf")
    assert line.endswith("make one with `quantkit imatrix` and pass it with --imatrix")
    warned = call("quantize", model, "--type", "IQ1_S", "--dry-run").stderr
    assert warned.startswith("warning: IQ1_S needs") and warned.rstrip().endswith("pass it with --imatrix")


def test_logits_beside_another_text(model: Path, tmp_path: Path) -> None:
    """They bring their own: another would be ignored."""
    logits, other = tmp_path / "base.logits", tmp_path / "other.txt"
    other.write_text(TEXT.read_text("utf-8")[1000:], "utf-8")
    cut = ("--n-ctx", 64, "--chunks", 3)
    call("perplexity", TINYLM, "--text", TEXT, *cut, "--save-logits", logits)
    assert "another text" in refusal("perplexity", model, "--base-logits", logits, "--text", other)
    assert "chunks of 64 tokens, not 128" in refusal("perplexity", model, "--base-logits", logits, "--n-ctx", 128)
    alone = call("perplexity", model, "--base-logits", logits, "--json").stdout
    named = call("perplexity", model, "--base-logits", logits, "--text", TEXT, "--n-ctx", 64, "--json").stdout
    assert json.loads(alone)["kld"] == json.loads(named)["kld"]


def test_going_on_with_another_text(model: Path, tmp_path: Path) -> None:
    """An importance matrix remembers its text, and where in it it began."""
    other, matrix, whole = tmp_path / "other.txt", tmp_path / "m.gguf", tmp_path / "whole.gguf"
    other.write_text(TEXT.read_text("utf-8")[1000:], "utf-8")
    cut = ("--n-ctx", 64, "--from-chunk", 2)
    call("imatrix", model, "--text", TEXT, *cut, "--chunks", 2, "-o", matrix)
    before = matrix.read_bytes()
    for options, message in (
        (("--text", other, *cut), "was made from another text"),
        (("--text", TEXT, "--n-ctx", 64), "begins at chunk 2, not at 0"),
        (("--text", TEXT, "--n-ctx", 128, "--from-chunk", 2), "with a context of 64, not 128"),
    ):
        assert message in refusal("imatrix", model, *options, "--chunks", 4, "--resume", "-o", matrix)
        assert matrix.read_bytes() == before
    call("imatrix", model, "--text", TEXT, *cut, "--chunks", 5, "--resume", "-o", matrix)
    call("imatrix", model, "--text", TEXT, *cut, "--chunks", 5, "-o", whole)
    one, two = ImportanceMatrix.load(matrix), ImportanceMatrix.load(whole)
    assert (one.text_sha256, one.first_chunk, one.chunk_count) == (two.text_sha256, 2, 5)
    # All of it is there already.
    call("imatrix", model, "--text", TEXT, *cut, "--chunks", 4, "--resume", "-o", matrix)
    assert ImportanceMatrix.load(matrix).chunk_count == 5
    # The older format, and other tools, remember no more than its name.
    old = tmp_path / "m.dat"
    call("imatrix", model, "--text", TEXT, "--n-ctx", 64, "--chunks", 2, "-o", old)
    assert "was made from" in refusal("imatrix", model, "--text", other, "--n-ctx", 64, "--resume", "-o", old)
    warned = call("imatrix", model, "--text", TEXT, "--n-ctx", 64, "--chunks", 3, "--resume", "-o", old).stderr
    assert "does not say what text" in warned and ImportanceMatrix.load(old).chunk_count == 3
    call("imatrix", "--in-file", matrix, "--in-file", whole, "-o", tmp_path / "both.gguf")
    assert ImportanceMatrix.load(tmp_path / "both.gguf").text_sha256 == ""


def test_a_context_longer_than_the_models_warns(model: Path) -> None:
    own = GGUFFile(model).metadata.integer("llama.context_length")
    for n_ctx, warns in ((own, False), (own + 1, True)):
        told = call("perplexity", model, "--text", TEXT, "--n-ctx", n_ctx, "--chunks", 1).stderr
        assert (f"a context of {n_ctx} tokens is longer than the model's, which is {own}" in told) == warns


@pytest.mark.parametrize(("command", "hint"), [("quantize", "; use fewer --threads"), ("merge", "")])
def test_out_of_memory(command: str, hint: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint names an option that this command has."""

    def read(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(GGUFFile, "read", read)
    types = ["--type", "F16"] if command == "quantize" else []
    assert refusal(command, model, *types, "-o", tmp_path / "x") == f"error: out of memory{hint}"
    assert list(tmp_path.iterdir()) == []
