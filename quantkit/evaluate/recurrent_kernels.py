"""What recurrent layers do between their matrix products: fused, vectorised, without the GIL.

As in `norm_kernels`: each kernel runs on one thread over rows in order, and arrays are float32 and contiguous unless
said otherwise.
"""

from __future__ import annotations

import numpy as np

from quantkit.blocks.lane_memory import load, store
from quantkit.blocks.lanes import LANES, multiply_add, splat
from quantkit.compile.kernel import kernel
from quantkit.evaluate.row_pieces import exp

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@kernel
def convolve(
    x: np.ndarray, before: np.ndarray, taps: np.ndarray, bias: np.ndarray, silu: bool, out: np.ndarray
) -> None:
    """A causal convolution of each column of `x` [rows, channels] by itself: into `out`, of the same shape.

    Row i is the sum over j of taps[j] times the row that is len(taps) - 1 - j rows before; `before` holds the last ones
    before `x`. Then `bias` is added, and with `silu` each number is multiplied with its sigmoid.
    """
    size, n = taps.shape
    for i in range(x.shape[0]):
        to = out[i]
        for c in range(n):
            to[c] = _ZERO
        for j in range(size):
            at, tap = i + j - size + 1, taps[j]
            row = x[at] if at >= 0 else before[at + size - 1]
            for c in range(n):
                to[c] += tap[c] * row[c]
        for c in range(n):
            to[c] += bias[c]
        if silu:
            for c in range(n):
                to[c] /= _ONE + exp(-to[c])


# Columns of a head's matrix that go through a text together: they stay in the first-level cache.
TILE = 2 * LANES


@kernel
def recur(
    x: np.ndarray,
    at: tuple[int, int, int],
    decay: np.ndarray,
    share: np.ndarray,
    head: int,
    corrected: bool,
    state: np.ndarray,
    scratch: np.ndarray,
    out: np.ndarray,
    column: int,
) -> None:
    """One head of a linear recurrence: its matrix S, `state` [n, m], forgets, is added to, and is read.

    Each row of `x` [rows, any] holds a query q and a key k of n numbers and a value v of m, at the columns `at`. With
    d = decay[row, head] and b = share[row, head] the matrix becomes d S + k (b v), or with `corrected`
    d S + k (b (v - k d S)), and q S goes into `out` [rows, any], from `column` on. `scratch` is scratch of (n + 2) *
    TILE numbers.

    Columns of the matrix do not know of each other: a tile of them goes through all rows before the next.
    """
    n, m = state.shape
    query, key, value = at
    tile, held = scratch[: n * TILE], scratch[n * TILE :]
    for first in range(0, m, TILE):
        wide = min(TILE, m - first)
        tile[:] = _ZERO
        held[:] = _ZERO
        for i in range(n):
            for j in range(wide):
                tile[i * TILE + j] = state[i, first + j]
        for t in range(x.shape[0]):
            row, to = x[t], out[t]
            for j in range(wide):
                held[j] = row[value + first + j]
            d, b = splat(decay[t, head]), splat(share[t, head])
            left, right = load(held, 0), load(held, LANES)
            if corrected:
                known_left, known_right = splat(_ZERO), splat(_ZERO)
                for i in range(n):
                    k = splat(row[key + i])
                    known_left = multiply_add(load(tile, i * TILE), k, known_left)
                    known_right = multiply_add(load(tile, i * TILE + LANES), k, known_right)
                left, right = left - known_left * d, right - known_right * d
            left, right = left * b, right * b
            sum_left, sum_right = splat(_ZERO), splat(_ZERO)
            for i in range(n):
                k, q = splat(row[key + i]), splat(row[query + i])
                new_left = multiply_add(left, k, load(tile, i * TILE) * d)
                new_right = multiply_add(right, k, load(tile, i * TILE + LANES) * d)
                store(tile, i * TILE, new_left)
                store(tile, i * TILE + LANES, new_right)
                sum_left = multiply_add(new_left, q, sum_left)
                sum_right = multiply_add(new_right, q, sum_right)
            store(held, TILE, sum_left)
            store(held, TILE + LANES, sum_right)
            for j in range(wide):
                to[column + first + j] = held[TILE + j]
        for i in range(n):
            for j in range(wide):
                state[i, first + j] = tile[i * TILE + j]


@kernel
def select(
    x: np.ndarray, steps: np.ndarray, decay: np.ndarray, b: np.ndarray, c: np.ndarray, span: tuple[int, int],
    state: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """The channels of `span` of a selective state space: `state` [n, channels] decays, is added to, and is read.

    `x` and `steps` are [rows, channels], `b` and `c` [rows, n], `decay` [n, channels]. A row makes the state
    e^(step decay) state + b (step x), and the sum of c state goes into `out` [rows, channels].
    """
    first, stop = span
    for t in range(x.shape[0]):
        row, step, to = x[t], steps[t], out[t]
        for j in range(first, stop):
            to[j] = _ZERO
        for s in range(state.shape[0]):
            held, rate, bs, cs = state[s], decay[s], b[t, s], c[t, s]
            for j in range(first, stop):
                new = exp(step[j] * rate[j]) * held[j] + bs * (step[j] * row[j])
                held[j] = new
                to[j] += new * cs


@kernel
def multiply_silu(x: np.ndarray, gate: np.ndarray) -> None:
    """`x *= silu(gate)`, both [rows, n]."""
    for i in range(x.shape[0]):
        row, by = x[i], gate[i]
        for j in range(row.size):
            row[j] *= by[j] / (_ONE + exp(-by[j]))


@kernel
def remember(
    r: np.ndarray,
    decay: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    unit: np.ndarray,
    learned: np.ndarray,
    first: int,
    state: np.ndarray,
    seen: np.ndarray,
    out: np.ndarray,
) -> None:
    """RWKV 7's recurrence of one head, the columns from `first` on of all arrays [tokens, columns].

    `state` [keys, values] is S transposed: for each token it becomes diag(decay) S - learned (unit S) + k v, and `out`
    gets r S. `seen` has room for a row of it.
    """
    n = state.shape[0]
    for t in range(r.shape[0]):
        seen[:] = np.float32(0.0)
        for j in range(n):
            share = unit[t, first + j]
            for i in range(n):
                seen[i] += share * state[j, i]
        for i in range(n):
            out[t, first + i] = np.float32(0.0)
        for j in range(n):
            kept, learns, key, reads = decay[t, first + j], learned[t, first + j], k[t, first + j], r[t, first + j]
            for i in range(n):
                value = state[j, i] * kept + key * v[t, first + i] - seen[i] * learns
                state[j, i] = value
                out[t, first + i] += value * reads
