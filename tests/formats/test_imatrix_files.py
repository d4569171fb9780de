"""Importance-matrix files: round trips in both formats, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import Importance, ImportanceMatrix


def example() -> ImportanceMatrix:
    rng = np.random.default_rng(3)
    return ImportanceMatrix(
        {
            "blk.0.attn_q.weight": Importance(rng.random((1, 64), np.float32), np.array([1024])),
            "blk.0.ffn_up_exps.weight": Importance(rng.random((4, 32), np.float32), np.array([10, 0, 512, 3])),
        },
        ["a.txt", "b.txt"],
        chunk_count=2,
        chunk_size=512,
    )


def test_gguf_round_trip(tmp_path: Path) -> None:
    matrix = example()
    matrix.save(tmp_path / "m.gguf")
    again = ImportanceMatrix.load(tmp_path / "m.gguf")
    assert (again.datasets, again.chunk_count, again.chunk_size) == (["a.txt", "b.txt"], 2, 512)
    for name, entry in matrix.entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)


def test_legacy_keeps_the_weights(tmp_path: Path) -> None:
    matrix = example()
    matrix.save_legacy(tmp_path / "m.dat")
    again = ImportanceMatrix.load(tmp_path / "m.dat")
    assert (again.datasets, again.chunk_count) == (["b.txt"], 2)
    for name, entry in matrix.entries.items():
        # Stored as means times calls, in float32, and divided again: two roundings.
        np.testing.assert_allclose(again.entries[name].weights().reshape(-1), entry.weights().reshape(-1), rtol=2.5e-7)


def test_unseen_experts_weigh_evenly() -> None:
    weights = example().entries["blk.0.ffn_up_exps.weight"].weights()
    assert (weights[1] == 1).all() and not (weights[0] == 1).all()


def test_merging_adds(tmp_path: Path) -> None:
    matrix = example()
    matrix.merge(example())
    twice = matrix.entries["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(twice.counts, [2048])
    np.testing.assert_allclose(twice.weights(), example().entries["blk.0.attn_q.weight"].weights(), rtol=1e-7)
    other = example()
    other.entries["blk.0.attn_q.weight"].sums = np.zeros((1, 32), np.float32)
    with pytest.raises(QuantkitError, match="different models"):
        matrix.merge(other)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_strangers_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("stranger") / "m.dat"
    path.write_bytes(data)
    try:
        ImportanceMatrix.load(path)
    except QuantkitError as problem:
        assert "\n" not in str(problem)


def test_truncation_is_refused(tmp_path: Path) -> None:
    example().save_legacy(tmp_path / "m.dat")
    whole = (tmp_path / "m.dat").read_bytes()
    end = len(whole) - len("b.txt") - 8  # what follows the entries may be missing
    for size in range(0, end, 13):
        (tmp_path / "cut.dat").write_bytes(whole[:size])
        with pytest.raises(QuantkitError):
            ImportanceMatrix.load(tmp_path / "cut.dat")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    matrix = example()
    matrix.entries["blk.0.attn_q.weight"].sums[0, 5] = np.nan
    matrix.save(tmp_path / "m.gguf")
    with pytest.raises(QuantkitError, match=r"for 'blk.0.attn_q.weight' are negative or not finite"):
        ImportanceMatrix.load(tmp_path / "m.gguf")


def test_merging_an_older_file_counts_its_chunks_in_tokens(tmp_path: Path) -> None:
    """As llama-imatrix does: its mean squares weigh as many tokens as it has chunks of; all experts have one count."""
    matrix = example()
    matrix.entries["blk.0.ffn_up_exps.weight"].counts[:] = 1024
    matrix.save_legacy(tmp_path / "m.dat")
    old = ImportanceMatrix.load(tmp_path / "m.dat").counted_in_tokens(512)
    assert old.entries["blk.0.attn_q.weight"].counts.tolist() == [1024]
    for first, second in ((matrix, old), (old, matrix)):
        both = ImportanceMatrix()
        both.merge(first)
        both.merge(second)
        for name, entry in matrix.entries.items():
            assert both.entries[name].counts.tolist() == (2 * entry.counts).tolist()
            np.testing.assert_allclose(both.entries[name].sums, 2 * entry.sums, rtol=1e-6)
    assert matrix.counted_in_tokens(99) is matrix
