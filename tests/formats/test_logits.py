"""Log-probability files: their layout, read by hand, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.formats.logits import LogitsFile, LogitsWriter, empty_rows, parts


def write(path: Path, n_chunks: int = 2, n_ctx: int = 9, n_vocab: int = 5) -> tuple[np.ndarray, list[np.ndarray]]:
    """A file of random codes; returns its tokens and the rows of its chunks."""
    rng = np.random.default_rng(n_chunks * 100 + n_ctx * 10 + n_vocab)
    tokens = rng.integers(0, n_vocab, (n_chunks, n_ctx)).astype(np.int32)
    chunks = []
    with LogitsWriter(path, tokens, n_vocab) as writer:
        for chunk in range(n_chunks):
            rows = empty_rows(n_ctx - 1 - n_ctx // 2, n_vocab)
            affine, codes = parts(rows, n_vocab)
            affine[:, 0] = rng.random(len(rows)) / 65535
            affine[:, 1] = -1 - 20 * rng.random(len(rows))
            codes[:] = rng.integers(0, 65536, codes.shape)
            writer.write(rows, chunk * len(rows))
            chunks.append(rows)
    return tokens, chunks


def test_layout_as_llama_perplexity_writes_it(tmp_path: Path) -> None:
    """Words by hand: a row has 2 * ((n_vocab + 1) / 2) + 4 of them, and n_ctx - 1 - n_ctx / 2 rows make a chunk."""
    tokens, chunks = write(tmp_path / "f", 2, 9, 5)
    data = (tmp_path / "f").read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack_from("<3i", data, 8) == (9, 5, 2)
    assert struct.unpack_from("<18i", data, 20) == tuple(tokens.ravel())
    at = 20 + 4 * 18
    for rows in chunks:
        for row in rows:
            scale, least, *codes, padding = struct.unpack_from("<ff6H", data, at)
            assert (
                np.float32(scale) == parts(row[None], 5)[0][0, 0] and np.float32(least) == parts(row[None], 5)[0][0, 1]
            )
            assert codes == row[4:9].tolist() and padding == 0
            at += 20
    assert at == len(data)


@settings(deadline=None, max_examples=30)
@given(n_chunks=st.integers(1, 4), n_ctx=st.integers(4, 20), n_vocab=st.integers(1, 30))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, n_chunks: int, n_ctx: int, n_vocab: int) -> None:
    path = tmp_path_factory.mktemp("logits") / "f"
    tokens, chunks = write(path, n_chunks, n_ctx, n_vocab)
    file = LogitsFile(path)
    assert (file.n_chunks, file.n_ctx, file.n_vocab) == (n_chunks, n_ctx, n_vocab)
    np.testing.assert_array_equal(file.tokens, tokens)
    for i, rows in enumerate(chunks):
        for got, expected in zip(file.chunk(i), parts(rows, n_vocab), strict=True):
            np.testing.assert_array_equal(got, expected)
        for got, expected in zip(file.chunk(i, len(rows) - 1), parts(rows[-1:], n_vocab), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert [p.name for p in path.parent.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (0, struct.pack("<8s", b"_logitz_"), "not a file of log-prob"),
        (8, struct.pack("<i", -1), "damaged"),
        (8, struct.pack("<i", 3), "damaged"),
        (12, struct.pack("<i", 0), "damaged"),
        (12, struct.pack("<i", 2**31 - 1), "cut short"),
        (16, struct.pack("<i", -5), "damaged"),
        (16, struct.pack("<i", 2**31 - 1), "cut short"),
        (20, struct.pack("<i", 5), "outside its vocabulary"),
        (20, struct.pack("<i", -1), "outside its vocabulary"),
        (92, struct.pack("<f", float("nan")), "no log-prob"),
        (92, struct.pack("<f", -1.0), "no log-prob"),
        (92, struct.pack("<f", 1.0), "no log-prob"),
        (96, struct.pack("<f", float("-inf")), "no log-prob"),
    ],
)
def test_damage_is_told(tmp_path: Path, at: int, value: bytes, told: str) -> None:
    path = tmp_path / "f"
    write(path)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(QuantkitError, match=told):
        LogitsFile(path).chunk(0)


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 251))
def test_a_file_cut_short_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("logits") / "f"
    write(path)
    data = path.read_bytes()
    assert len(data) == 252
    path.write_bytes(data[:cut])
    with pytest.raises(QuantkitError):
        LogitsFile(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail_after_one_row() -> None:
        with LogitsWriter(tmp_path / "f", np.zeros((2, 8), np.int32), 5) as writer:
            writer.write(empty_rows(1, 5), 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_one_row()
    with (
        pytest.raises(QuantkitError, match="cannot be written"),
        LogitsWriter(tmp_path / "no" / "f", np.zeros((2, 8), np.int32), 5),
    ):
        pass
    with pytest.raises(QuantkitError, match="is a directory"), LogitsWriter(tmp_path, np.zeros((2, 8), np.int32), 5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="no such file"):
        LogitsFile(tmp_path / "none")
