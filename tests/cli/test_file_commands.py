"""split, merge, dequantize and compare, from the command line; and the same jobs from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINYLM, requires_reference
from support.llama_reference import llama_logits
from test_cli import error, run

import quantkit
from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import GGUFFile
from quantkit.sources.source import GGUFSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "tinylm-BF16.gguf"
    run("convert", TINYLM, "-o", path)
    return path


def test_split_and_merge(model: Path, tmp_path: Path) -> None:
    run("split", model, "--split-max-size", "2M", "-o", tmp_path / "part.gguf")
    shards = sorted(tmp_path.glob("part-*-of-*.gguf"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in GGUFFile(s).tensors.values()) <= 2_000_000 for s in shards)
    # Any shard will do, and every command takes one.
    run("merge", shards[1], "-o", tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == model.read_bytes()
    assert f"{len(shards)} shards" in run("inspect", shards[0]).stdout
    run("quantize", shards[0], "--type", "Q8_0", "-o", tmp_path / "one.gguf")
    run("quantize", shards[0], "--type", "Q8_0", "--keep-split", "-o", tmp_path / "many.gguf")
    assert len(list(tmp_path.glob("many-*.gguf"))) == len(shards)
    one, many = GGUFSource(tmp_path / "one.gguf"), GGUFSource(next(tmp_path.glob("many-00002-*")))
    assert all(np.array_equal(one.read(name), many.read(name)) for name in one.tensors)
    shards[2].unlink()
    assert "1 of" in error("inspect", shards[0]) and not (tmp_path / "x.gguf").exists()


def test_split_by_tensors(model: Path, tmp_path: Path) -> None:
    run("split", model, "--split-max-tensors", 10, "-o", tmp_path / "part.gguf")
    counts = [len(GGUFFile(s).tensors) for s in sorted(tmp_path.glob("part-*.gguf"))]
    assert set(counts[:-1]) == {10} and sum(counts) == len(GGUFFile(model).tensors)
    assert "not a size" in error("split", model, "--split-max-size", "big", "-o", tmp_path / "x.gguf")


@requires_reference
def test_llama_cpp_loads_our_shards(model: Path, tmp_path: Path) -> None:
    run("split", model, "--split-max-tensors", 7, "-o", tmp_path / "part.gguf")
    tokens = [2046, 10, 300, 41, 7]
    first = min(tmp_path.glob("part-*.gguf"))
    np.testing.assert_array_equal(llama_logits(first, tokens), llama_logits(model, tokens))


def test_dequantize_and_compare(model: Path, tmp_path: Path) -> None:
    quantized, wide = tmp_path / "q.gguf", tmp_path / "w.gguf"
    run("quantize", model, "--type", "Q4_K_M", "-o", quantized)
    run("dequantize", quantized, "--type", "F32", "-o", wide)
    a, b = GGUFFile(quantized), GGUFFile(wide)
    for name, info in a.tensors.items():
        assert b.tensors[name].type == GGMLType.F32
        np.testing.assert_array_equal(blocks.decode(a.read(name), info.type), b.read(name).view(np.float32))
    same = json.loads(run("compare", quantized, wide, "--json").stdout)
    assert same["tensors"] == [] and same["n_equal"] == len(a.tensors)
    result = json.loads(run("compare", model, quantized, "--json").stdout)
    before = GGUFFile(model)
    for line in result["tensors"]:
        name = line["name"]
        x = blocks.decode(before.read(name), before.tensors[name].type).astype(np.float64)
        y = blocks.decode(a.read(name), a.tensors[name].type).astype(np.float64)
        assert line["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
        assert line["max_error"] == pytest.approx(np.abs(x - y).max())
        assert line["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert any(row["key"] == "general.file_type" for row in result["metadata"])


def test_python_does_the_same(model: Path, tmp_path: Path) -> None:
    run("quantize", model, "--type", "Q4_K_M", "-o", tmp_path / "cli.gguf")
    assert quantkit.quantize(model, tmp_path / "api.gguf", type="q4_k_m") == [tmp_path / "api.gguf"]
    assert (tmp_path / "api.gguf").read_bytes() == (tmp_path / "cli.gguf").read_bytes()
    source = quantkit.open_model(TINYLM)
    plan = quantkit.plan(source, "Q4_K_M", tensor_types=[("attn_v", "Q8_0")])
    plan.set_type("blk.0.ffn_down.weight", "Q6_K")
    quantkit.execute(source, [(plan, tmp_path / "edited.gguf")])
    kinds = {name: info.type.name for name, info in GGUFFile(tmp_path / "edited.gguf").tensors.items()}
    assert kinds["blk.1.attn_v.weight"] == "Q8_0" and kinds["blk.0.ffn_down.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_types": [("(", "Q8_0")]}, "not a regular expression"),
        ({"tensor_types": [("a", "Q77")]}, "unknown tensor type 'Q77'"),
        ({"include_weights": ["a"], "exclude_weights": ["b"]}, "cannot be used together"),
        ({"include_weights": ["a"]}, "without an importance matrix"),
        ({"exclude_weights": ["a"]}, "without an importance matrix"),
        ({"output_tensor_type": "I8"}, "cannot be encoded in I8"),
        ({"token_embedding_type": GGMLType.Q8_K}, "cannot be encoded in Q8_K"),
        ({"tensor_types": [("attn_v", "F64")]}, "cannot be encoded in F64"),
        ({"tensor_types": [("attn_z", "Q8_0")]}, "matches no tensor's name"),
        ({"tensor_types": [("attn_norm", "Q8_0")]}, "never quantized"),
        ({"tensor_types": [("attn_v", "Q8_0"), ("blk.0.attn_v", "Q5_0")]}, "'blk.0.attn_v' changes nothing"),
        ({"tensor_types": [("attn_v", "Q8_0")], "type": "F16"}, "F16 has one type for all tensors"),
        ({"prune_layers": [3]}, "there is no layer 3 to leave out; it has 3, from 0"),
        ({"prune_layers": [0, 1, 2]}, "no layer would be left"),
        ({"leave_output_tensor": True, "output_tensor_type": "F16"}, "not both"),
        ({"keep_split": True, "split_max_tensors": 3}, "not both"),
        ({"type": []}, "no file type"),
        ({"imatrix": "/nonexistent.gguf"}, "No such file"),
        ({"type": "IQ2_XXS"}, "needs an importance matrix"),
    ],
)
def test_bad_requests(model: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(quantkit.QuantkitError, match=message):
        quantkit.quantize(model, tmp_path / "x.gguf", **({"type": "Q4_0"} | options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
