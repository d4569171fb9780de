"""A file is derived again: exact where llama-quantize or quantkit made it from the source, and told apart otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINYLM, requires_reference
from support.conversion import convert
from support.llama_reference import llama_quantize
from support.program import call, refusal
from support.tiny import write_gguf

from quantkit.formats.gguf import GGUFFile, ValueType
from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.run import plan
from quantkit.sources.source import GGUFSource, open_model
from quantkit.trust.derivation import derive


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINYLM, tmp_path_factory.mktemp("source") / "tinylm-F16.gguf", "f16")


def matrix(source: GGUFSource, seed: int) -> ImportanceMatrix:
    rng = np.random.default_rng(seed)
    entries = {
        name: Importance(rng.uniform(0.1, 4, (1, info.shape[0])).astype(np.float32), np.array([1]))
        for name, info in source.tensors.items()
        if len(info.shape) == 2 and name != "token_embd.weight"
    }
    return ImportanceMatrix(entries, ["text"], 1, 512)


@pytest.fixture
def q4(f16: Path, tmp_path: Path) -> Path:
    return quantized(f16, tmp_path / "q4.gguf", "Q4_K_M")


def quantized(source: Path, path: Path, kind: str, imatrix: ImportanceMatrix | Path | None = None) -> Path:
    execute(GGUFSource(source), [(plan(source, kind, imatrix=imatrix), path)])
    return path


def flipped(path: Path, name: str, row: int, to: Path) -> Path:
    file, data = GGUFFile(path), bytearray(path.read_bytes())
    info = file.tensors[name]
    data[file.offset(name) + row * info.type.row_nbytes(info.n_per_row) + 21] ^= 4
    to.write_bytes(data)
    return to


@requires_reference
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_what_llama_quantize_makes_is_exact(f16: Path, tmp_path: Path, kind: str) -> None:
    source, path = GGUFSource(f16), tmp_path / "theirs.gguf"
    weights = matrix(source, 1) if any(line.needs_weights for line in plan(source, kind)) else None
    options = {} if weights is None else {"imatrix": {k: v.reshape(-1) for k, v in weights.weights().items()}}
    assert llama_quantize(f16, path, kind, **options) == 0
    found = derive(GGUFSource(path), source, weights)
    assert found.exact and found.complete and len(found.tensors) == len(source.tensors), found
    assert derive(GGUFSource(path), source, weights, quick=True).exact


def test_from_the_checkpoint_whatever_it_was_converted_to(f16: Path, tmp_path: Path) -> None:
    found = derive(GGUFSource(quantized(f16, tmp_path / "a.gguf", "Q8_0")), open_model(TINYLM))
    assert found.exact, found
    direct = tmp_path / "b.gguf"
    execute(open_model(TINYLM), [(plan(TINYLM, "Q8_0"), direct)])
    assert derive(GGUFSource(direct), open_model(TINYLM)).exact


def test_one_flipped_bit(f16: Path, q4: Path, tmp_path: Path) -> None:
    bad = flipped(q4, "blk.1.ffn_gate.weight", 7, tmp_path / "bad.gguf")
    found = derive(GGUFSource(bad), GGUFSource(f16))
    (match,) = found.differing
    assert (match.name, match.row, match.different_bytes, match.different_blocks) == ("blk.1.ffn_gate.weight", 7, 1, 1)
    assert not found.complete and "single blocks" in found.explanation
    everything = derive(GGUFSource(bad), GGUFSource(f16), everything=True)
    assert everything.complete and len(everything.differing) == 1


def test_another_importance_matrix(f16: Path, tmp_path: Path) -> None:
    source = GGUFSource(f16)
    right, wrong = tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    matrix(source, 1).save(right)
    matrix(source, 2).save(wrong)
    path = quantized(f16, tmp_path / "q.gguf", "Q4_K_M", right)
    assert derive(GGUFSource(path), source, ImportanceMatrix.load(right)).exact
    assert derive(GGUFSource(path), source, ImportanceMatrix.load(wrong)).explanation.startswith("another source")
    assert "importance matrix" in refusal("verify", path, "--source", f16)
    assert "exactly the quantization" in call("verify", path, "--source", f16, "--imatrix", right).stdout
    assert "not the quantization" in call("verify", path, "--source", f16, "--imatrix", wrong, code=1).stdout
    assert not derive(GGUFSource(path), source, ImportanceMatrix.load(wrong), quick=True).exact


def test_another_source_or_model(f16: Path, q4: Path, tmp_path: Path) -> None:
    source = GGUFSource(f16)
    weights = {
        name: source.read(name).view("<f2" if info.type.name == "F16" else "<f4").reshape(info.shape[::-1])
        for name, info in source.tensors.items()
    }
    rng = np.random.default_rng(0)
    noisy = {n: (w * (1 + 0.01 * rng.standard_normal(w.shape))).astype(np.float32) for n, w in weights.items()}
    other = GGUFSource(write_gguf(tmp_path / "noisy.gguf", source.metadata, noisy))
    found = derive(GGUFSource(q4), other, everything=True)
    assert found.explanation.startswith("another source") and found.share > 0.02
    fewer = dict(list(noisy.items())[1:])
    found = derive(GGUFSource(q4), GGUFSource(write_gguf(tmp_path / "fewer.gguf", source.metadata, fewer)))
    assert found.explanation == "another model" and "is not in" in found.problems[0]


def test_a_changed_chat_template(f16: Path, q4: Path, tmp_path: Path) -> None:
    changed = GGUFSource(q4)
    changed.metadata.set("tokenizer.chat_template", ValueType.STRING, "{{ 'always the same answer' }}")
    changed.metadata.set("general.name", ValueType.STRING, "described otherwise")
    found = derive(changed, GGUFSource(f16))
    assert found.metadata == ["tokenizer.chat_template"] and not found.exact and not found.differing
    assert "other metadata" in found.explanation


def test_the_command(f16: Path, q4: Path, tmp_path: Path) -> None:
    data = json.loads(call("verify", q4, "--source", f16, "--json").stdout)
    assert data["sound"] and data["derivation"]["exact"] and data["derivation"]["complete"]
    bad = flipped(q4, "blk.0.attn_q.weight", 0, tmp_path / "bad.gguf")
    text = call("verify", bad, "--source", f16, "--all", code=1).stdout
    assert "tensor blk.0.attn_q.weight" in text and "1 of" in text
    assert "--source" in refusal("verify", q4, "--quick")
