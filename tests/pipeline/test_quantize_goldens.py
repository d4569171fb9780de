"""Every file type on three models, against sha256 that record_quantize_goldens.py got from the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINYLM, requires_shared
from record_quantize_goldens import GOLDENS, importance, sha256
from support.conversion import convert

from quantkit.errors import QuantkitError
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.run import plan
from quantkit.sources.source import GGUFSource


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


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


@pytest.fixture(scope="module")
def tinylm(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    return GGUFSource(convert(TINYLM, tmp_path_factory.mktemp("tinylm") / "tinylm-F16.gguf", "f16"))


@pytest.mark.parametrize("name", FILE_TYPES)
def test_tinylm(tinylm: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_recorded(tinylm, golden("tinylm"), name, tmp_path)


@requires_shared
@pytest.mark.parametrize("name", FILE_TYPES)
def test_docs_llama(docs_f16: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_recorded(docs_f16, golden("docs-llama-45m"), name, tmp_path)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_smollm(smollm_f16: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_recorded(smollm_f16, golden("SmolLM2-135M-Instruct"), name, tmp_path)
