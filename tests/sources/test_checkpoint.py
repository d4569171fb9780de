"""Checkpoints seen as GGUF: whole files equal to the reference converter's, rows on request, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference, requires_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoints import RECIPES, make_checkpoint
from support.conversion import OUTTYPES, assert_recorded, changed_copy, golden, write
from support.llama_reference import llama_computes

from quantkit import architectures
from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.experts import Stack
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, Metadata, Value, ValueType
from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.checkpoint import CheckpointSource, output_name

LLAMA3, LINEAR, YARN = "Tiny-Llama-0.1M-Instruct-v0.2", "tiny-linear", "tiny-yarn"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, parent) for name in RECIPES}


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint to damage, with changes to its config.json."""

    def make(name: str = YARN, **changes: Any) -> Path:
        return changed_copy(tiny[name], tmp_path / name, **changes)

    return make


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_the_file_is_the_reference_converters(tiny: dict[str, Path], tmp_path: Path, name: str, outtype: Any) -> None:
    assert_recorded(CheckpointSource(tiny[name], outtype), golden(name)[outtype], tmp_path / "out.gguf")


@requires_shared
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_development_checkpoint_converts_like_the_reference(docs_llama: Path, tmp_path: Path, outtype: Any) -> None:
    recorded = golden("docs-llama-45m")[outtype]
    assert_recorded(CheckpointSource(docs_llama, outtype), recorded, tmp_path / "out.gguf")


@requires_reference
@pytest.mark.parametrize("name", RECIPES)
def test_llama_cpp_loads_the_file_and_computes(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = CheckpointSource(tiny[name], "f16")
    metadata, ids = llama_computes(write(source, tmp_path / "out.gguf"), b"the 123 hats<|end|>")
    assert metadata["general.name"] == source.metadata.string("general.name")
    assert ids[0] == 296 and ids[-1] == 299


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_are_those_of_the_whole(tiny: dict[str, Path], data: st.DataObject) -> None:
    source = CheckpointSource(tiny[data.draw(st.sampled_from(sorted(RECIPES)))], data.draw(st.sampled_from(OUTTYPES)))
    info = source.tensors[data.draw(st.sampled_from(sorted(source.tensors)))]
    start = data.draw(st.integers(0, info.n_rows))
    stop = data.draw(st.integers(start, info.n_rows))
    whole, rows = source.read(info.name), source.read(info.name, start, stop)
    assert whole.shape == (info.n_rows, info.nbytes // info.n_rows) and whole.dtype == np.uint8
    np.testing.assert_array_equal(rows, whole[start:stop])


def test_a_checkpoint_that_shrinks_is_one_line(copy: Callable[..., Path]) -> None:
    """Through a memory map, this ended the process with SIGBUS."""
    source = CheckpointSource(copy())
    for shard in source.files:
        if shard.suffix == ".safetensors":
            os.truncate(shard, shard.stat().st_size // 8)
    name = max(source.tensors, key=lambda each: source.tensors[each].nbytes)
    with pytest.raises(QuantkitError, match="has changed while it was read"):
        source.read(name)
    with pytest.raises(QuantkitError, match="has changed while it was read"):
        source.release(name)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "token_embd.weight"])
def test_reading_a_row_takes_the_memory_of_a_row(tiny: dict[str, Path], name: str) -> None:
    source = CheckpointSource(tiny[YARN], "f32")
    source.read(name, 0, 1)  # kernels are compiled and caches filled
    tracemalloc.start()
    try:
        row = source.read(name, 3, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.tensors[name].nbytes > 20_000 > peak > row.nbytes / 2


def test_reading_from_several_threads_gives_the_same(tiny: dict[str, Path]) -> None:
    source = CheckpointSource(tiny[LINEAR], "q8_0")
    names = list(source.tensors) * 8
    alone = {name: source.read(name) for name in source.tensors}
    with ThreadPoolExecutor(8) as pool:
        for name, data in zip(names, pool.map(source.read, names), strict=True):
            np.testing.assert_array_equal(data, alone[name])


def test_data_at_an_odd_offset_reads_the_same(tiny: dict[str, Path], copy: Callable[..., Path]) -> None:
    """The format wants headers padded to 8 bytes, and old writers did not pad."""
    directory = copy()
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    for outtype in OUTTYPES:
        odd, even = CheckpointSource(directory, outtype), CheckpointSource(tiny[YARN], outtype)
        for name in odd.tensors:
            np.testing.assert_array_equal(odd.read(name), even.read(name))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_blocks_are_not_made_of_nan_or_infinity(tiny: dict[str, Path], copy: Callable[..., Path], value: float) -> None:
    directory = copy(LINEAR)
    tensor = SafetensorsCheckpoint(directory).tensors["model.layers.1.mlp.up_proj.weight"]
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(tensor.start + 4 * (7 * 64 + 5))
        file.write(np.float32(value).tobytes())
    told = rf"tensor 'blk.1.ffn_up.weight' holds {value} at row 7, column 5; the checkpoint is damaged"
    with pytest.raises(QuantkitError, match=told):
        CheckpointSource(directory, "q8_0").read("blk.1.ffn_up.weight", 6, 9)
    with pytest.raises(QuantkitError, match=told):
        write(CheckpointSource(directory, "f32"), directory / "out.gguf")
    allowed = CheckpointSource(directory, "q8_0", allow_nonfinite=True)
    rows, clean = (
        allowed.read("blk.1.ffn_up.weight"),
        CheckpointSource(tiny[LINEAR], "q8_0").read("blk.1.ffn_up.weight"),
    )
    assert np.nonzero((rows != clean).any(axis=1))[0].tolist() == [7]


def test_weights_beyond_f16_are_named(tiny: dict[str, Path], copy: Callable[..., Path]) -> None:
    directory = copy(LINEAR)
    tensor = SafetensorsCheckpoint(directory).tensors["model.layers.1.mlp.up_proj.weight"]
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(tensor.start + 4 * (7 * 64 + 5))
        file.write(np.float32(70000).tobytes())
    told = r"tensor .blk.1.ffn_up.weight. holds 70000 at row 7, column 5, more than F16 can hold \(65504\); choose"
    with pytest.raises(QuantkitError, match=told):
        CheckpointSource(directory, "f16").read("blk.1.ffn_up.weight", 6, 9)
    for outtype in ("f32", "bf16", "q8_0"):
        write(CheckpointSource(directory, outtype), directory / f"{outtype}.gguf")  # type: ignore[arg-type]
    allowed = CheckpointSource(directory, "f16", allow_nonfinite=True).read("blk.1.ffn_up.weight", 7, 8)
    assert np.isinf(allowed.view(np.float16)[0, 5])


def test_rows_outside_the_tensor_are_refused(tiny: dict[str, Path]) -> None:
    source = CheckpointSource(tiny[YARN])
    for start, stop in ((-1, 2), (0, 10_000), (3, 2)):
        with pytest.raises(IndexError):
            source.read("token_embd.weight", start, stop)


def test_a_snapshot_of_the_hubs_cache_is_named_after_its_repository(tiny: dict[str, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--Tiny-0.1B-chat" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny[YARN], snapshot)
    metadata = CheckpointSource(snapshot).metadata
    assert metadata.string("general.name") == "Tiny 0.1B Chat"
    assert metadata.string("general.organization") == "Some Org"
    assert CheckpointSource(snapshot, name="Mine").metadata.string("general.name") == "Mine"


def test_a_symbolic_link_names_the_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "Linked-3B-v9"
    link.symlink_to(tiny[YARN])
    assert CheckpointSource(link).metadata.string("general.version") == "v9"


def test_a_name_cannot_lead_out_of_the_directory() -> None:
    metadata = Metadata({"general.version": Value.of(ValueType.STRING, "/../../etc/x")})
    assert "/" not in output_name(metadata, "F16")


# Families that the abstraction has to carry, reduced to what they do to tensors.


class Odd(Architecture):
    gguf_name = "llama"
    checkpoints = {"OddForCausalLM": {"num_hidden_layers": 1}}  # noqa: RUF012
    transforms = {  # noqa: RUF012
        "norm.weight": Transform(arithmetic=lambda rows: rows + rows.dtype.type(1)),
        "o_proj.weight": Transform(rearrange=lambda config, stored: stored.T),
    }
    stacks = (
        Stack(
            count=("num_local_experts",),
            part="model.layers.{layer}.block_sparse_moe.experts.{item}.{projection}.weight",
            merged="layers.{layer}.feed_forward.experts.{projection}.weight",
            projections=("w1", "w2", "w3"),
        ),
    )


def odd_checkpoint(directory: Path, dtype: type[np.floating[Any]], n_experts: int = 3) -> dict[str, np.ndarray]:
    from safetensors.numpy import save_file

    draw = np.random.default_rng(7)
    shapes = {"model.norm.weight": (64,), "model.layers.0.self_attn.o_proj.weight": (96, 64)}
    part = "model.layers.0.block_sparse_moe.experts.{}.w{}.weight"
    shapes |= {part.format(e, w): ((64, 32) if w == 2 else (32, 64)) for e in range(n_experts) for w in (1, 2, 3)}
    tensors = {name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architectures": ["OddForCausalLM"], "num_local_experts": 3}))
    return tensors


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_transposed_stacked_and_shifted_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setitem(architectures.BY_CLASS, "OddForCausalLM", Odd)
    tensors = odd_checkpoint(tmp_path, dtype)
    source = CheckpointSource(tmp_path, "f32")

    def read(name: str, *rows: int) -> np.ndarray:
        return source.read(name, *rows).view(np.float32)

    stacks = {"ffn_gate_exps": 1, "ffn_down_exps": 2, "ffn_up_exps": 3}
    assert list(source.tensors)[:3] == [f"blk.0.{name}.weight" for name in stacks]
    for name, w in stacks.items():
        parts = [tensors[f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"] for e in range(3)]
        wanted = np.stack(parts).astype(np.float32)
        info = source.tensors[f"blk.0.{name}.weight"]
        assert info.shape == wanted.shape[::-1]
        np.testing.assert_array_equal(read(info.name), wanted.reshape(-1, info.n_per_row))
        n = info.n_rows // 3
        np.testing.assert_array_equal(
            read(info.name, n - 2, 2 * n + 1), wanted.reshape(-1, info.n_per_row)[n - 2 : 2 * n + 1]
        )
    assert source.tensors["blk.0.attn_output.weight"].shape == (96, 64)
    np.testing.assert_array_equal(
        read("blk.0.attn_output.weight", 5, 9),
        tensors["model.layers.0.self_attn.o_proj.weight"].T[5:9].astype(np.float32),
    )
    shifted = (tensors["model.norm.weight"] + dtype(1)).astype(np.float32)
    np.testing.assert_array_equal(read("output_norm.weight")[0], shifted)


def test_a_missing_expert_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.BY_CLASS, "OddForCausalLM", Odd)
    odd_checkpoint(tmp_path, np.float32, n_experts=2)
    with pytest.raises(QuantkitError, match=r"layer 0 lacks parts of layers\.0\..*: only 6 of their tensors are there"):
        CheckpointSource(tmp_path)


@pytest.mark.parametrize(("shape", "dtype"), [((32, 64), np.float16), ((32, 96), np.float32)])
def test_experts_must_be_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any) -> None:
    from safetensors.numpy import save_file

    monkeypatch.setitem(architectures.BY_CLASS, "OddForCausalLM", Odd)
    tensors = odd_checkpoint(tmp_path, np.float32)
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"] = np.zeros(shape, dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        QuantkitError, match=r"experts\.2\.w1\.weight' does not have the shape and type of '.*experts.0.w1.weight'"
    ):
        CheckpointSource(tmp_path)


BAD_CONFIGS = {
    "unknown architecture": (
        {"architectures": ["BananaForCausalLM"]},
        "BananaForCausalLM is not supported; `quantkit architectures` lists",
    ),
    "no architecture": ({"architectures": None}, "names no model class"),
    "quantized": ({"quantization_config": {"quant_method": "aqlm"}}, r"quantized already \(aqlm\)"),
    "no heads": ({"num_attention_heads": 0}, "lacks num_attention_heads"),
    "too many heads": ({"num_attention_heads": 7}, "'model.layers.0.self_attn.q_proj.weight' of shape .* does not fit"),
    "heads as text": ({"num_attention_heads": "four"}, "num_attention_heads is 'four', not a whole number"),
    "fractional layers": ({"num_hidden_layers": 1.5}, "num_hidden_layers is '1.5', not a whole number"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is .1000000000., not at most 512"),
    "too few layers": ({"num_hidden_layers": 1}, "'model.layers.1.* has no place in llama with 1 layers"),
    "huge context": ({"max_position_embeddings": 10**30}, "max_position_embeddings is .*, not between 0 and"),
    "infinite epsilon": ({"rms_norm_eps": math.inf}, "rms_norm_eps is 'inf', not a finite number"),
    "rope as list": ({"rope_parameters": [1]}, "rope_parameters is .*, not an object"),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral"}}, "the rope scaling 'spiral' is not supported"),
    "rope factor as text": ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2', not a finite"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_in_one_line(copy: Callable[..., Path], case: str) -> None:
    changes, told = BAD_CONFIGS[case]
    with pytest.raises(QuantkitError, match=told) as caught:
        assert CheckpointSource(copy(**changes)).metadata
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("README.md", "---\nlicense: [\n---\n", "README.md or a config is malformed"),
        ("README.md", "---\nversion: 1.0\n---\n", "general.version cannot be written"),
        ("README.md", "---\ntags: [1, two]\n---\n", "general.tags cannot be written"),
        ("generation_config.json", '{"temperature": "hot"}', "general.sampling.temp cannot be written"),
    ],
)
def test_bad_files_are_refused_in_one_line(copy: Callable[..., Path], file: str, content: str, told: str) -> None:
    directory = copy()
    (directory / file).write_text(content)
    with pytest.raises(QuantkitError, match=told) as caught:
        assert CheckpointSource(directory).metadata
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"has no config\.json"):
        CheckpointSource(tmp_path)


def test_the_written_file_reads_back(tiny: dict[str, Path], tmp_path: Path) -> None:
    source = CheckpointSource(tiny[LLAMA3])
    file = GGUFFile(write(source, tmp_path / "out.gguf"))
    assert file.metadata == source.metadata
    assert file.tensors == dict(source.tensors)
    assert next(iter(file.tensors)) == "rope_freqs.weight"
    assert "output.weight" not in file.tensors  # tied
