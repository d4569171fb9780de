"""The kernels of recurrent layers against the same written plainly in float64, and in pieces as at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.evaluate import recurrent_kernels as kernels

FEW = settings(max_examples=25, deadline=None)


def some(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@FEW
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_a_convolution_in_pieces(n: int, n_channels: int, size: int, cut: int, silu: bool) -> None:
    x, taps, bias = some(1, n, n_channels), some(2, size, n_channels), some(3, n_channels)
    padded = np.concatenate([np.zeros((size - 1, n_channels)), x.astype(np.float64)])
    expected = np.stack([(padded[i : i + size] * taps).sum(0) for i in range(n)]) + bias
    if silu:
        expected *= sigmoid(expected)
    out, cut = np.empty_like(x), min(cut, n)
    before = padded[cut : cut + size - 1].astype(np.float32)
    kernels.convolve(x[:cut], np.zeros((size - 1, n_channels), np.float32), taps, bias, silu, out[:cut])
    kernels.convolve(x[cut:], before, taps, bias, silu, out[cut:])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@FEW
@given(st.integers(0, 7), st.integers(1, 19), st.integers(1, 70), st.integers(0, 7), st.booleans())
def test_a_recurrence_in_pieces(rows: int, n: int, m: int, cut: int, corrected: bool) -> None:
    """Heads of any size, beside another's numbers, which stay as they are."""
    x, out = some(4, rows, 2 * n + m + 3), np.zeros((rows, m + 2), np.float32)
    decay, share = sigmoid(some(5, rows, 2)), sigmoid(some(6, rows, 2))
    state = some(7, n, m)
    places, scratch = (n, 0, 2 * n + 3), np.empty((n + 2) * kernels.TILE, np.float32)
    matrix, expected = state.astype(np.float64), np.zeros((rows, m))
    for t in range(rows):
        k, q, v = x[t, :n].astype(np.float64), x[t, n : 2 * n].astype(np.float64), x[t, 2 * n + 3 :].astype(np.float64)
        matrix *= decay[t, 1]
        matrix += np.outer(k, share[t, 1] * (v - k @ matrix if corrected else v))
        expected[t] = q @ matrix
    for part in (slice(0, min(cut, rows)), slice(min(cut, rows), rows)):
        kernels.recur(x[part], places, decay[part], share[part], 1, corrected, state, scratch, out[part], 1)
    bound = 1e-4 * max(1.0, np.abs(expected).max(initial=0.0), np.abs(matrix).max())
    np.testing.assert_allclose(out[:, 1:-1], expected, atol=bound)
    np.testing.assert_allclose(state, matrix, atol=bound)
    assert not out[:, [0, -1]].any()


@pytest.mark.parametrize("span", [(0, 40), (5, 23)])
def test_a_selective_state_space(span: tuple[int, int]) -> None:
    x, steps, decay = some(8, 11, 40), np.abs(some(9, 11, 40)), -np.abs(some(10, 6, 40))
    b, c, state, out = some(11, 11, 6), some(12, 11, 6), some(13, 6, 40), np.zeros((11, 40), np.float32)
    held, expected = state.astype(np.float64), np.zeros((11, 40))
    for t in range(11):
        held = np.exp(steps[t] * decay.astype(np.float64)) * held + b[t][:, None] * (steps[t] * x[t])
        expected[t] = c[t] @ held
    first, stop = span
    kernels.select(x, steps, decay, b, c, span, state, out)
    np.testing.assert_allclose(out[:, first:stop], expected[:, first:stop], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[:, first:stop], held[:, first:stop], rtol=1e-4, atol=1e-5)
    assert not out[:, :first].any() and not out[:, stop:].any()


def test_a_gate() -> None:
    x, gate = some(14, 3, 37), 5 * some(15, 3, 37)
    expected = x * gate * sigmoid(gate.astype(np.float64))
    kernels.multiply_silu(x, gate)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_what_rwkv_remembers_is_its_definition() -> None:
    rng = np.random.default_rng(8)
    n, heads, size = 21, 2, 20
    shape = n, heads * size
    r, k, v, unit, learned = (rng.standard_normal(shape).astype(np.float32) * 0.3 for _ in range(5))
    decay = rng.uniform(0.5, 1, shape).astype(np.float32)
    start = rng.standard_normal((heads, size, size)).astype(np.float32)
    out, state = np.empty(shape, np.float32), start.copy()
    for head in range(heads):
        scratch = np.empty(size, np.float32)
        kernels.remember(r, decay, k, v, unit, learned, head * size, state[head], scratch, out)
        s = start[head].T.astype(np.float64)  # [values, keys]
        mine = slice(head * size, (head + 1) * size)
        for t in range(n):
            rt, dt, kt, vt, ut, lt = (x[t, mine].astype(np.float64) for x in (r, decay, k, v, unit, learned))
            s = s * dt - np.outer(s @ ut, lt) + np.outer(vt, kt)
            np.testing.assert_allclose(out[t, mine], s @ rt, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[head], s.T, rtol=1e-4, atol=1e-5)
