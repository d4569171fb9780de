"""What a stranger's file can bring to a terminal, and to programs that read our JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.program import refusal
from support.tiny import tiny_metadata, tiny_weights, write_gguf

from quantkit.formats.gguf import ValueType

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"


def run(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, args)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    metadata = tiny_metadata()
    metadata.set("general.architecture", ValueType.STRING, f"lla{ESCAPE}ma")
    metadata.set("general.name", ValueType.STRING, f"../{ESCAPE}name")
    metadata.set(f"key{ESCAPE}", ValueType.FLOAT32, math.nan)
    metadata.set("infinite", ValueType.ARRAY, [math.inf, 1.0], ValueType.FLOAT64)
    weights = tiny_weights() | {f"a{ESCAPE}\nb": np.ones((1, 32), np.float32)}
    return write_gguf(tmp_path / "model.gguf", metadata, weights)


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "model.gguf"],
        ["compare", "model.gguf", "model.gguf"],
        ["quantize", "model.gguf", "Q8_0", "--dry-run"],
        ["perplexity", "model.gguf", "--text", "model.gguf"],
        ["generate", "model.gguf", "-p", "x"],
        ["quantize", "model.gguf", "Q8_0", "--override-kv", "general.alignment=int:48"],
        ["quantize", "model.gguf", "Q8_0", "--override-kv", "general.alignment=int:0"],
        ["quantize", "model.gguf", "Q8_0", "--override-kv", "x=float:1e39"],
        ["inspect", "~nosuchuser/x"],
        ["perplexity", "~nosuchuser/x"],
        ["split", "model.gguf", "--split-max-tensors", "0"],
    ],
)
def test_no_escape_reaches_the_terminal(model: Path, args: list[str]) -> None:
    done = run(*args, cwd=model.parent)
    for text in (done.stdout, done.stderr):
        assert not set(ESCAPE) & {"\x1b", "\x07", "\u202e"} & set(text)
        assert "Traceback" not in text
    assert {path.name for path in model.parent.iterdir()} == {"model.gguf"}


def test_json_has_no_nan(model: Path) -> None:
    def refuse(name: str) -> float:
        raise ValueError(name)

    data = json.loads(run("inspect", "model.gguf", "--json", cwd=model.parent).stdout, parse_constant=refuse)
    assert data["metadata"]["infinite"] == [None, 1.0]


@pytest.mark.parametrize("value", ["general.alignment=int:0", "general.alignment=int:48", "x=float:1e39"])
def test_overrides_that_no_file_can_hold(tmp_path: Path, value: str) -> None:
    model = write_gguf(tmp_path / "model.gguf", tiny_metadata(), tiny_weights())
    line = refusal("quantize", model, "Q8_0", "--override-kv", value, "-o", tmp_path / "out.gguf")
    assert "power of two" in line or "1e+39 cannot be stored as FLOAT32" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
