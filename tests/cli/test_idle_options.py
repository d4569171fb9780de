"""Options that would do nothing are errors, at planning, and errors name an option that the command has."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call, refusal

TEXT = ROOT / "fixtures" / "tinylm-test.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("idle") / "tinylm-BF16.gguf"
    call("convert", TINYLM, "-o", path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-type", "attn_z=Q8_0"], "no tensor's name matches"),
        (["--tensor-type", "attn_v=I8"], "cannot be encoded in I8"),
        (["--tensor-type", "attn_v"], "malformed tensor type"),
        (["--output-tensor-type", "i32"], "cannot be encoded in I32"),
        (["--prune-layers", "9"], "there is no layer 9"),
        (["--prune-layers", "0,1,2"], "no layer would be left"),
        (["--prune-layers", ""], "not a list of layers"),
        (["--include-weights", "ffn"], "without an importance matrix there are no weights to choose; make one with"),
        (["--override-kv", "key"], "malformed override"),
        (["--override-kv", "key=int:x"], "no int"),
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
    assert refusal("quantize", quantized, "--type", "Q4_0").endswith("--allow-requantize does it all the same")
    line = refusal("quantize", model, "--type", "IQ1_S", "-o", tmp_path / "x.gguf")
    assert line.endswith("make one with `quantkit imatrix` and pass it with --imatrix")
    warned = call("quantize", model, "--type", "IQ1_S", "--dry-run").stderr
    assert warned.startswith("warning: IQ1_S needs") and warned.rstrip().endswith("pass it with --imatrix")
