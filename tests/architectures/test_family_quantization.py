"""Each family's tiny checkpoint, quantized with its importance matrix by us and by llama-quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference
from make_checkpoints import FAMILIES, make_checkpoint
from record_logits import tokens
from support.conversion import convert
from support.families import EVALUATED
from support.importance import make_matrix
from support.llama_reference import llama_quantize

from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import GGUFSource

pytestmark = requires_reference


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoint as GGUF in the type that it is stored in, and importance: measured where we can evaluate it."""
    directory = tmp_path_factory.mktemp("quantize")
    path = convert(make_checkpoint(request.param, directory), directory / "source.gguf")
    source = GGUFSource(path)
    if request.param in EVALUATED:
        ids, compute = tokens(128).astype(np.int32), Compute(threads=1)
        return path, importance_matrix(source, ids, chunking=Chunking(n_ctx=64), compute=compute).weights()
    return path, make_matrix(source).weights()


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS", "IQ2_XXS"])
def test_the_file_is_llama_quantizes(converted: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    path, weights = converted
    source = GGUFSource(path)
    execute(source, [(plan_quantize(source, file_type(name), imatrix=weights), ours)])
    assert llama_quantize(path, theirs, name, imatrix=weights) == 0
    assert ours.read_bytes() == theirs.read_bytes()
