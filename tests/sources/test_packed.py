"""Checkpoints that are quantized already: their weights against what the libraries that made them dequantize."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_checkpoints import PACKED, make_checkpoint
from support.conversion import assert_recorded, changed_copy, golden

from quantkit.errors import QuantkitError
from quantkit.pipeline.plan import plan_copy, plan_quantize
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.packed.matrix import n_words, unpack

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "packed"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.json"))


def tensors_of(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The type, shape and bytes of each tensor of a safetensors file, those too that numpy lacks a type for."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, of which the packed matrices take the place of some."""
    whole = make_checkpoint("tiny-llama3-scaling", tmp_path_factory.mktemp("plain"))
    return changed_copy(whole, whole.with_name("one-layer"), num_hidden_layers=1, num_key_value_heads=2)


def packed_checkpoint(plain: Path, target: Path, name: str, **changes: Any) -> Path:
    """The checkpoint with the matrices of the golden `name`. `changes` are to its quantization_config."""
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    directory = changed_copy(plain, target, quantization_config={**golden["quantization_config"], **changes})
    stored = tensors_of(directory / "model.safetensors")
    kept = {
        key: value for key, value in stored.items() if ".layers." not in key or ".0.input_" in key or "0.post_" in key
    }
    write_tensors(directory / "model.safetensors", kept | tensors_of(GOLDENS / f"{name}.safetensors"))
    return directory


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """The bytes of float32 values, rounded to another type of float, with zeros that have no sign."""
    values = values + np.float32(0)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_the_librarys(plain: Path, tmp_path: Path, name: str) -> None:
    source = CheckpointSource(packed_checkpoint(plain, tmp_path / "packed", name))
    wanted = json.loads((GOLDENS / f"{name}.json").read_text())["matrices"]
    found = {}
    for matrix, (dtype, shape, _) in wanted.items():
        stored = source._checkpoint
        values = stored.read(matrix, stored.data(matrix), 0, shape[0])
        assert values.dtype == np.float32
        digest = hashlib.sha256(rounded(values, dtype)).hexdigest()[:16]
        found[matrix] = [dtype, list(values.shape), digest]
    assert found == wanted
    assert source.dequantized.startswith("7 tensors dequantized: ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("packed")
    return {name: make_checkpoint(name, parent) for name in PACKED}


@pytest.mark.parametrize("outtype", ["auto", "f32", "q8_0"])
@pytest.mark.parametrize("name", PACKED)
def test_the_file_is_the_reference_converters(tiny: dict[str, Path], tmp_path: Path, name: str, outtype: Any) -> None:
    assert_recorded(CheckpointSource(tiny[name], outtype), golden(name)[outtype], tmp_path / "out.gguf")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_are_those_of_the_whole(tiny: dict[str, Path], data: st.DataObject) -> None:
    """Queries and keys are rearranged on the way, so that rows of a tensor lie apart in the stored matrix."""
    source = CheckpointSource(
        tiny[data.draw(st.sampled_from(sorted(PACKED)))], data.draw(st.sampled_from(["f32", "q8_0"]))
    )
    info = source.tensors[data.draw(st.sampled_from(sorted(source.tensors)))]
    start = data.draw(st.integers(0, info.n_rows))
    stop = data.draw(st.integers(start, info.n_rows))
    np.testing.assert_array_equal(source.read(info.name, start, stop), source.read(info.name)[start:stop])
    if data.draw(st.booleans()):
        source.release(info.name)


@pytest.mark.parametrize("name", ["bnb-nf4", "awq", "awq-gemv"])
def test_columns_of_a_quantized_matrix(plain: Path, tmp_path: Path, name: str) -> None:
    """Parts of rows and transposed matrices, as some families take them."""
    stored = CheckpointSource(packed_checkpoint(plain, tmp_path / "packed", name))._checkpoint
    matrix = "model.layers.0.mlp.down_proj.weight"
    view = stored.data(matrix)
    whole = stored.read(matrix, view, 0, 64)
    np.testing.assert_array_equal(stored.read(matrix, view[:, 32:80], 3, 20), whole[3:20, 32:80])
    np.testing.assert_array_equal(stored.read(matrix, view[:, 1::2], 0, 64), whole[:, 1::2])
    np.testing.assert_array_equal(stored.read(matrix, view.T, 5, 96), whole.T[5:])
    np.testing.assert_array_equal(stored.read(matrix, view.reshape(32, 192), 0, 32), whole.reshape(32, 192))
    np.testing.assert_array_equal(stored.read(matrix, view[::-2], 0, 32), whole[::-2])
    assert stored.read(matrix, view, 7, 7).shape == (0, 96)
    with pytest.raises(QuantkitError, match="cannot be rearranged while it is quantized"):
        stored.read(matrix, view.copy(), 0, 1)


def test_the_plan_says_what_is_dequantized(plain: Path, tmp_path: Path) -> None:
    source = CheckpointSource(packed_checkpoint(plain, tmp_path / "packed", "ct-int4"))
    for line in (*plan_copy(source), *plan_quantize(source, "Q8_0")):
        assert ("INT4 in groups of 32" in line.reason) == (
            line.source_name.startswith("blk.") and "norm" not in line.source_name
        )


def test_rows_are_dequantized_one_by_one(tmp_path: Path, plain: Path) -> None:
    """Reading a row takes the memory of rows and scales, not that of the matrix."""
    directory = packed_checkpoint(plain, tmp_path / "packed", "ct-fp8-rows")
    path = directory / "model.safetensors"
    rows, columns = 320, 1 << 16
    tensors = tensors_of(path)
    tensors["lm_head.weight"] = ("F8_E4M3", [rows, columns], bytes(rows * columns))
    tensors["lm_head.weight_scale"] = ("F32", [rows, 1], bytes(4 * rows))
    write_tensors(path, tensors)
    del tensors
    source = CheckpointSource(directory, "f32")
    tracemalloc.start()
    try:
        source.read("output.weight", 17, 19)
        assert tracemalloc.get_traced_memory()[1] < 40 * columns  # of 1280 that all of its numbers take
    finally:
        tracemalloc.stop()


@requires_torch
def test_floats_of_8_bits_are_torchs() -> None:
    import torch

    from quantkit.sources.packed.matrix import E8M0, FLOAT8

    codes = torch.arange(256, dtype=torch.uint8)
    types = {
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }  # fmt: skip
    for name, dtype in types.items():
        np.testing.assert_array_equal(FLOAT8[name], codes.view(dtype).float().numpy())
    np.testing.assert_array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_numbers_packed_into_words(data: st.DataObject) -> None:
    """Against Python's own whole numbers, which are as long as a row."""
    bits, across = data.draw(st.integers(1, 8)), data.draw(st.booleans())
    numbers = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=80))
    per_word = 32 // bits
    place = (lambda i: i * bits) if across else (lambda i: i // per_word * 32 + i % per_word * bits)
    whole = sum(number << place(i) for i, number in enumerate(numbers))
    count = n_words(len(numbers), bits, across)
    words = np.frombuffer(whole.to_bytes(4 * count, "little"), "<u4")
    assert unpack(words.reshape(1, -1), bits, len(numbers), across).tolist() == [numbers]
    with pytest.raises(ValueError, match="hold no"):
        unpack(words.reshape(1, -1)[:, 1:], bits, len(numbers), across)


def test_older_tools_say_it_in_a_file_of_their_own(tiny: dict[str, Path], tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json, and no list of groups."""
    directory = changed_copy(tiny["tiny-packed-gptq-v2"], tmp_path / "old", quantization_config="absent")
    path = directory / "model.safetensors"
    tensors = tensors_of(path)
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")})
    said = {"bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (directory / "quantize_config.json").write_text(json.dumps(said))
    source, whole = CheckpointSource(directory, "f32"), CheckpointSource(tiny["tiny-packed-gptq-v2"], "f32")
    assert source.tensors.keys() == whole.tensors.keys()
    assert source.read("blk.0.ffn_up.weight").shape == whole.read("blk.0.ffn_up.weight").shape


def test_what_activations_need_is_left_out(plain: Path, tmp_path: Path) -> None:
    directory = packed_checkpoint(plain, tmp_path / "packed", "ct-fp8")
    path, one = directory / "model.safetensors", ("F32", [1], np.float32(1).tobytes())
    with_scales = CheckpointSource(directory).tensors.keys()
    more = {f"model.layers.0.self_attn.{name}": one for name in ("k_scale", "v_scale", "q_proj.input_scale")}
    write_tensors(path, tensors_of(path) | more)
    assert CheckpointSource(directory).tensors.keys() == with_scales


def test_quanto_is_known_by_the_file_beside_it(plain: Path, tmp_path: Path) -> None:
    """Its config.json says nothing of how weights are stored."""
    whole = packed_checkpoint(plain, tmp_path / "packed", "quanto-int8")
    directory = changed_copy(whole, tmp_path / "copy", quantization_config="absent")
    modules = {"model.layers.0.self_attn.q_proj": {"weights": "qint8", "activations": "none"}}
    (directory / "quanto_qmap.json").write_text(json.dumps(modules))
    found, wanted = CheckpointSource(directory, "f32"), CheckpointSource(whole, "f32")
    assert dict(found.tensors) == dict(wanted.tensors)
    assert all(np.array_equal(found.read(name), wanted.read(name)) for name in wanted.tensors)


DOWN = "model.layers.0.mlp.down_proj."
Q = "model.layers.0.self_attn.q_proj."
BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "unknown method": ("awq", {"quant_method": "aqlm"}, {}, r"quantized already \(aqlm\), which is not supported"),
    "no method": ("awq", {"quant_method": None}, {}, r"quantized already \(None\)"),
    "other awq": ("awq", {"version": "gemv_fast"}, {}, "AWQ of version 'gemv_fast'"),
    "awq as rows": ("awq", {"version": "gemv"}, {}, "scales.* not the scales of .* columns in groups of 32, and zero"),
    "groups of rows": ("awq-gemv", {"group_size": 24}, {}, "not the scales of 64 columns in groups of 24"),
    "group size": ("awq", {"group_size": 48}, {}, r"scales.* not the scales of .* columns in groups of 48"),
    "no zero points": ("awq", {}, {f"{Q}qzeros": None}, "qweight' is there, and .*qzeros' is not"),
    "words of floats": ("awq", {}, {f"{Q}qweight": ("F32", [64, 8], bytes(2048))}, "not I32 with two axes"),
    "other bits": ("ct-int4", {"config_groups": {"g": {"weights": {"num_bits": 5}}}}, {}, "the bits that config.json"),
    "bits as text": ("ct-int4", {"config_groups": {"g": {"weights": {"num_bits": "4"}}}}, {}, "not a whole number"),
    "sparse": ("ct-int4", {"format": "marlin-24"}, {}, "format 'marlin-24' is not supported"),
    "rotated": ("ct-int4", {"transform_config": {"config_groups": {"a": {}}}}, {}, "weights are rotated"),
    "huge shape": (
        "ct-int4", {}, {f"{Q}weight_shape": ("I64", [2], np.array([1 << 60, 1 << 60]).tobytes())}, "the bits that",
    ),
    "shape of shape": ("ct-int4", {}, {f"{Q}weight_shape": ("I64", [1], bytes(8))}, "numbers of rows and columns"),
    "groups beyond": (
        "ct-int4-ordered", {}, {f"{Q}weight_g_idx": ("I32", [64], np.full(64, 2, np.int32).tobytes())},
        "with groups from 2 to 2, and there are 2",
    ),
    "block as text": (
        "ct-fp8-blocks", {"config_groups": {"g": {"weights": {"block_structure": "a"}}}}, {}, "not the height and",
    ),
    "scales of no shape": ("ct-fp8", {}, {f"{Q}weight_scale": ("F32", [7], bytes(28))}, r"not the scales of"),
    "scales of no type": ("ct-fp8", {}, {f"{Q}weight_scale": ("I32", [1], bytes(4))}, "not of a type that scales have"),
    "nested": ("bnb-nf4", {}, {f"{Q}weight.quant_map": ("F32", [16], np.full(16, np.nan, "f4").tobytes())}, "finite"),
    "state": ("bnb-nf4", {}, {f"{Q}weight.quant_state.bitsandbytes__nf4": ("U8", [2], b"[]")}, "not a JSON object"),
    "no blocks": (
        "bnb-nf4", {}, {f"{Q}weight.quant_state.bitsandbytes__nf4": ("U8", [32], b'{"shape":[64,64],"blocksize":0 }')},
        "of blocks of 0",
    ),
    "bits of hqq": ("hqq-int4", {}, {f"{Q}nbits": ("I32", [], np.int32(5).tobytes())}, "is 5, not one of 1, 2"),
    "bits as words": ("hqq-int4", {}, {f"{Q}nbits": ("I32", [2], bytes(8))}, "not a whole number"),
    "no bits": ("hqq-int4", {}, {f"{Q}nbits": None}, "W_q' is there, and .*nbits' is not"),
    "other bits of hqq": ("hqq-int4", {}, {f"{Q}nbits": ("I32", [], np.int32(3).tobytes())}, "not I32 with the num"),
    "huge hqq": (
        "hqq-int4", {}, {f"{Q}shape": ("I64", [2], np.array([1 << 60, 1 << 60]).tobytes())}, "not U8 with the numbers",
    ),
    "negative hqq": ("hqq-int4", {}, {f"{Q}shape": ("I64", [2], np.array([-64, 64]).tobytes())}, "not the shape of"),
    "hqq of no shape": ("hqq-int4", {}, {f"{Q}shape": ("F32", [2], bytes(8))}, "not the shape of a matrix"),
    "hqq within": ("hqq-int4", {}, {f"{Q}quant_zero": ("U8", [], b"\1")}, "its zeros are quantized too"),
    "hqq as floats": ("hqq-int2", {}, {f"{Q}view_as_float": ("U8", [], b"\1")}, "its words are stored as floats"),
    "zeros of hqq": ("hqq-int3", {}, {f"{Q}zero": ("F16", [128, 2], bytes(512))}, "a number for each of 128"),
    "quanto's bits": ("quanto-int8", {}, {f"{Q}weight._data._data": ("U8", [16, 16], bytes(256))}, "tell the sh"),
    "words of quanto": ("quanto-int8", {}, {f"{Q}weight._data": ("I32", [64, 64], bytes(1 << 14))}, "not INT8 or FP8"),
    "no scales of quanto": ("quanto-int8", {}, {f"{Q}weight._scale": None}, "_data' is there, and .*_scale' is not"),
    "int4 for kernels": (
        "torchao-int8", {}, {f"{Q}_weight_zero_point": ("BF16", [2, 64], bytes(256))}, "INT4 for a GPU's kernels",
    ),
    "no scales": ("ct-nvfp4", {}, {f"{Q}weight_scale": None}, "weight_packed' is there, and .*weight_scale' is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused_in_one_line(plain: Path, tmp_path: Path, case: str) -> None:
    name, changes, tensors, told = BAD[case]
    directory = packed_checkpoint(plain, tmp_path / "packed", name, **changes)
    path = directory / "model.safetensors"
    changed = tensors_of(path) | tensors
    write_tensors(path, {key: tensor for key, tensor in changed.items() if tensor is not None})
    with pytest.raises(QuantkitError, match=told) as caught:
        source = CheckpointSource(directory)
        for tensor in source.tensors:
            source.read(tensor)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tensors_of_other_shapes_are_refused_or_read(plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever a header says, there is an error or rows of the shape that was announced."""
    directory = tmp_path / "packed"
    if directory.exists():
        shutil.rmtree(directory)
    name = data.draw(st.sampled_from(NAMES))
    packed_checkpoint(plain, directory, name)
    tensors = tensors_of(directory / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(key for key in tensors if "_proj." in key)))
        dtype, _, raw = tensors[key]
        width = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8}.get(dtype, 1)
        count = len(raw) // width
        divisor = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8, 32, 64, 96) if count % n == 0]))
        shape = data.draw(st.permutations([divisor, count // divisor] + [1] * data.draw(st.integers(0, 2))))
        same = [
            kind
            for kind in ("F32", "I32", "U8", "I8", "F8_E4M3", "F16", "BF16", "I64")
            if kind == dtype or ({"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8}.get(kind, 1) == width)
        ]
        if data.draw(st.booleans()):
            raw = data.draw(st.randoms(use_true_random=False)).randbytes(len(raw))
        tensors[key] = (data.draw(st.sampled_from(same)), list(shape), raw)
    write_tensors(directory / "model.safetensors", tensors)
    with contextlib.suppress(QuantkitError):
        source = CheckpointSource(directory, "f32", allow_nonfinite=True)
        for info in source.tensors.values():
            assert source.read(info.name).shape == (info.n_rows, 4 * info.n_per_row)
