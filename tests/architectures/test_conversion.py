"""Each family's tiny checkpoints against what the reference converter makes of them, record by record."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, requires_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.architectures import FAMILIES as CLASSES
from quantkit.architectures import supported
from quantkit.pipeline.checkpoint import CheckpointSource, output_name
from quantkit.pipeline.execute import execute
from quantkit.pipeline.plan import plan_copy

sys.path.insert(0, str(ROOT / "scripts"))
from make_checkpoints import FAMILIES, make_checkpoint

GOLDENS = ROOT / "tests" / "goldens" / "convert"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, parent) for name in FAMILIES}


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with changes to its config.json."""

    def make(name: str, **changes: Any) -> Path:
        directory = Path(shutil.copytree(tiny[name], tmp_path / name))
        config = {**json.loads((directory / "config.json").read_text()), **changes}
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        return directory

    return make


def test_every_family_has_a_checkpoint() -> None:
    made = {recipe.config["architectures"][0] for recipe in FAMILIES.values()} | {"LlamaForCausalLM"}
    assert all(made & {*family.checkpoints, *family.wrappers} for family in CLASSES)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_the_reference_converters(tiny: dict[str, Path], tmp_path: Path, name: str, outtype: Any) -> None:
    source = CheckpointSource(tiny[name], outtype)
    wanted = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))[outtype]
    if outtype == "auto":  # first what is told record by record, so that a difference is named
        records = []
        for key, value in source.metadata.items():
            kind = int(value.type).to_bytes(4, "little")
            raw = len(key.encode()).to_bytes(8, "little") + key.encode() + kind + bytes(value.raw)
            records.append((key, sha256(raw)))
        assert [key for key, _ in records] == [key for key, *_ in wanted["metadata"]]
        assert records == [(key, digest) for key, _, digest, _ in wanted["metadata"]]
        tensors = [
            [t.name, t.type.name, list(t.shape), sha256(source.read(t.name).tobytes())] for t in source.tensors.values()
        ]
        assert tensors == wanted["tensors"]
    assert output_name(source.metadata, source.type.name) == wanted["file"]
    path = tmp_path / "out.gguf"
    execute(source, [(plan_copy(source), path)])
    assert sha256(path.read_bytes()) == wanted["sha256"]


@requires_reference
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_loads_the_file_and_computes(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    import llama_cpp

    path = tmp_path / "out.gguf"
    source = CheckpointSource(tiny[name], "f16")
    execute(source, [(plan_copy(source), path)])
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    try:
        ids = model.tokenize(b"the other hats on", add_bos=True, special=True)
        model.eval(ids)
        assert np.isfinite(np.array(model.scores[: len(ids)])).all()
        assert np.ptp(model.scores[len(ids) - 1]) > 0
    finally:
        model.close()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_rows_are_those_of_the_whole(tiny: dict[str, Path], data: st.DataObject) -> None:
    source = CheckpointSource(tiny[data.draw(st.sampled_from(sorted(FAMILIES)))], data.draw(st.sampled_from(OUTTYPES)))
    info = source.tensors[data.draw(st.sampled_from(sorted(source.tensors)))]
    start = data.draw(st.integers(0, info.n_rows))
    stop = data.draw(st.integers(start, info.n_rows))
    np.testing.assert_array_equal(source.read(info.name, start, stop), source.read(info.name)[start:stop])


def test_the_list_of_families() -> None:
    rows = supported()
    assert [row.family for row in rows] == sorted((row.family for row in rows), key=str.lower)
    assert {row.family for row in rows} == {family.__name__ for family in CLASSES}
    row = next(row for row in rows if row.family == "Gemma3")
    assert row.classes == ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    assert row.gguf_name == "gemma3" and row.notes
