"""What a forward pass does between its matrix products: fused, vectorised, holding no lock.

Each kernel runs over all rows that it is given, on one thread; threads share work by taking different rows. Arrays are
float32 and contiguous unless said otherwise. Sums run in sixteen lanes, so they round like short sums, and the same on
every machine; fastmath stays off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantkit.blocks.lanes import get, load, splat
from quantkit.kernels import kernel, piece

_ZERO, _ONE, _LOWEST, _HIGHEST = np.float32(0.0), np.float32(1.0), np.float32(-87.0), np.float32(88.0)
_TWO = np.float32(2.0)
_LOG2_E, _MAGIC = np.float32(math.log2(math.e)), np.float32(12582912.0)
# ln 2 in two parts. The first has few bits, so its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
# (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, interpolated at 400 Chebyshev nodes: relative error of e^r under 4e-9.
_C0, _C1, _C2, _C3, _C4 = (
    np.float32(c) for c in (0.5, 0.16666574776172638, 0.041666459292173386, 0.00836347509175539, 0.0013934092130512)
)
# -2 sqrt(2 / pi), and that times 0.044715.
_GELU_LINEAR = np.float32(-2.0 * math.sqrt(2.0 / math.pi))
_GELU_CUBIC = np.float32(-2.0 * math.sqrt(2.0 / math.pi) * 0.044715)
_MIN_INT = np.int32(-2147483648)


@piece
def exp(x: Any) -> Any:
    """e^x in float32 with a relative error under 1.5e-7, for x in [-87, 88]; beyond, the value at that end; NaN is NaN.

    The exponent is rounded by adding 1.5 * 2^23, which leaves it in the low bits of the sum; a polynomial does the
    rest. LLVM vectorises loops over this.
    """
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    shifted = x * _LOG2_E + _MAGIC
    n = shifted - _MAGIC
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = (((_C4 * r + _C3) * r + _C2) * r + _C1) * r + _C0
    power = np.int32((np.float32(shifted).view(np.int32) << 23) + (127 << 23))
    return (p * r * r + r + _ONE) * np.int32(power).view(np.float32)


@piece
def _sum(x: Any, n: int) -> float:
    """The sum of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // 16 * 16
    for j in range(0, whole, 16):
        lanes = lanes + load(x, j)
    total = 0.0
    for j in range(16):
        total += get(lanes, j)
    for j in range(whole, n):
        total += x[j]
    return total


@piece
def _sum_squares(x: Any, n: int) -> float:
    """The sum of the squares of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // 16 * 16
    for j in range(0, whole, 16):
        v = load(x, j)
        lanes = lanes + v * v
    total = 0.0
    for j in range(16):
        total += get(lanes, j)
    for j in range(whole, n):
        total += np.float64(x[j]) * np.float64(x[j])
    return total


@piece
def _maximum(x: Any, n: int) -> Any:
    """The largest of the first `n` numbers of a row, NaN aside.

    Compared as integers of the same order, since LLVM vectorises the maximum of integers without fastmath.
    """
    largest = _MIN_INT
    for j in range(n):
        bits = np.float32(x[j]).view(np.int32)
        key = np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        largest = key if key > largest else largest
    bits = np.int32(largest ^ ((largest >> 31) & 0x7FFFFFFF))
    return np.int32(bits).view(np.float32)


@kernel
def exponentials(x: np.ndarray, out: np.ndarray) -> None:
    """`exp` of every number of 1-D `x`."""
    for j in range(x.size):
        out[j] = exp(x[j])


@kernel
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` over their root mean square, times `weight`: [rows, n] to [rows, n]."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        scale = np.float32(1.0 / math.sqrt(_sum_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` less their mean, over their standard deviation, times `weight`, plus `bias`: [rows, n] to same."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        mean = np.float32(_sum(row, n) / n)
        for j in range(n):
            to[j] = row[j] - mean
        scale = np.float32(1.0 / math.sqrt(_sum_squares(to, n) / n + eps))
        for j in range(n):
            to[j] = to[j] * scale * weight[j] + bias[j]


@kernel
def rms_norm_columns(x: np.ndarray, first: int, count: int, weight: np.ndarray, eps: float) -> None:
    """`rms_norm` in place of `count` vectors that stand side by side in every row of `x`, from column `first` on."""
    size = weight.size
    for i in range(x.shape[0]):
        for at in range(first, first + count * size, size):
            part = x[i, at : at + size]
            scale = np.float32(1.0 / math.sqrt(_sum_squares(part, size) / size + eps))
            for j in range(size):
                part[j] = part[j] * scale * weight[j]


@kernel
def add(x: np.ndarray, branch: np.ndarray) -> None:
    """`x += branch`, both [rows, n]."""
    for i in range(x.shape[0]):
        row, other = x[i], branch[i]
        for j in range(row.size):
            row[j] += other[j]


@kernel
def add_rms_norm(x: np.ndarray, branch: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """`x += branch`, then `rms_norm` of x into `out`; all [rows, n]."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, other, to = x[i], branch[i], out[i]
        for j in range(n):
            row[j] += other[j]
        scale = np.float32(1.0 / math.sqrt(_sum_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def add_bias(x: np.ndarray, bias: np.ndarray) -> None:
    """`x += bias` in every row of [rows, n]."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] += bias[j]


@kernel
def split_heads(
    x: np.ndarray,
    first: int,
    cos: np.ndarray,
    sin: np.ndarray,
    start: int,
    neighbours: bool,
    scale: np.float32,
    out: np.ndarray,
) -> None:
    """Take heads out of the rows of a product, rotate them by their position and multiply them by `scale`.

    `x` is [rows, any]: the heads stand side by side from column `first` on. `out` is [groups, positions, heads of a
    group, head size]; row i goes to position `start` + i. `cos` and `sin` are [positions, pairs]; no pairs, no
    rotation. Pairs are neighbours, or stand half the rotated part apart.
    """
    groups, _, heads, size = out.shape
    pairs = cos.shape[1]
    for i in range(x.shape[0]):
        c, s = cos[start + i], sin[start + i]
        at = first
        for group in range(groups):
            for head in range(heads):
                row, to = x[i, at : at + size], out[group, start + i, head]
                at += size
                if neighbours:
                    for j in range(pairs):
                        a, b = row[2 * j], row[2 * j + 1]
                        to[2 * j] = (a * c[j] - b * s[j]) * scale
                        to[2 * j + 1] = (a * s[j] + b * c[j]) * scale
                else:
                    for j in range(pairs):
                        a, b = row[j], row[j + pairs]
                        to[j] = (a * c[j] - b * s[j]) * scale
                        to[j + pairs] = (a * s[j] + b * c[j]) * scale
                for j in range(2 * pairs, size):
                    to[j] = row[j] * scale


@piece
def _capped(x: Any, cap: Any, twice: Any) -> Any:
    """cap * tanh(x / cap), where `twice` is 2 / cap; absolute error under 2e-7 * cap."""
    return cap - (cap + cap) / (exp(x * twice) + _ONE)


@kernel
def soft_cap(x: np.ndarray, cap: np.float32) -> None:
    """Every number x of [rows, n] to cap * tanh(x / cap), in place."""
    twice = _TWO / cap
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] = _capped(row[j], cap, twice)


@kernel
def causal_softmax(
    scores: np.ndarray, heads: int, first_query: int, first_key: int, window: int, cap: np.float32, sums: np.ndarray
) -> None:
    """Scores to exponentials less the row's maximum, in place, and their sums: softmax but for the division.

    `scores` is [queries * heads, keys]: `heads` rows for each query from position `first_query` on, and the keys from
    position `first_key` on. A query sees the `window` keys that end with its own; the others become 0. Unless `cap` is
    0 scores are bent by `soft_cap` first. `sums` is [queries * heads].
    """
    n_keys = scores.shape[1]
    twice = _TWO / cap if cap > _ZERO else _ZERO
    for i in range(scores.shape[0]):
        query = first_query + i // heads
        stop = min(query - first_key + 1, n_keys)
        start = max(0, query - window + 1 - first_key)
        row = scores[i]
        seen = row[start:stop]
        if cap > _ZERO:
            for j in range(seen.size):
                seen[j] = _capped(seen[j], cap, twice)
        largest = _maximum(seen, seen.size)
        for j in range(seen.size):
            seen[j] = exp(seen[j] - largest)
        sums[i] = np.float32(_sum(seen, seen.size))
        row[:start] = _ZERO
        row[stop:] = _ZERO


@kernel
def merge_heads(x: np.ndarray, sums: np.ndarray, out: np.ndarray, column: int) -> None:
    """Finish softmax and put heads side by side: x[query * heads + h] / sums into out[query], head h from `column` on.

    `x` is [queries * heads, head size], `out` [queries, any].
    """
    size = x.shape[1]
    heads = x.shape[0] // out.shape[0]
    for i in range(x.shape[0]):
        at = column + i % heads * size
        row, to = x[i], out[i // heads, at : at + size]
        scale = _ONE / sums[i]
        for j in range(size):
            to[j] = row[j] * scale


@kernel
def silu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`silu(gate) * up`: rows of gate's n numbers and then up's n to rows of n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            to[j] = gate[j] / (_ONE + exp(-gate[j])) * up[j]


@piece
def _gelu(x: Any) -> Any:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016): x / (1 + e^-2u), which is x (1 + tanh u) / 2."""
    return x / (_ONE + exp(x * (_GELU_LINEAR + _GELU_CUBIC * x * x)))


@kernel
def gelu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`gelu(gate) * up`: rows of gate's n numbers and then up's n to rows of n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            to[j] = _gelu(gate[j]) * up[j]


@kernel
def gelu(x: np.ndarray, out: np.ndarray) -> None:
    """`gelu(x)`: rows of n to rows of n."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            to[j] = _gelu(row[j])


@kernel
def route(logits: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> None:
    """The experts with the largest logits for each row, the first where they are equal, and their shares.

    `logits` is [rows, experts]; `chosen` (int32) and `weights`, [rows, experts used], get the experts and the softmax
    over all experts, made to sum to one over the chosen. What is not a number is never chosen before a number is.
    """
    n_used = chosen.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        for rank in range(n_used):
            best = -1
            for e in range(row.size):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                if not taken and (best < 0 or row[e] > row[best] or row[best] != row[best]):
                    best = e
            chosen[i, rank] = best
        total = _ZERO
        for rank in range(n_used):
            weights[i, rank] = exp(row[chosen[i, rank]] - row[chosen[i, 0]])
            total += weights[i, rank]
        for rank in range(n_used):
            weights[i, rank] /= total


@kernel
def add_rows(x: np.ndarray, rows: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """`out[rows[i]] += weights[i] * x[i]`, of [any, n]."""
    for i in range(rows.size):
        row, to, weight = x[i], out[rows[i]], weights[i]
        for j in range(row.size):
            to[j] += weight * row[j]


@kernel
def score_tile(
    logits: np.ndarray,
    first: int,
    targets: np.ndarray,
    maxima: np.ndarray,
    sums: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Take one tile of the vocabulary into the log-likelihood of each row's target token.

    `logits` is [rows, tile], of the tokens from `first` on. `maxima` and `sums` (float64, begun with -inf and 0) hold
    each row's running maximum and sum of exponentials less that maximum, `chosen` (float64) the target's logit.
    The log-likelihood is chosen - maximum - ln(sum) after the last tile.
    """
    n = logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        target = targets[i] - first
        if 0 <= target < n:
            chosen[i] = row[target]
        largest = max(np.float64(_maximum(row, n)), maxima[i])
        shift = np.float32(largest)
        for j in range(n):
            row[j] = exp(row[j] - shift)
        sums[i] = sums[i] * math.exp(maxima[i] - largest) + _sum(row, n)
        maxima[i] = largest
