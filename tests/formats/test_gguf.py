from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo, Value, ValueType, encode_header
from quantkit.formats.output import GGUFOutput


def write_with_gguf_py(path: Path, alignment: int = 32) -> dict[str, np.ndarray]:
    """A file with every kind of value and several types of tensor, by the format's own library."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_name("a name, ünïcode")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_int32("a.i32", -(2**31))
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**60))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["", "b", "çé" * 50])
    writer.add_array("a.numbers", [1, -2, 3])
    rng = np.random.default_rng(0)
    tensors = {
        "one": rng.standard_normal(7).astype(np.float32),
        "two": rng.standard_normal((3, 64)).astype(np.float16),
        "three": rng.standard_normal((2, 3, 32)).astype(np.float32),
    }
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("alignment", [32, 64])
def test_reads_what_gguf_py_writes(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    tensors = write_with_gguf_py(path, alignment)
    file = GGUFFile(path)
    values = {key: value.value for key, value in file.metadata.items()}
    assert values["general.name"] == "a name, ünïcode"
    assert [values[f"a.{t}"] for t in ("u8", "i8", "u16", "i16", "i32", "u64", "i64")] == [
        200, -100, 60000, -30000, -(2**31), 2**63, -(2**60),
    ]  # fmt: skip
    assert values["a.f32"] == np.float32(0.1) and values["a.f64"] == 0.1 and values["a.bool"] is True
    assert values["a.strings"] == ["", "b", "çé" * 50] and values["a.numbers"].tolist() == [1, -2, 3]
    assert list(file.tensors) == list(tensors)
    for name, data in tensors.items():
        assert file.tensors[name].shape == data.shape[::-1]
        assert file.read(name).tobytes() == data.tobytes()


def test_writes_what_gguf_py_writes(tmp_path: Path) -> None:
    """Our writer's file is theirs, byte for byte, and their reader reads it."""
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    tensors = write_with_gguf_py(theirs)
    file = GGUFFile(theirs)
    with GGUFOutput(ours, file.metadata, list(file.tensors.values())) as output:
        for name in tensors:
            for row in file.read(name):  # in pieces
                output.write(row)
    assert ours.read_bytes() == theirs.read_bytes()
    assert [t.name for t in gguf.GGUFReader(ours).tensors] == list(tensors)


def test_types_agree_with_the_gguf_package() -> None:
    for number, (block_size, type_size) in gguf.GGML_QUANT_SIZES.items():
        kind = GGMLType(int(number))
        assert kind.name == number.name and kind.block_size == block_size
        # gguf 0.19 still has the float32 scale and sum that Q8_1 once had; no file holds it.
        assert kind.type_size == type_size or kind is GGMLType.Q8_1
    assert {t.name: int(t) for t in ValueType} == {t.name: int(t) for t in gguf.GGUFValueType}


@given(
    st.one_of(
        st.tuples(st.just(ValueType.STRING), st.text()),
        st.tuples(st.just(ValueType.INT64), st.integers(-(2**63), 2**63 - 1)),
        st.tuples(st.just(ValueType.FLOAT64), st.floats(allow_nan=False)),
        st.tuples(st.just(ValueType.BOOL), st.booleans()),
    )
)
def test_values_round_trip(pair: tuple[ValueType, object]) -> None:
    kind, data = pair
    assert Value.of(kind, data).value == data


@given(st.lists(st.text()))
def test_string_arrays_round_trip(items: list[str]) -> None:
    value = Value.of(ValueType.ARRAY, items, ValueType.STRING)
    assert value.value == items and len(value) == len(items)


def small_file(tmp_path: Path) -> bytes:
    path = tmp_path / "small.gguf"
    write_with_gguf_py(path)
    return path.read_bytes()


def test_every_truncation_is_one_clear_line(tmp_path: Path) -> None:
    whole = small_file(tmp_path)
    path = tmp_path / "cut.gguf"
    end = len(whole) - 32  # the padding after the last tensor may be missing
    for size in range(0, end, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(QuantkitError) as problem:
            GGUFFile(path)
        assert str(path) in str(problem.value) and "\n" not in str(problem.value)


def test_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    """Random bytes changed in the header: the file opens, or a QuantkitError says why not."""
    whole = bytearray(small_file(tmp_path))
    path, rng = tmp_path / "bad.gguf", random.Random(1)
    header = 900
    for _ in range(600):
        bad = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(4, header)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(bad)
        try:
            file = GGUFFile(path)
            for value in file.metadata.values():
                _ = value.value
            for name in file.tensors:
                _ = file.read(name).sum()
        except QuantkitError as problem:
            assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF" + bytes([1, 0, 0, 0]) + bytes(100), "version 1 is not supported"),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(100), "big-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 8 + bytes(100), "truncated"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\xff" * 8 + bytes(100), "truncated"),
    ],
)
def test_bad_starts(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(start)
    with pytest.raises(QuantkitError, match=message):
        GGUFFile(path)


def test_offset_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "far.gguf"
    info = TensorInfo("far", (32, 1000), GGMLType.F32)
    path.write_bytes(encode_header(Metadata(), [info], 32) + bytes(100))
    with pytest.raises(QuantkitError, match="'far' ends at byte"):
        GGUFFile(path)


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_absurd_shapes(tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int) -> None:
    path = tmp_path_factory.mktemp("absurd") / "absurd.gguf"
    path.write_bytes(encode_header(Metadata(), [TensorInfo("t", (columns, rows), GGMLType.I8)], 32) + bytes(64))
    if not 0 < rows * columns <= 64:
        with pytest.raises(QuantkitError, match="truncated" if 0 < rows * columns < 2**63 else "impossible shape"):
            GGUFFile(path)
    else:
        assert GGUFFile(path).read("t").size == rows * columns


def test_output_leaves_nothing_behind(tmp_path: Path) -> None:
    info = TensorInfo("t", (4, 2), GGMLType.F32)
    target = tmp_path / "t.gguf"
    with pytest.raises(RuntimeError), GGUFOutput(target, Metadata(), [info]) as output:
        output.write(np.zeros((1, 16), np.uint8))
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="0 of 1 tensors"), GGUFOutput(target, Metadata(), [info]):
        pass
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_tensors_written_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Pieces in any order, from several threads, give the bytes that writing from the start gives."""
    home = tmp_path_factory.mktemp("order")
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.integers(0, 256, data.draw(st.integers(1, 90)), np.uint8) for i in range(3)}
    infos = [TensorInfo(name, (array.size,), GGMLType.I8) for name, array in arrays.items()]
    with GGUFOutput(home / "straight.gguf", Metadata(), infos) as output:
        for array in arrays.values():
            output.write(array)
    pieces = []
    for name, array in arrays.items():
        cuts = sorted({0, array.size, *data.draw(st.lists(st.integers(0, array.size), max_size=4))})
        pieces += [(name, a, array[a:b]) for a, b in itertools.pairwise(cuts)]
    pieces = data.draw(st.permutations(pieces))
    with GGUFOutput(home / "mixed.gguf", Metadata(), infos) as output:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda piece: output.write_tensor_at(*piece), pieces[:-1]))
        assert not output.complete
        output.write(pieces[-1][2])  # fills the one gap that is left
        assert output.complete
    assert (home / "mixed.gguf").read_bytes() == (home / "straight.gguf").read_bytes()


def test_tensors_are_written_once_and_whole(tmp_path: Path) -> None:
    info = TensorInfo("t", (64,), GGMLType.I8)
    for offset, size in ((0, 1), (9, 2), (10, 10), (12, 2), (19, 9), (5, 30), (60, 5), (-1, 2), (64, 1)):
        output = GGUFOutput(tmp_path / "t.gguf", Metadata(), [info])
        with pytest.raises(ValueError, match="not its own, or written twice"), output:
            output.write_tensor_at("t", 0, np.zeros(1, np.uint8))
            output.write_tensor_at("t", 10, np.zeros(10, np.uint8))
            output.write_tensor_at("t", offset, np.zeros(size, np.uint8))
    with (
        pytest.raises(ValueError, match="0 of 1 tensors"),
        GGUFOutput(tmp_path / "t.gguf", Metadata(), [info]) as output,
    ):
        output.write_tensor_at("t", 1, np.zeros(63, np.uint8))
    assert list(tmp_path.iterdir()) == []
