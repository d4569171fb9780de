"""Whole files against llama-quantize's, through the real llama_model_quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TINYLM, requires_reference, requires_shared
from make_checkpoints import make_checkpoint
from make_shapes import SHAPES, make_shape
from support.conversion import convert, write
from support.llama_reference import llama_logits, llama_quantize

from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.projector import ProjectorSource
from quantkit.sources.source import GGUFSource

pytestmark = requires_reference

MAIN_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "F16", "BF16", "F32"]
MAIN_TYPES += ["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]


def assert_same_file(source: GGUFSource, name: str, directory: Path, **options: bool) -> None:
    ours, theirs = directory / "ours.gguf", directory / "theirs.gguf"
    execute(source, [(plan_quantize(source, file_type(name), QuantizeOptions(**options)), ours)], force=True)
    assert llama_quantize(source.path, theirs, name, **options) == 0
    assert ours.read_bytes() == theirs.read_bytes(), f"{source.path.name} as {name}"


@pytest.fixture(scope="module")
def tinylm(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    return GGUFSource(convert(TINYLM, tmp_path_factory.mktemp("tinylm") / "tinylm-F16.gguf", "f16"))


@pytest.mark.parametrize("name", MAIN_TYPES)
def test_tinylm(tinylm: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_same_file(tinylm, name, tmp_path)


@requires_shared
@pytest.mark.parametrize("name", MAIN_TYPES)
def test_docs_llama(docs_f16: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_same_file(docs_f16, name, tmp_path)


@pytest.mark.parametrize("name", MAIN_TYPES)
def test_smollm(smollm_f16: GGUFSource, tmp_path: Path, name: str) -> None:
    assert_same_file(smollm_f16, name, tmp_path)


@pytest.mark.parametrize("outtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", ["Q4_K_M", "F16"])
def test_other_sources(tmp_path: Path, outtype: str, name: str) -> None:
    source = GGUFSource(convert(TINYLM, tmp_path / "source.gguf", outtype))
    assert_same_file(source, name, tmp_path)
    assert_same_file(source, name, tmp_path, pure=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_S", "Q4_0"])
def test_shapes(shape: str, name: str, tmp_path: Path) -> None:
    """Experts, Falcon, 80 layers, tied embeddings, rows that need fallbacks."""
    assert_same_file(GGUFSource(make_shape(shape, tmp_path)), name, tmp_path)


@requires_shared
def test_llama_cpp_runs_our_files(docs_f16: GGUFSource, tmp_path: Path) -> None:
    """llama.cpp loads what we wrote, and its logits are those of our forward pass."""
    from quantkit.evaluate.transformer import Transformer
    from quantkit.vocabulary import Vocabulary

    tokens = Vocabulary.from_metadata(docs_f16.metadata).encode("The following options are available:\n\n -h, --help")
    ours = Transformer(docs_f16).logits(np.asarray(tokens, np.int32)[None])[0]
    theirs = llama_logits(docs_f16.path, list(map(int, tokens)))
    # llama.cpp rounds activations to float16 before it multiplies them with F16 weights.
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 2e-3
    quantized = tmp_path / "q.gguf"
    execute(docs_f16, [(plan_quantize(docs_f16, file_type("Q4_K_M")), quantized)])
    assert (llama_logits(quantized, list(map(int, tokens))).argmax(1) == theirs.argmax(1)).mean() > 0.8


# For others llama-quantize asks how many heads share keys, which it does not know of a projector, and aborts.
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "BF16"])
@pytest.mark.parametrize("projector", ["tiny-eye-gemma3", "tiny-ear-voxtral"])
def test_projectors(tmp_path: Path, projector: str, name: str) -> None:
    source = ProjectorSource(make_checkpoint(projector, tmp_path), "f16")
    assert_same_file(GGUFSource(write(source, tmp_path / "projector.gguf")), name, tmp_path)
