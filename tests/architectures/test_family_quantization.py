"""Each family's tiny checkpoint, quantized with its importance matrix by us and by llama-quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference
from make_checkpoints import make_checkpoint
from record_logits import tokens
from support.conversion import convert
from support.families import EVALUATED, LLAMA_CPP_RUNS
from support.importance import keys_of, make_matrix
from support.llama_reference import llama_quantize

from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.pipeline.execute import execute
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import GGUFSource

pytestmark = requires_reference


@pytest.fixture(scope="module", params=LLAMA_CPP_RUNS)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ImportanceMatrix]:
    """The checkpoint as GGUF in the type that it is stored in, and importance: measured where we can evaluate it."""
    directory = tmp_path_factory.mktemp("quantize")
    path = convert(make_checkpoint(request.param, directory), directory / "source.gguf")
    source = GGUFSource(path)
    if request.param in EVALUATED:
        settings: dict[str, Any] = {"chunking": Chunking(n_ctx=64), "compute": Compute(threads=1)}
        ids = tokens(128).astype(np.int32)
        matrix = importance_matrix(source, ids, dataset="calibration.txt", **settings)
        # Layers that predict several tokens are not run.
        matrix.entries = {**make_matrix(source).entries, **matrix.entries}
        return path, matrix
    return path, make_matrix(source)


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS", "IQ2_XXS"])
def test_the_file_is_llama_quantizes(converted: tuple[Path, ImportanceMatrix], tmp_path: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    path, matrix = converted
    source = GGUFSource(path)
    again = any(info.type.is_quantized for info in source.tensors.values())
    execute(source, [(plan_quantize(source, name, QuantizeOptions(imatrix=matrix, allow_requantize=again)), ours)])
    options = {"imatrix": matrix.weights(), "kv_overrides": keys_of(matrix), "allow_requantize": again}
    assert llama_quantize(path, theirs, name, **options) == 0
    assert ours.read_bytes() == theirs.read_bytes()
