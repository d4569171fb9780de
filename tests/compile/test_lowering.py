"""What kernels are written in means what it means in Python: the short LLVM code for it, and constants of pieces."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from quantkit.blocks.lane_memory import scratch
from quantkit.compile.kernel import allocating_kernel, kernel, piece

EDGES = [-(2**63), -(2**63) + 1, -17, -16, -8, -3, -2, -1, 0, 1, 2, 3, 8, 16, 17, 2**63 - 1]


@kernel
def visit(start: int, stop: int, step: int, out: np.ndarray) -> int:
    n = 0
    for i in range(start, stop, step):
        out[n] = i
        n += 1
    return n


@kernel
def visit_by_three(start: int, stop: int, out: np.ndarray) -> int:
    n = 0
    for i in range(start, stop, 3):
        out[n] = i
        n += 1
    for i in range(stop):
        out[n] = i
        n += 1
    return n


@pytest.mark.parametrize("step", [-5, -3, -1, 1, 2, 3, 16])
def test_ranges(step: int) -> None:
    out = np.zeros(200, np.int64)
    for start in (-7, 0, 4):
        for stop in (-20, -7, -6, 0, 3, 4, 5, 33):
            n = visit(start, stop, step, out)
            assert out[:n].tolist() == list(range(start, stop, step))
            n = visit_by_three(start, stop, out)
            assert out[:n].tolist() == [*range(start, stop, 3), *range(stop)]


def test_a_step_of_zero_ends_at_once() -> None:
    assert visit(0, 5, 0, np.zeros(1, np.int64)) == 0


@kernel
def divide(a: int, b: int, out: np.ndarray) -> None:
    out[0], out[1] = a // b, a % b
    out[2], out[3], out[4], out[5] = a // 8, a % 8, a // 1, a % 1
    out[6], out[7], out[8], out[9] = a // 3, a % 3, a // -8, a % -8


@pytest.mark.parametrize("a", EDGES)
def test_division_rounds_down(a: int) -> None:
    out = np.zeros(10, np.int64)
    for b in EDGES:
        divide(a, b, out)
        none = b == 0 or (a, b) == (EDGES[0], -1)  # neither has an answer: numba's is 0
        assert out[:2].tolist() == ([0, 0] if none else [a // b, a % b])
        assert out[2:].tolist() == [number for d in (8, 1, 3, -8) for number in (a // d, a % d)]


@kernel
def move(x: np.ndarray, out: np.ndarray, at: int, to: int) -> None:
    out[to] = x[at]
    out[-1] = x[-2] + 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int32])
def test_negative_indices_count_from_the_end(dtype: type) -> None:
    x = np.arange(5).astype(dtype)
    for at in range(-5, 5):
        for to in range(-5, 4):
            out, expected = np.zeros(5, np.int16), np.zeros(5, np.int16)
            expected[to], expected[-1] = x[at], x[-2] + 1
            move(x, out, at, to)
            assert out.tolist() == expected.tolist()


@piece
def filled(n: int, value: int) -> int:
    space = scratch(np.int32, n)
    for i in range(16 * n):
        space[i] = value
    return space[16 * n - 1]


@kernel
def fill_twice() -> int:
    return filled(1, 5) + filled(2, 6)


def test_a_piece_gets_the_constants_that_it_needs() -> None:
    assert fill_twice() == 11


@allocating_kernel
def doubled(x: np.ndarray) -> np.ndarray:
    out = np.empty(x.size, np.float32)
    for i in range(x.size):
        out[i] = 2 * x[i]
    return out


def test_arrays_that_a_kernel_makes_live_as_long_as_they_are_used() -> None:
    made = [doubled(np.full(1000, i, np.float32)) for i in range(100)]
    assert [float(a[-1]) for a in made] == [2.0 * i for i in range(100)]
    assert sys.getrefcount(made[0]) <= 3


def test_kernels_take_no_references() -> None:
    x, out = np.zeros(5, np.float32), np.zeros(5, np.int16)
    before = sys.getrefcount(x)
    for _ in range(10):
        move(x, out, 0, 0)
    assert sys.getrefcount(x) == before
