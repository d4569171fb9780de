"""The choice of types: against all choices on small problems, and what may be chosen at all."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.blocks.types import GGMLType as T
from quantkit.calibration.choice import SMALLEST, Item, candidates, choose, engine_lacks, tied
from quantkit.calibration.planning import Target
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo

KINDS = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q6_K)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict[T, tuple[int, float]]], int]:
    tables = []
    for _ in range(draw(st.integers(1, 5))):
        kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
        tables.append({k: (draw(st.integers(1, 50)) * 32, draw(st.floats(0, 1))) for k in kinds})
    most = sum(max(n for n, _ in table.values()) for table in tables)
    return tables, draw(st.integers(0, most + 100))


@settings(max_examples=200)
@given(problems())
def test_fits_and_comes_close_to_the_best_of_all_choices(problem: tuple[list[dict[T, tuple[int, float]]], int]) -> None:
    tables, budget = problem

    def total(picks: tuple[T, ...]) -> tuple[int, float]:
        rows = [table[kind] for table, kind in zip(tables, picks, strict=True)]
        return sum(n for n, _ in rows), sum(c for _, c in rows)

    possible = [total(picks) for picks in itertools.product(*tables)]
    fitting = [cost for nbytes, cost in possible if nbytes <= budget]
    items = [Item(table) for table in tables]
    if not fitting:
        with pytest.raises(QuantkitError, match="the smallest types take"):
            choose(items, budget)
        return
    nbytes, cost = total(tuple(choose(items, budget)))
    assert nbytes <= budget
    # No change of one or two tensors is better; of more, only where bytes hardly fit.
    worst = sum(max(c for _, c in table.values()) for table in tables)
    assert cost <= min(fitting) + 0.35 * worst + 1e-12


def test_uses_the_bytes_that_are_left() -> None:
    rng = np.random.default_rng(2)
    tables = []
    for _ in range(60):
        scale, size = rng.lognormal(0, 2), int(rng.integers(20, 400)) * 256
        tables.append({k: (int(k.bits_per_weight * size / 8), scale * size * 4.0**-k.bits_per_weight) for k in KINDS})
    items = [Item(table) for table in tables]
    budget = sum(table[T.Q4_K][0] for table in tables)
    chosen = choose(items, budget)
    used = sum(table[kind][0] for table, kind in zip(tables, chosen, strict=True))
    assert 0 <= budget - used < 0.002 * budget
    cost = sum(table[kind][1] for table, kind in zip(tables, chosen, strict=True))
    assert cost < 0.7 * sum(table[T.Q4_K][1] for table in tables)
    assert choose(items, 10**12) == [T.Q6_K] * 60


def test_candidates_fit_the_rows_and_the_bounds() -> None:
    wide, odd, tiny = (TensorInfo("x", (n, 4), T.BF16) for n in (512, 576, 20))
    found = candidates(wide, calibrated=True)
    assert found[-1] is T.BF16
    assert {T.IQ2_XXS, T.Q2_K, T.IQ4_XS, T.Q8_0} <= set(found)
    assert T.IQ1_S not in found
    assert T.IQ1_S in candidates(wide, calibrated=True, minimum=T.IQ1_S)
    assert all(n <= m for n, m in itertools.pairwise(kind.bits_per_weight for kind in found))
    assert not {T.IQ2_XXS, T.IQ3_XXS} & set(candidates(wide, calibrated=False))
    assert candidates(wide, calibrated=True, minimum=T.Q3_K, maximum=T.Q4_K) == [T.Q3_K, T.IQ3_S, T.IQ4_XS, T.Q4_K]
    assert set(candidates(odd, calibrated=True)) == {T.IQ4_NL, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.BF16}
    assert candidates(tiny, calibrated=True) == [T.BF16]
    assert T.Q4_K not in candidates(wide, calibrated=True, excluded=[T.Q4_K])
    assert SMALLEST.bits_per_weight <= min(kind.bits_per_weight for kind in found)


def test_engines() -> None:
    assert T.TQ1_0 in engine_lacks("vLLM")
    assert not engine_lacks("llama.cpp")
    with pytest.raises(QuantkitError, match=r"unknown engine 'x'; known: llama\.cpp, ollama, vllm"):
        engine_lacks("x")


def test_tied_tensors() -> None:
    names = [f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_q", "attn_k", "ffn_down")]
    assert tied(names, []) == [[name] for name in names]
    per_layer = tied(names, [r"blk\.(\d+)\.attn_[qk]"])
    assert per_layer == [names[:2], [names[2]], names[3:5], [names[5]]]
    assert [names[2], names[5]] in tied(names, ["ffn_down"])
    with pytest.raises(QuantkitError, match="not a regular expression"):
        tied(names, ["("])
    with pytest.raises(QuantkitError, match="no tensor whose type is chosen has 'ssm' in its name"):
        tied(names, ["ssm"])


@pytest.mark.parametrize(
    ("text", "nbytes", "bits", "like"),
    [
        ("5.2GB", 5_200_000_000, 0.0, None),
        ("700MiB", 700 << 20, 0.0, None),
        ("5g", 5_000_000_000, 0.0, None),
        ("123456", 123456, 0.0, None),
        ("4.5bpw", 0, 4.5, None),
        ("q4_k_m", 0, 0.0, "Q4_K_M"),
        ("Q4_K", 0, 0.0, "Q4_K_M"),
    ],
)
def test_targets(text: str, nbytes: int, bits: float, like: str | None) -> None:
    target = Target.parse(text)
    assert (target.nbytes, target.bits) == (nbytes, bits)
    assert (None if target.like is None else target.like.name) == like
    assert not re.search(r"[/\s]", target.mark)


@pytest.mark.parametrize("text", ["", "0", "0GB", "-5GB", "big", "5TB", "5.2.1GB", "nanGB", "Q9_K", "1e9"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(QuantkitError, match="not a size"):
        Target.parse(text)
