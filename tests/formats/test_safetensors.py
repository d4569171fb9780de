"""Safetensors checkpoints: what the safetensors library writes is read back, and what is wrong is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import SafetensorsCheckpoint

INDEX = "model.safetensors.index.json"


def entry(shape: list[int], offsets: list[int], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def encode(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_shards(directory: Path, shards: dict[str, dict[str, list[int]]], weight_map: Any = None) -> None:
    for file, tensors in shards.items():
        header, at = {}, 0
        for name, shape in tensors.items():
            header[name] = entry(shape, [at, at + 4 * math.prod(shape)])
            at += 4 * math.prod(shape)
        (directory / file).write_bytes(encode(header, bytes(at)))
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "F16"]), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**32)),
        min_size=1,
        max_size=6,
    )
)
def test_what_the_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, list[int], int]]
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    arrays = {}
    for name, (dtype, shape, seed) in content.items():
        values = np.random.default_rng(seed).standard_normal(shape)
        arrays[name] = np.asarray(values, np.float32 if dtype == "F32" else np.float16)
    save_file(arrays, directory / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(directory)
    assert list(checkpoint.tensors) == sorted(content)
    for name, array in arrays.items():
        assert checkpoint.tensors[name].dtype == content[name][0]
        assert checkpoint.data(name).dtype == array.dtype
        np.testing.assert_array_equal(checkpoint.data(name), array)


def test_data_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": {"a": [2, 3]}})
    data = SafetensorsCheckpoint(tmp_path).data("a")
    assert not data.flags.writeable and not data.flags.owndata
    assert data.dtype == np.float32


def test_tensors_come_by_file_then_by_name(tmp_path: Path) -> None:
    write_shards(
        tmp_path,
        {
            "model-2.safetensors": {"b": [1], "a": [1]},
            "model-1.safetensors": {"z": [1], "layers.10": [1], "layers.2": [1]},
        },
    )
    assert list(SafetensorsCheckpoint(tmp_path).tensors) == ["layers.10", "layers.2", "z", "a", "b"]


# What the library finds wrong it says in its own words, which change between its versions.
MALFORMED = "not a whole safetensors file: ."
BAD_HEADERS = {
    "empty file": (b"", "truncated: only 0 bytes"),
    "short file": (b"\x10\0\0\0", "truncated: only 4 bytes"),
    "huge header": (encode({}, length=1 << 62), "announces a header"),
    "header past the end": (encode({"a": entry([1], [0, 4])}, length=4000), "its header ends at byte 4008"),
    "not JSON": (encode(b"{nonsense}"), MALFORMED),
    "not UTF-8": (encode(b'{"\xff\xfe": 1}'), MALFORMED),
    "deep JSON": (encode(b'{"a":' + b"[" * 100_000), MALFORMED),
    "endless number": (encode(b'{"a":' + b"9" * 10_000 + b"}"), MALFORMED),
    "not an object": (encode(b"[1, 2]  "), MALFORMED),
    "entry not an object": (encode({"a": 3}), MALFORMED),
    "unknown type": (encode({"a": entry([1], [0, 4], "Q7")}, bytes(4)), MALFORMED),
    "type not a string": (encode({"a": entry([1], [0, 4], [])}, bytes(4)), MALFORMED),
    "negative shape": (encode({"a": entry([-1, -1], [0, 4])}, bytes(4)), MALFORMED),
    "fractional shape": (encode({"a": {**entry([1], [0, 4]), "shape": [1.0]}}, bytes(4)), MALFORMED),
    "overflowing shape": (encode({"a": entry([1 << 40, 1 << 40], [0, 4])}, bytes(4)), MALFORMED),
    "too many axes": (encode({"a": entry([1] * 20, [0, 4])}, bytes(4)), "'a' has 20 axes"),
    "endless name": (encode({f"layers.{'9' * 5000}.a": entry([1], [0, 4])}, bytes(4)), "is longer than 1024"),
    "one offset": (encode({"a": entry([1], [0])}, bytes(4)), MALFORMED),
    "offsets backwards": (encode({"a": entry([1], [4, 0])}, bytes(4)), MALFORMED),
    "wrong size": (encode({"a": entry([3], [0, 8])}, bytes(8)), MALFORMED),
    "past the end": (encode({"a": entry([4], [0, 16])}, bytes(12)), "its tensors do not end where it does"),
    "bytes after the last": (encode({"a": entry([1], [0, 4])}, bytes(5)), "its tensors do not end where it does"),
    "gap": (encode({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, bytes(12)), MALFORMED),
    "overlap": (encode({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)), MALFORMED),
    "name twice": (
        encode(
            b'{"a":'
            + json.dumps(entry([1], [0, 4])).encode()
            + b',"a":'
            + json.dumps(entry([1], [4, 8])).encode()
            + b"}",
            bytes(8),
        ),
        MALFORMED,
    ),
    "no tensors": (encode({"__metadata__": {}}), "hold no tensors"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, told = BAD_HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(QuantkitError, match=told) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_but_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = encode({"a": entry([2, 2], [0, 16]), "b": entry([3], [16, 22], "BF16")}, bytes(22))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=4)):
        if damaged:
            damaged[at] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "model.safetensors").write_bytes(damaged)
    try:
        checkpoint = SafetensorsCheckpoint(directory)
        for tensor in checkpoint.tensors.values():
            assert tensor.start + tensor.nbytes <= len(damaged)
            checkpoint.data(tensor.name)
    except QuantkitError:
        pass


def test_a_type_without_arithmetic_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        encode({"a": entry([4], [0, 4], "F8_E4M3"), "b": entry([1], [4, 8])}, bytes(8))
    )
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.data("b").shape == (1,)
    with pytest.raises(QuantkitError, match="tensor 'a' is F8_E4M3"):
        checkpoint.data("a")


TWO = {"model-00001-of-00002.safetensors": {"a": [1], "b": [2]}, "model-00002-of-00002.safetensors": {"c": [3]}}
FIRST, SECOND = TWO


def test_a_shard_that_the_index_lists_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path, TWO)
    (tmp_path / SECOND).unlink()
    with pytest.raises(QuantkitError, match=f"lists the shard '{SECOND}', which is not there"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND, "e": SECOND}, f"{SECOND}: lacks d, e, which"),
        ({"a": FIRST, "b": FIRST}, None),
        ({"a": FIRST, "c": SECOND}, f"{FIRST}: .* does not put b there"),
        ({"a": SECOND, "b": FIRST, "c": FIRST}, f"{FIRST}: lacks c"),
        ({"a": "../secret.safetensors"}, "names no shard"),
        ({"a": "/etc/passwd"}, "names no shard"),
        ({"a": "..\\secret.safetensors"}, "names no shard"),
        ({"a": "sub/model.safetensors"}, "names no shard"),
        ({"a": ["x"]}, "names no shard"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_the_index_and_the_shards_must_agree(tmp_path: Path, weight_map: Any, told: str | None) -> None:
    write_shards(tmp_path, TWO, weight_map)
    if told is None:  # a shard that the index does not mention is not read
        assert list(SafetensorsCheckpoint(tmp_path).tensors) == ["a", "b"]
        return
    with pytest.raises(QuantkitError, match=told):
        SafetensorsCheckpoint(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, TWO, {**{f"t{i}": FIRST for i in range(9)}, "a": FIRST, "b": FIRST, "c": SECOND})
    with pytest.raises(QuantkitError, match="lacks t0, t1, t2 and 6 more"):
        SafetensorsCheckpoint(tmp_path)


def test_without_an_index_a_gap_in_the_numbers_is_seen(tmp_path: Path) -> None:
    write_shards(tmp_path, TWO)
    (tmp_path / INDEX).unlink()
    assert list(SafetensorsCheckpoint(tmp_path).tensors) == ["a", "b", "c"]
    (tmp_path / FIRST).unlink()
    with pytest.raises(QuantkitError, match=f"shards are missing: {FIRST}"):
        SafetensorsCheckpoint(tmp_path)


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"holds no model\*.safetensors$"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    told = r"holds no model\*.safetensors, only pytorch_model.bin; .*python -c .*save_pretrained"
    with pytest.raises(QuantkitError, match=told):
        SafetensorsCheckpoint(tmp_path)
    with pytest.raises(QuantkitError, match="No such file"):
        SafetensorsCheckpoint(tmp_path / "nowhere")
