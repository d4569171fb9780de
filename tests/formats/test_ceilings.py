"""What small files may cost that claim to be large, and what happens when a file shrinks while it is read."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_metadata, tiny_weights, write_gguf

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats import reading
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo, ValueType, encode_header
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.formats.logits import LogitsFile
from quantkit.formats.reading import MOST_OPEN, InputFile
from quantkit.pipeline.plan import plan_copy
from quantkit.sources.source import GGUFSource

BIG = 1 << 60


def gguf(n_tensors: int, n_values: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + rest


def text(length: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + data


CLAIMS: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "2^60 tensors": (GGUFFile, gguf(BIG, 0, b"")),
    "2^60 values": (GGUFFile, gguf(0, BIG, b"")),
    "2^63 - 1 of both": (GGUFFile, gguf(2**63 - 1, 2**63 - 1, b"")),
    "a key of 2^63 bytes": (GGUFFile, gguf(0, 1, text(2**63))),
    "a string of 2^63 bytes": (GGUFFile, gguf(0, 1, text(1, b"k") + struct.pack("<I", 8) + text(2**63))),
    "an array of 2^60 numbers": (GGUFFile, gguf(0, 1, text(1, b"k") + struct.pack("<IIQ", 9, 4, BIG))),
    "an array of 2^60 strings": (GGUFFile, gguf(0, 1, text(1, b"k") + struct.pack("<IIQ", 9, 8, BIG))),
    "strings of 2^63 bytes": (
        GGUFFile, gguf(0, 1, text(1, b"k") + struct.pack("<IIQ", 9, 8, 2) + text(2**63) + text(2**64 - 1)),
    ),
    "arrays in arrays": (GGUFFile, gguf(0, 1, text(1, b"k") + struct.pack("<IIQ", 9, 9, 1) * 40)),
    "2^32 - 1 dimensions": (GGUFFile, gguf(1, 0, text(1, b"t") + struct.pack("<I", 2**32 - 1))),
    "a product of 2^64": (GGUFFile, gguf(1, 0, text(1, b"t") + struct.pack("<I4QIQ", 4, *[1 << 16] * 4, 0, 0))),
    "a dimension of 0": (GGUFFile, gguf(1, 0, text(1, b"t") + struct.pack("<I2QIQ", 2, 0, 2**62, 0, 0))),
    "an offset of 2^64 - 32": (GGUFFile, gguf(1, 0, text(1, b"t") + struct.pack("<IQIQ", 1, 8, 0, 2**64 - 32))),
    "a matrix of 2^31 entries": (ImportanceMatrix.load, struct.pack("<i", 2**31 - 1)),
    "a matrix with a name of 2^31": (ImportanceMatrix.load, struct.pack("<ii", 1, 2**31 - 1)),
    "a matrix of 2^31 values": (ImportanceMatrix.load, struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1)),
    "2^31 chunks of logits": (LogitsFile, b"_logits_" + struct.pack("<iii", 2**31 - 1, 2**31 - 1, 2**31 - 1)),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_cost_nothing(tmp_path: Path, claim: str) -> None:
    load, data = CLAIMS[claim]
    path = tmp_path / "x"
    path.write_bytes(data + bytes(max(0, 1000 - len(data))))
    tracemalloc.start()
    with pytest.raises(QuantkitError) as caught:
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20 and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("alignment", [0, 1, 3, 48, 1 << 17, 1 << 30, 1 << 31])
def test_alignments_that_are_none(tmp_path: Path, alignment: int) -> None:
    metadata = Metadata()
    metadata.set("general.alignment", ValueType.UINT32, alignment)
    path = tmp_path / "x.gguf"
    path.write_bytes(encode_header(metadata, [], 32))
    with pytest.raises(QuantkitError, match="power of two from 8 to 65536"):
        GGUFFile(path)


def test_overlapping_tensors(tmp_path: Path) -> None:
    infos = [TensorInfo("a", (16,), GGMLType.F32), TensorInfo("b", (16,), GGMLType.F32)]
    header = bytearray(encode_header(Metadata(), infos, 32))
    at = header.rindex(struct.pack("<Q", 64))
    header[at : at + 8] = struct.pack("<Q", 32)
    path = tmp_path / "x.gguf"
    path.write_bytes(bytes(header) + bytes(128))
    with pytest.raises(QuantkitError, match="'a' and 'b' overlap"):
        GGUFFile(path)


def test_many_small_values_are_bounded(tmp_path: Path) -> None:
    """550,000 keys of a byte each took 754 MB."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(0, 550_000, b"".join(text(3, i.to_bytes(3, "big")) + b"\0\0\0\0\0" for i in range(550_000))))
    with pytest.raises(QuantkitError, match="65536 are the most"):
        GGUFFile(path)


def test_a_file_that_shrinks_is_one_line(tmp_path: Path) -> None:
    """Through a memory map, this ended the process with SIGBUS."""
    path = write_gguf(tmp_path / "x.gguf", tiny_metadata(), tiny_weights())
    source = GGUFSource(path)
    os.truncate(path, path.stat().st_size // 2)
    last = list(source.tensors)[-1]
    with pytest.raises(QuantkitError, match="has changed while it was read"):
        source.read(last)
    with pytest.raises(QuantkitError, match="has changed while it was read"):
        source.release(last)


def test_a_file_that_is_replaced_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_OPEN", 1)
    first, other = (InputFile(write_gguf(tmp_path / name, tiny_metadata(), {})) for name in ("a", "b"))
    os.utime(first.path, ns=(0, 0))
    assert other.read(0, 4) == b"GGUF"  # takes the only place
    with pytest.raises(QuantkitError, match="has changed"):
        first.read(0, 4)


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    files = []
    for i in range(3 * MOST_OPEN):
        path = tmp_path / str(i)
        path.write_bytes(bytes([i]) * 10)
        files.append(InputFile(path))
    assert len(reading._open) <= MOST_OPEN
    assert [file.read(3, 1)[0] for file in files] == list(range(3 * MOST_OPEN))
    out = np.zeros(4, np.uint8)
    files[5].read_into(0, out)
    assert out.tolist() == [5] * 4
    before = len(reading._open)
    del files
    assert len(reading._open) < before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_pipes_and_directories_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "a directory")):
        with pytest.raises(QuantkitError, match=told):
            GGUFFile(path)


def test_sums_of_squares_are_not_negative(tmp_path: Path) -> None:
    sums = {"a.in_sum2": np.array([[1, -1, 1, 1]], np.float32), "a.counts": np.ones((1, 1), np.float32)}
    metadata = Metadata()
    metadata.set("imatrix.datasets", ValueType.ARRAY, [], ValueType.STRING)
    metadata.set("imatrix.chunk_count", ValueType.UINT32, 1)
    metadata.set("imatrix.chunk_size", ValueType.UINT32, 1)
    with pytest.raises(QuantkitError, match="'a' are negative or not finite"):
        ImportanceMatrix.load(write_gguf(tmp_path / "x", metadata, sums))
    (tmp_path / "y").write_bytes(struct.pack("<ii1sii", 1, 1, b"a", 1, 0))
    with pytest.raises(QuantkitError, match="'a' has no values"):
        ImportanceMatrix.load(tmp_path / "y")


def test_more_shards_than_can_be_numbered(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    infos = [TensorInfo(str(i), (1,), GGMLType.F32) for i in range(70_000)]
    path = tmp_path / "x.gguf"
    path.write_bytes(encode_header(metadata, infos, 32) + bytes(32 * len(infos)))
    with pytest.raises(QuantkitError, match="70000 shards are more than"):
        plan_copy(GGUFSource(path)).split_by(max_tensors=1)
