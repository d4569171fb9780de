"""Recurrences in chunks through torch, against the recurrences as they are defined, token by token in float64."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires_torch

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = requires_torch

# Around the ends of chunks, of 64 tokens or 32.
LENGTHS = [1, 31, 33, 64, 65, 150]


def random(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(found, expected: np.ndarray) -> None:
    """Sums of hundreds of products in float32: each is off by 6e-8 of the largest."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def single(*arrays: np.ndarray) -> list:
    return [torch.from_numpy(array.astype(np.float32)) for array in arrays]


def as_single(*arrays: np.ndarray) -> list[np.ndarray]:
    """The values that the arrays have in float32."""
    return [array.astype(np.float32).astype(np.float64) for array in arrays]


@pytest.mark.parametrize("n_ctx", LENGTHS)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("forgets", [0.0, 0.1, 5.0, "now and then"])
def test_matrices(n_ctx: int, corrected: bool, forgets) -> None:
    from quantkit.evaluate.torch_scans import recur

    n_seq, groups, heads, n, m = 2, 2, 3, 8, 5
    q, k, v, rates, shares = random(
        n_ctx, (n_seq, groups, n_ctx, n), (n_seq, groups, n_ctx, n), (n_seq, groups, heads, n_ctx, m),
        (n_seq, groups, heads, n_ctx), (n_seq, groups, heads, n_ctx),
    )  # fmt: skip
    k /= np.linalg.norm(k, axis=3, keepdims=True)
    if forgets == "now and then":
        # What comes after a token that forgets all is not blurred by how much that was.
        log_decay = np.where(np.abs(rates) > 2, -3e4, -0.01 * np.abs(rates))
    else:
        log_decay = -forgets * np.abs(rates)
    q, k, v, log_decay, share = as_single(q, k, v, log_decay, 1 / (1 + np.exp(-shares)))
    expected = np.empty(v.shape)
    for b, g, h in np.ndindex(n_seq, groups, heads):
        state = np.zeros((n, m))
        for t in range(n_ctx):
            state *= np.exp(log_decay[b, g, h, t])
            known = k[b, g, t] @ state if corrected else 0
            state += np.outer(k[b, g, t], share[b, g, h, t] * (v[b, g, h, t] - known))
            expected[b, g, h, t] = q[b, g, t] @ state
    assert_close(recur(*single(q, k, v, log_decay, share), corrected), expected)


@pytest.mark.parametrize("n_ctx", LENGTHS)
@pytest.mark.parametrize("together", [1, 7, 1000])
def test_selective_states(monkeypatch, n_ctx: int, together: int) -> None:
    from quantkit.evaluate import torch_scans

    n_seq, n_channels, n = 2, 6, 4
    monkeypatch.setitem(torch_scans._STATES, "cpu", together * n_seq * n_channels * n)
    x, steps, decay, b, c = random(
        n_ctx, (n_seq, n_ctx, n_channels), (n_seq, n_ctx, n_channels), (n_channels, n), (n_seq, n_ctx, n),
        (n_seq, n_ctx, n),
    )  # fmt: skip
    x, steps, decay, b, c = as_single(x, np.abs(steps), -np.abs(decay), b, c)
    state, expected = np.zeros((n_seq, n_channels, n)), np.empty(x.shape)
    for t in range(n_ctx):
        step = steps[:, t, :, None]
        state = np.exp(step * decay) * state + b[:, t, None] * step * x[:, t, :, None]
        expected[:, t] = (state * c[:, t, None]).sum(2)
    assert_close(torch_scans.select(*single(x, steps, decay, b, c)), expected)


@pytest.mark.parametrize("n_ctx", LENGTHS)
@pytest.mark.parametrize("forgets", [0.0, 0.1, 1.0])
def test_what_rwkv_remembers(n_ctx: int, forgets: float) -> None:
    from quantkit.evaluate.torch_scans import remember

    n_seq, n_head, n = 2, 3, 8
    r, rates, k, v, unit, learned = random(n_ctx, *[(n_seq, n_head, n_ctx, n)] * 6)
    unit /= np.linalg.norm(unit, axis=3, keepdims=True)
    # A decay is at least e^-e^-0.5.
    log_decay = -np.exp(-0.5) * forgets / (1 + np.exp(-5 * rates))
    r, log_decay, k, v, unit, learned = as_single(r, log_decay, k, v, unit, unit / (1 + np.exp(-learned)))
    expected = np.empty(v.shape)
    for b, h in np.ndindex(n_seq, n_head):
        state = np.zeros((n, n))
        for t in range(n_ctx):
            seen = unit[b, h, t] @ state
            kept = np.exp(log_decay[b, h, t])[:, None] * state
            state = kept - np.outer(learned[b, h, t], seen) + np.outer(k[b, h, t], v[b, h, t])
            expected[b, h, t] = r[b, h, t] @ state
    assert_close(remember(*single(r, log_decay, k, v, unit, learned)), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_convolutions_are_the_kernels(size: int, silu: bool) -> None:
    from quantkit.evaluate import recurrent_kernels
    from quantkit.evaluate.torch_scans import convolve

    x, taps, bias = (each.astype(np.float32) for each in random(size, (2, 9, 5), (5, size), (5,)))
    expected = np.empty_like(x)
    for seq in range(2):
        before = np.zeros((size - 1, 5), np.float32)
        recurrent_kernels.convolve(x[seq], before, np.ascontiguousarray(taps.T), bias, silu, expected[seq])
    assert_close(convolve(*(torch.from_numpy(each) for each in (x, taps, bias)), silu), expected)
