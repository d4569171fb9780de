"""Importance matrices and llama-quantize's other options: whole files against the real llama_model_quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINYLM, requires_reference
from make_shapes import make_shape
from support.conversion import convert
from support.importance import keys_of, make_matrix
from support.llama_reference import llama_quantize

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.cli.parsing import parse_override
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.plan import plan_copy
from quantkit.pipeline.run import plan
from quantkit.sources.source import GGUFSource

pytestmark = requires_reference


def assert_same(source: GGUFSource, name: str, directory: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine, other = directory / "ours.gguf", directory / "theirs.gguf"
    written = execute(source, [(plan(source, name, **ours), mine)], force=True)
    target = other if len(written) == 1 else directory / "theirs"
    assert llama_quantize(source.path, target, name, **theirs) == 0
    for path in written:
        shard = path.with_name(path.name.replace("ours", "theirs"))
        assert path.read_bytes() == shard.read_bytes(), f"{source.path.name} as {name}: {path.name}"


@pytest.fixture(scope="module")
def tinylm(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    return GGUFSource(convert(TINYLM, tmp_path_factory.mktemp("tinylm") / "tinylm.gguf"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> GGUFSource:
    return GGUFSource(make_shape("experts-8", tmp_path_factory.mktemp("experts")))


@pytest.mark.parametrize("name", [name for name, file in FILE_TYPES.items() if file.default.is_quantized])
def test_every_file_type_with_an_importance_matrix(tinylm: GGUFSource, tmp_path: Path, name: str) -> None:
    matrix = make_matrix(tinylm)
    theirs = {"imatrix": matrix.weights(), "kv_overrides": keys_of(matrix)}
    assert_same(tinylm, name, tmp_path, {"imatrix": matrix}, theirs)


@pytest.mark.parametrize("name", [name for name, file in FILE_TYPES.items() if name not in ("F32",)])
def test_every_file_type_that_needs_none(tinylm: GGUFSource, tmp_path: Path, name: str) -> None:
    planned = plan(tinylm, name)
    if any(t.needs_weights for t in planned):
        assert llama_quantize(tinylm.path, tmp_path / "theirs.gguf", name) != 0
    else:
        assert_same(tinylm, name, tmp_path, {}, {})


@pytest.mark.parametrize("name", ["Q4_K_M", "Q2_K_S", "IQ3_XXS", "IQ4_XS", "MXFP4_MOE"])
def test_experts_have_weights_of_their_own(experts: GGUFSource, tmp_path: Path, name: str) -> None:
    matrix = make_matrix(experts)
    theirs = {"imatrix": matrix.weights(), "kv_overrides": keys_of(matrix)}
    assert_same(experts, name, tmp_path, {"imatrix": matrix}, theirs)


def test_include_and_exclude_weights(tinylm: GGUFSource, tmp_path: Path) -> None:
    matrix = make_matrix(tinylm)
    for field, parts in (("include_weights", ["ffn"]), ("exclude_weights", ["attn_v", "blk.1."])):
        kept = matrix.select(parts, []) if field == "include_weights" else matrix.select([], parts)
        theirs = {"imatrix": kept.weights(), "kv_overrides": keys_of(kept)}
        assert 0 < len(kept.entries) < len(matrix.entries)
        assert_same(tinylm, "Q4_K_M", tmp_path, {"imatrix": matrix, field: parts}, theirs)


def test_types_by_tensor(tinylm: GGUFSource, tmp_path: Path) -> None:
    pairs = [(r"blk\.[02]\.ffn_down", GGMLType.Q8_0), ("attn_q", GGMLType.IQ4_NL), ("output", GGMLType.Q5_1)]
    assert_same(tinylm, "Q4_K_M", tmp_path, {"tensor_types": pairs}, {"tt_overrides": pairs})
    both = {"output_tensor_type": GGMLType.F16, "token_embedding_type": GGMLType.Q8_0}
    assert_same(tinylm, "Q3_K_L", tmp_path, both, both)
    assert_same(tinylm, "Q4_0", tmp_path, {"leave_output_tensor": True}, {"quantize_output_tensor": False})


def test_overrides(tinylm: GGUFSource, tmp_path: Path) -> None:
    texts = ["llama.context_length=int:77", "my.scale=float:0.25", "my.flag=bool:true", "general.name=str:renamed"]
    theirs = [
        ("llama.context_length", 0, 77),
        ("my.scale", 1, 0.25),
        ("my.flag", 2, True),
        ("general.name", 3, b"renamed"),
    ]
    overrides = [parse_override(text) for text in texts]
    assert [key for key, _, _ in overrides] == [key for key, _, _ in theirs]
    assert_same(tinylm, "Q4_0", tmp_path, {"override_kv": overrides}, {"kv_overrides": theirs})


def test_pruned_layers(tmp_path: Path) -> None:
    source = GGUFSource(make_shape("tied", tmp_path))
    for layers in ([1], [0, 5, 6, 15]):
        matrix = make_matrix(source)
        theirs = {"prune_layers": layers, "imatrix": matrix.weights(), "kv_overrides": keys_of(matrix)}
        assert_same(source, "Q4_K_S", tmp_path, {"prune_layers": layers, "imatrix": matrix}, theirs)


def test_requantizing_and_copying(tinylm: GGUFSource, tmp_path: Path) -> None:
    q8 = tmp_path / "q8.gguf"
    execute(tinylm, [(plan(tinylm, "Q8_0"), q8)])
    source = GGUFSource(q8)
    assert_same(source, "Q4_K_M", tmp_path, {"allow_requantize": True}, {"allow_requantize": True})
    assert_same(source, "COPY", tmp_path, {}, {})


def test_kept_split(tinylm: GGUFSource, tmp_path: Path) -> None:
    whole = plan_copy(tinylm)
    whole.split_by(max_tensors=9)
    first = execute(tinylm, [(whole, tmp_path / "model.gguf")])[0]
    source = GGUFSource(first)
    assert len(source.shards) > 2
    assert_same(source, "Q4_K_M", tmp_path, {"keep_split": True}, {"keep_split": True})
    assert_same(source, "Q4_K_M", tmp_path, {}, {})  # without it, one file


def test_small_buffers_change_nothing(experts: GGUFSource, tmp_path: Path) -> None:
    for size in (1 << 14, 1 << 20):
        execute(experts, [(plan(experts, "Q4_K_M"), tmp_path / f"{size}.gguf")], max_buffer_size=size)
    assert (tmp_path / f"{1 << 14}.gguf").read_bytes() == (tmp_path / f"{1 << 20}.gguf").read_bytes()


def test_every_type_is_encodable() -> None:
    assert {file.default for file in FILE_TYPES.values()} <= set(blocks.encodable())
