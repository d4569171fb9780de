"""`import quantkit` as a user of Python meets it: what it lists, what it takes, and weights as numpy arrays."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINYLM
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize
from support.tiny import tiny_metadata, tiny_weights, write_gguf

import quantkit
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import TensorInfo, encode_header, padded
from quantkit.report.contents import describe
from quantkit.sources.source import GGUFSource


def test_everything_public_is_listed_and_documented() -> None:
    assert set(quantkit.__all__) <= set(dir(quantkit))
    assert "open_source" not in dir(quantkit) and not [name for name in quantkit.__all__ if name.startswith("_")]
    shown = pydoc.render_doc(quantkit, renderer=pydoc.plaintext)
    for name in quantkit.__all__:
        member = getattr(quantkit, name)
        assert inspect.getdoc(member), name
        assert f"{name}(" in shown, name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        quantkit.nosuch  # noqa: B018


def test_import_is_quick() -> None:
    heavy = {"numba", "numpy", "gguf", "tokenizers"}
    probe = f"import sys, quantkit; dir(quantkit); print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_types_reach_those_who_import_it() -> None:
    """Type checkers read annotations only of packages that carry this file."""
    assert (ROOT / "quantkit" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_old_name_warns() -> None:
    with pytest.warns(DeprecationWarning, match="open_model"):
        source = quantkit.open_source(TINYLM)
    assert source.tensors.keys() == quantkit.open_model(TINYLM).tensors.keys()
    assert quantkit.open_model(source) is source


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "F16"])
def test_weights_by_name(tmp_path: Path, kind: str) -> None:
    (path,) = quantkit.quantize(TINYLM, tmp_path / "model.gguf", type=kind)
    weights, tensors = quantkit.dequantize(path), GGUFReader(path).tensors
    assert list(weights) == [tensor.name for tensor in tensors] and len(weights) == len(tensors)
    assert weights["output.weight"].shape == (2048, 256)
    for tensor in tensors:
        array = weights[tensor.name]
        assert array.dtype == np.float32
        # gguf-py decodes in numpy, whose order of operations may differ in the last bit.
        expected = gguf_dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(array, expected, rtol=2e-7, atol=0, strict=True)
    assert repr(weights) == f"DequantizedTensors({str(path)!r}, {len(weights)} tensors)"
    with pytest.raises(KeyError):
        weights["nosuch"]


def test_weights_of_a_checkpoint_and_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_array_equal(
        quantkit.dequantize(TINYLM)["token_embd.weight"],
        quantkit.dequantize(quantkit.convert(TINYLM, tmp_path / "a.gguf"))["token_embd.weight"],
    )
    # Three dimensions, decoded in steps of less than a matrix.
    monkeypatch.setattr("quantkit.sources.dequantized._STEP", 100)
    stacked = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    path = write_gguf(tmp_path / "b.gguf", tiny_metadata(), {"blk.0.ffn_up_exps.weight": stacked})
    np.testing.assert_array_equal(quantkit.dequantize(path)["blk.0.ffn_up_exps.weight"], stacked)


@pytest.mark.parametrize("kind", ["F64", "I8", "I16", "I32", "I64"])
def test_plain_numbers_become_float32(tmp_path: Path, kind: str) -> None:
    numbers = np.array([[1, -2, 3], [4, 5, -6]]).astype({"F": "f", "I": "i"}[kind[0]] + str(int(kind[1:]) // 8))
    info = TensorInfo("numbers", (3, 2), GGMLType[kind])
    data = numbers.tobytes()
    path = tmp_path / "numbers.gguf"
    path.write_bytes(encode_header(tiny_metadata(), [info], 32) + data + bytes(padded(len(data), 32) - len(data)))
    np.testing.assert_array_equal(quantkit.dequantize(path)["numbers"], numbers.astype(np.float32))


def test_a_path_will_do_wherever_a_model_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_metadata(), tiny_weights())
    plan = quantkit.plan(path, "Q8_0")
    (out,) = quantkit.execute(path, [(plan, tmp_path / "q.gguf")])
    by_source = quantkit.compare(GGUFSource(path), GGUFSource(out))
    assert str(quantkit.compare(path, str(out))) == str(by_source)
    assert describe(out).as_dict() == describe(GGUFSource(out)).as_dict()
    text = (ROOT / "fixtures" / "tinylm-test.txt").read_text("utf-8")[:3000]
    chunking = quantkit.Chunking(n_ctx=64, chunks=2)
    assert (
        quantkit.perplexity(path, text, chunking=chunking).ppl
        == quantkit.perplexity(GGUFSource(path), text, chunking=chunking).ppl
    )
    assert quantkit.divergence(out, path, text, chunking=chunking).kld.value > 0
    assert quantkit.generate(path, "a", n_tokens=2).tokens
