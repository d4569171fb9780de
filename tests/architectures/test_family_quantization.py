"""Each family's tiny checkpoint, quantized by us and by llama-quantize: experts, fused projections, odd rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import requires_reference
from make_checkpoints import FAMILIES, make_checkpoint
from support.conversion import convert
from support.llama_reference import llama_quantize

from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import GGUFSource

pytestmark = requires_reference


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as GGUF in the type that it is stored in."""
    directory = tmp_path_factory.mktemp("quantize")
    return convert(make_checkpoint(request.param, directory), directory / "source.gguf")


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ4_XS"])
def test_the_file_is_llama_quantizes(converted: Path, tmp_path: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    source = GGUFSource(converted)
    execute(source, [(plan_quantize(source, file_type(name)), ours)])
    assert llama_quantize(converted, theirs, name) == 0
    assert ours.read_bytes() == theirs.read_bytes()
