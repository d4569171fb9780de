"""`quantkit inspect`: of a file, a checkpoint and a model on the hub, for readers and for programs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINYLM
from support.local_hub import TinyHub, endpoint_of, hub_environment, serve
from support.tiny import tiny_metadata, tiny_weights, write_gguf
from test_cli import run

from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.report.contents import ENUMS, describe
from quantkit.sources.source import GGUFSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "q.gguf"
    run("quantize", TINYLM, path, "Q4_K_M")
    return path


def test_a_file_in_80_columns(model: Path) -> None:
    text = run("inspect", model, "-q").stdout
    assert max(map(len, text.splitlines()[:-2])) <= 80
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["general.file_type"][1:] == ["uint32", "15", "(Q4_K_M)"]
    assert lines["blk.0.attn_k.weight"][1:] == ["256", "x", "128", "Q4_K", "18.4", "kB"]
    assert lines["tokenizer.ggml.tokens"][1:3] == ["[string]", "2,048:"]
    assert text.splitlines()[-2] == f"{model}: GGUF version 3"


def test_sums_by_type(model: Path) -> None:
    data = json.loads(run("inspect", model, "--json").stdout)
    for share in data["by_type"]:
        own = [tensor for tensor in data["tensors"] if tensor["type"] == share["type"]]
        assert share["n_tensors"] == len(own)
        assert share["size"] == sum(tensor["size"] for tensor in own)
        assert share["n_weights"] == sum(math.prod(tensor["shape"]) for tensor in own)
    assert [share["type"] for share in data["by_type"]] == ["Q4_K", "Q6_K", "F32"]
    assert data["size"] == model.stat().st_size
    line = next(line for line in run("inspect", model).stdout.splitlines() if line.startswith("Q4_K "))
    assert line.split() == ["Q4_K", "20", "2,654,208", "1.5", "MB", "70.5%"]


def test_arrays_whole_on_request(model: Path) -> None:
    short = json.loads(run("inspect", model, "--json").stdout)["metadata"]["tokenizer.ggml.tokens"]
    whole = json.loads(run("inspect", model, "--json", "--full").stdout)["metadata"]["tokenizer.ggml.tokens"]
    assert short == {"type": "string", "length": 2048, "first": whole[:6]}
    assert whole == GGUFSource(model).metadata["tokenizer.ggml.tokens"].value
    assert '"<|endoftext|>"' in run("inspect", model, "--full").stdout.replace(whole[-1], "<|endoftext|>")


def test_a_checkpoint_is_what_it_converts_to(tmp_path: Path) -> None:
    run("convert", TINYLM, "-o", tmp_path / "tinylm.gguf")
    seen = json.loads(run("inspect", TINYLM, "--json").stdout)
    written = json.loads(run("inspect", tmp_path / "tinylm.gguf", "--json").stdout)
    assert seen.pop("model") == str(TINYLM) and written.pop("model") == str(tmp_path / "tinylm.gguf")
    assert seen == written
    assert "a checkpoint, shown as the GGUF file that it converts to" in run("inspect", TINYLM).stdout


def test_a_model_on_the_hub(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in TINYLM.iterdir() if path.is_file()}
    with serve(TinyHub, files=files, asked=set()) as server:
        command = [sys.executable, "-m", "quantkit", "inspect", "org/tiny", "--json"]
        environment = hub_environment(tmp_path, endpoint_of(server))
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["n_weights"] == json.loads(run("inspect", TINYLM, "--json").stdout)["n_weights"]


def test_numbers_that_json_lacks_and_text_that_steers_terminals(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    metadata.set("odd.nan", ValueType.FLOAT32, math.nan)
    metadata.set("odd.infinities", ValueType.ARRAY, [math.inf, -math.inf, 1.5], ValueType.FLOAT32)
    metadata.set("odd.text", ValueType.STRING, 'a\x1b[2J\r\n"b"')
    metadata.set("odd.\x1b[31mkey" + "y" * 100, ValueType.STRING, "x" * 1000)
    path = write_gguf(tmp_path / "odd.gguf", metadata, tiny_weights())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(run("inspect", path, "--json").stdout, parse_constant=refuse)["metadata"]
    assert data["odd.nan"] is None and data["odd.infinities"] == [None, None, 1.5]
    text = run("inspect", path).stdout
    assert "\x1b" not in text and r'"a\x1b[2J\r\n\"b\""' in text
    assert max(map(len, text.splitlines()[:-2])) <= 80


def test_names_of_numbers() -> None:
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "bert")
    metadata.set("bert.pooling_type", ValueType.UINT32, 2)
    metadata.set("bert.expert_gating_func", ValueType.UINT32, 99)

    class Source:
        label = "odd"
        tensors: dict[str, TensorInfo] = {}  # noqa: RUF012

    source = Source()
    source.metadata = metadata  # type: ignore[attr-defined]
    lines = describe(source).text().splitlines()  # type: ignore[arg-type]
    assert "bert.pooling_type        uint32  2 (first token)" in lines
    assert "bert.expert_gating_func  uint32  99" in lines
    assert ENUMS["general.file_type"][15] == "Q4_K_M"
