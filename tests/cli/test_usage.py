"""What the command line is like to use: help, suggestions, completion, and llama-quantize's order of arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.main
from conftest import TINYLM
from test_cli import error, run

from quantkit.blocks.types import GGMLType
from quantkit.cli.main import COMMANDS, app
from quantkit.cli.type_options import Positional, positional
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.report import type_guide
from quantkit.wording import count_text, did_you_mean, size_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("usage") / "tinylm-BF16.gguf"
    run("convert", TINYLM, "-o", path)
    return path


def completions(*words: str) -> list[str]:
    """What a shell offers after `quantkit WORDS`, the last of which is incomplete."""
    words = ("quantkit", *words)
    environment = os.environ | {
        "_QUANTKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-m", "quantkit"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()


def test_h_is_help_everywhere() -> None:
    assert run("-h").stdout == run("--help").stdout
    assert run("quantize", "-h").stdout == run("quantize", "--help").stdout


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        widest = max(map(len, run("quantize", "-h").stdout.splitlines()))
        assert columns - 20 < widest <= columns


@pytest.mark.parametrize("name", COMMANDS)
def test_every_value_has_a_name(name: str) -> None:
    """No option shows Python's name of its type, such as <list[str]>."""
    group = typer.main.get_command(app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantkit", name])
        command = group.get_command(None, name)  # type: ignore[attr-defined]
    for param in command.params:
        takes_value = param.param_type_name == "argument" or not (param.is_flag or param.count)
        assert not takes_value or param.metavar, f"{name} {param.name}"
        assert getattr(param, "help", None), f"{name} {param.name}"
    assert re.search(r"<[a-z]", run(name, "-h").stdout) is None


def test_unknown_commands_and_options_are_suggested() -> None:
    assert "Did you mean quantize?" in run("quantise", code=2).stderr
    assert "No such command 'nosuch'.\n" in run("nosuch", code=2).stderr
    assert "--type" in run("quantize", "x", "--typ", "Q4_0", code=2).stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("q4km", "did you mean Q4_K_M?"),
        ("iq4-xs", "did you mean IQ4_XS?"),
        ("float16", "did you mean F16?"),
        ("Q4", "did you mean Q4_1 or Q4_0?"),
        ("Q9", ""),
    ],
)
def test_suggestions(name: str, hint: str) -> None:
    assert did_you_mean(name, FILE_TYPES) == hint


def test_unknown_types_are_suggested(model: Path) -> None:
    assert error("quantize", model, "Q4_KM").endswith("did you mean Q4_K_M?")
    assert error("quantize", model, "Q4_0", "--tensor-type", "attn_v=Q6K").endswith("did you mean Q6_K?")
    assert "IQ4_XS, " in error("quantize", model, "Q77")


def test_types_follow_the_model_as_for_llama_quantize(model: Path, tmp_path: Path) -> None:
    run("quantize", model, tmp_path / "a.gguf", "Q4_0", "1")
    run("quantize", model, "--type", "Q4_0", "-o", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    run("quantize", model, tmp_path, "q8_0", "BF16,F16", "-q")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.gguf",
        "b.gguf",
        "tinylm-Q8_0.gguf",
        "tinylm-BF16.gguf",
        "tinylm-F16.gguf",
    }
    assert "Name a file type" in run("quantize", model, code=2).stderr
    assert "not both" in run("quantize", model, "x.gguf", "Q4_0", "-o", tmp_path / "y.gguf", code=2).stderr


@pytest.mark.parametrize(
    ("words", "named", "expected"),
    [
        (["Q4_K_M"], [], Positional(None, ["Q4_K_M"], None)),
        (["Q4_K_M,Q5_K_M", "Q8_0"], [], Positional(None, ["Q4_K_M", "Q5_K_M", "Q8_0"], None)),
        (["out.gguf", "Q4_K_M"], [], Positional("out.gguf", ["Q4_K_M"], None)),
        (["out.gguf", "Q4_K_M", "8"], [], Positional("out.gguf", ["Q4_K_M"], 8)),
        (["out.gguf"], ["Q4_0"], Positional("out.gguf", ["Q4_0"], None)),
        (["some/where", "Q4_0"], [], Positional("some/where", ["Q4_0"], None)),
        (["Q4_KM", "Q5_K_M"], [], Positional(None, ["Q4_KM", "Q5_K_M"], None)),
        ([], ["Q4_0, Q8_0", "F16"], Positional(None, ["Q4_0", "Q8_0", "F16"], None)),
        ([], [], Positional(None, [], None)),
    ],
)
def test_positional_words(words: list[str], named: list[str], expected: Positional) -> None:
    assert positional(words, named) == expected


@pytest.mark.parametrize(("words", "named"), [(["Q4_0"], ["Q8_0"]), (["x.gguf", "Q4_0", "0"], [])])
def test_positional_words_that_make_no_sense(words: list[str], named: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        positional(words, named)


def test_types_are_completed() -> None:
    assert set(completions("quantize", "m.gguf", "IQ4")) == {"IQ4_NL", "IQ4_XS"}
    assert set(completions("report", "m", "--types", "Q8_0,q6")) == {"Q8_0,q6_k"}
    assert completions("quantize", "m", "--output-tensor-type", "Q6") == ["Q6_K"]
    assert completions("quant") == ["quantize"]
    assert set(completions("quantize", "m", "--typ")) == {"--type", "--types"}


def test_one_spelling_of_type_and_types(model: Path, tmp_path: Path) -> None:
    run("quantize", model, "--types", "Q4_0", "-o", tmp_path / "a.gguf")
    run("dequantize", tmp_path / "a.gguf", "--types", "f16", "-o", tmp_path / "b.gguf")
    run("convert", TINYLM, "--type", "F16", "-o", tmp_path / "c.gguf")
    assert "--type, --types" in run("report", "-h").stdout


def test_types_are_listed(model: Path) -> None:
    lines = run("types").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0].rstrip("*") for line in lines[1 : lines.index("")]]
    assert listed == [*FILE_TYPES, "COPY"]
    needing = {line.split("*")[0] for line in lines if "* " in line and not line.startswith("*")}
    assert {"IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q2_K_S"} <= needing and not needing & {"Q4_K_M", "Q8_0"}


def test_types_for_a_model_are_what_quantize_writes(model: Path) -> None:
    data = json.loads(run("types", model, "--json").stdout)
    rows = {row["type"]: row for row in data["types"]}
    plans = json.loads(run("quantize", model, "Q4_K_M,Q8_0,IQ4_XS", "--dry-run", "--json").stdout)["files"]
    assert data["model"] == str(model)
    for plan in plans:
        row = rows[plan["type"]]
        assert (row["size"], row["bits_per_weight"]) == (plan["size"], plan["bits_per_weight"])


def test_types_that_a_model_cannot_have() -> None:
    """Rows of 36 weights: most types fall back to F16 there, as llama-quantize's do; Q1_0 has no fallback."""
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    metadata.set("llama.block_count", ValueType.UINT32, 1)
    source = type_guide._Outline("odd", metadata, {"a.weight": TensorInfo("a.weight", (36, 4), GGMLType.F32)})
    rows = {row.type: row for row in type_guide.type_guide(source).types}
    assert rows["Q4_K_M"].bits_per_weight == 16 and rows["Q1_0"].size is None
    assert "Q1_0           -        -  1 bit" in str(type_guide.type_guide(source))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (3400, "3.4 kB"), (6_900_000, "6.9 MB"), (4.92e9, "4.92 GB")],
)
def test_sizes_are_readable(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text


def test_counts_are_english() -> None:
    assert [count_text(n, "shard") for n in (0, 1, 1024)] == ["0 shards", "1 shard", "1,024 shards"]
