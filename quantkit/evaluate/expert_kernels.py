"""The choice of experts for each row, and the sum of what they make of it.

The kernels run over rows as those of norms do: see `norm_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.compile.kernel import allocating_kernel, allocating_piece, kernel, piece
from quantkit.evaluate.row_pieces import exp, row_maximum

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_NOTHING = np.float32(-np.inf)
# How `route` makes shares of logits.
SOFTMAX, SIGMOID, CHOSEN = 0, 1, 2
# What a sum of shares is at least when they are divided by it: float16's smallest normal number, as in llama.cpp.
_LEAST_SUM = np.float32(6.103515625e-5)


@piece
def _better(x: Any, y: Any) -> Any:
    """Whether x comes before y in a choice of the largest; what is not a number comes last."""
    return x > y or (y != y and x == x)


@allocating_piece
def _keep_best_groups(scores: Any, n_groups: int, n_kept: int) -> None:
    """Take those numbers of `scores` out of the choice that are in none of the groups with the best two numbers."""
    size = scores.size // n_groups
    sums = np.empty(n_groups, np.float32)
    for group in range(n_groups):
        first, second = _NOTHING, _NOTHING
        for e in range(group * size, (group + 1) * size):
            if scores[e] > first:
                first, second = scores[e], first
            elif scores[e] > second:
                second = scores[e]
        sums[group] = first + second if size > 1 else first
    for _ in range(n_groups - n_kept):
        worst = -1
        for group in range(n_groups):
            if sums[group] == sums[group] and (worst < 0 or sums[group] <= sums[worst]):
                worst = group
        scores[worst * size : (worst + 1) * size] = _NOTHING
        sums[worst] = np.nan


@allocating_kernel
def route(
    logits: np.ndarray,
    bias: np.ndarray,
    gating: int,
    groups: tuple[int, int],
    normalised: bool,
    scale: np.float32,
    chosen: np.ndarray,
    weights: np.ndarray,
) -> None:
    """The experts with the largest shares for each row, the first where they are equal, and their shares.

    `logits` is [rows, experts]; `chosen` (int32) and `weights`, [rows, experts used], get the experts and their shares:
    the softmax over all experts (`gating` SOFTMAX), the sigmoid of each (SIGMOID) or the softmax over the chosen
    (CHOSEN); made to sum to one if `normalised`, then times `scale`. `bias` [experts], unless it is empty, is added to
    shares for the choice alone. `groups` is into how many groups experts fall, and how many of these take part: those
    whose two largest sum highest. What is not a number is never chosen before a number is.
    """
    n_used, n = chosen.shape[1], logits.shape[1]
    shares, scores = np.empty(n, np.float32), np.empty(n, np.float32)
    plain = not bias.size and groups[0] == 1
    for i in range(logits.shape[0]):
        row = logits[i]
        peak, total = row_maximum(row, n), _ZERO
        for e in range(n):
            if gating == SIGMOID:
                shares[e] = _ONE / (_ONE + exp(-row[e]))
            else:
                shares[e] = exp(row[e] - peak)
                total += shares[e]
        for e in range(n):
            if gating == SOFTMAX:
                shares[e] /= total
            # Logits are in the order of their shares, and do not become equal where these underflow.
            scores[e] = row[e] if plain or gating == CHOSEN else shares[e]
            if bias.size:
                scores[e] += bias[e]
        if groups[0] > groups[1]:
            _keep_best_groups(scores, groups[0], groups[1])
        for rank in range(n_used):
            best = -1
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                if not taken and (best < 0 or _better(scores[e], scores[best])):
                    best = e
            chosen[i, rank] = best
        if gating == CHOSEN or (gating == SOFTMAX and normalised and plain):
            peak, total = row[chosen[i, 0]], _ZERO
            for rank in range(n_used):
                peak = max(peak, row[chosen[i, rank]])
            for rank in range(n_used):
                weights[i, rank] = exp(row[chosen[i, rank]] - peak)
                total += weights[i, rank]
        else:
            total = _ZERO
            for rank in range(n_used):
                weights[i, rank] = shares[chosen[i, rank]]
                total += weights[i, rank]
            total = max(total, _LEAST_SUM) if normalised else _ONE
        for rank in range(n_used):
            weights[i, rank] = weights[i, rank] / total * scale


@kernel
def route_sparsely(logits: np.ndarray, tolerance: np.float32, chosen: np.ndarray, weights: np.ndarray) -> None:
    """The experts with the largest logits for each row, and their shares, as the sparse mixer gives them.

    Of each the share is the softmax over those that are not chosen before it and whose logits are at most `tolerance`
    below its own, of the larger of its own and their magnitude. Arrays as those of `route`.
    """
    n_used, n = chosen.shape[1], logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        for rank in range(n_used):
            best, total = -1, _ZERO
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                if not taken and (best < 0 or _better(row[e], row[best])):
                    best = e
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                below = row[best] - row[e]
                if not taken and not below / max(abs(row[e]), row[best]) > tolerance:
                    total += exp(-below)
            chosen[i, rank] = best
            weights[i, rank] = _ONE / total


@kernel
def add_gated(x: np.ndarray, gate: np.ndarray, out: np.ndarray) -> None:
    """`out += sigmoid(gate) * x`: rows of [any, n], with one number of `gate` [any, 1] for each."""
    for i in range(x.shape[0]):
        row, to, share = x[i], out[i], _ONE / (_ONE + exp(-gate[i, 0]))
        for j in range(row.size):
            to[j] += share * row[j]


@kernel
def add_rows(x: np.ndarray, rows: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """`out[rows[i]] += weights[i] * x[i]`, of [any, n]."""
    for i in range(rows.size):
        row, to, weight = x[i], out[rows[i]], weights[i]
        for j in range(row.size):
            to[j] += weight * row[j]
