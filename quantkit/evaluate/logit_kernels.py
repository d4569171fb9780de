"""What is made of logits: likelihoods, comparison of two models' tile by tile, and their packing into 16 bits.

The kernels run over rows as those of norms do: see `norm_kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantkit.blocks.lane_memory import scratch
from quantkit.blocks.lanes import LANES
from quantkit.compile.kernel import kernel, piece
from quantkit.evaluate.row_pieces import capped, exp, row_maximum, row_sum

# Tokens that are taken together: little enough for the first-level cache, and for short float32 sums.
_PIECE = 512
_PIECE_VECTORS = _PIECE // LANES
TOP = 5
# Columns of the comparison's state: running maximum and sum of exponentials of each model, the sum of the base's
# exponentials times the difference of the logits, and the target's logits.
MAX, SUM, BASE_MAX, BASE_SUM, WEIGHTED, CHOSEN, BASE_CHOSEN, N_STATE = range(8)

_MAGIC = np.float32(12582912.0)
_SIXTEEN, _CODES, _LIKELY = np.float32(16.0), np.float32(65535.0), np.float32(-16.0)
_FAR = np.float32(1000.0)


@kernel
def soft_cap(x: np.ndarray, cap: np.float32) -> None:
    """Every number x of [rows, n] to cap * tanh(x / cap), in place."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] = capped(row[j], cap)


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
        largest = max(np.float64(row_maximum(row, n)), maxima[i])
        shift = np.float32(largest)
        for j in range(n):
            row[j] = exp(row[j] - shift)
        sums[i] = sums[i] * math.exp(maxima[i] - largest) + row_sum(row, n)
        maxima[i] = largest


@piece
def _keep_top(row: Any, first: int, values: Any, ids: Any) -> None:
    """Take the numbers of `row`, of the tokens from `first` on, into the `TOP` largest, in falling order."""
    for j in range(row.size):
        v = row[j]
        if v > values[TOP - 1]:
            k = TOP - 1
            while k > 0 and v > values[k - 1]:
                values[k], ids[k] = values[k - 1], ids[k - 1]
                k -= 1
            values[k], ids[k] = v, first + j


@kernel
def compare_tile(
    q: np.ndarray,
    b: np.ndarray,
    first: int,
    targets: np.ndarray,
    state: np.ndarray,
    values: np.ndarray,
    ids: np.ndarray,
) -> None:
    """Take one tile of the vocabulary into the comparison of a model's logits with a base's.

    `q` and `b` are [rows, tile], of the tokens from `first` on. `state` is float64 [rows, N_STATE], begun with -inf for
    the maxima and 0; `values` and `ids` (int32) are [rows, 2, TOP], begun with -inf and -1: the largest logits of the
    model and of the base, and their tokens. The sums are those of Kullback and Leibler's divergence
    `WEIGHTED / BASE_SUM - (BASE_MAX + ln BASE_SUM) + (MAX + ln SUM)`.
    """
    n = q.shape[1]
    powers, weighted = scratch(np.float32, _PIECE_VECTORS), scratch(np.float32, _PIECE_VECTORS)
    for i in range(q.shape[0]):
        s = state[i]
        target = targets[i] - first
        if 0 <= target < n:
            s[CHOSEN], s[BASE_CHOSEN] = q[i, target], b[i, target]
        for at in range(0, n, _PIECE):
            size = min(_PIECE, n - at)
            x, y = q[i, at : at + size], b[i, at : at + size]
            largest, base_largest = row_maximum(x, size), row_maximum(y, size)
            if largest > values[i, 0, TOP - 1]:
                _keep_top(x, first + at, values[i, 0], ids[i, 0])
            if base_largest > values[i, 1, TOP - 1]:
                _keep_top(y, first + at, values[i, 1], ids[i, 1])
            # Negated, so that a NaN comes through.
            if not largest <= s[MAX]:
                s[SUM] *= math.exp(s[MAX] - largest)
                s[MAX] = largest
            if not base_largest <= s[BASE_MAX]:
                less = math.exp(s[BASE_MAX] - base_largest)
                s[BASE_SUM] *= less
                s[WEIGHTED] *= less
                s[BASE_MAX] = base_largest
            shift, base_shift = np.float32(s[MAX]), np.float32(s[BASE_MAX])
            for j in range(size):
                powers[j] = exp(x[j] - shift)
            s[SUM] += row_sum(powers, size)
            for j in range(size):
                p = exp(y[j] - base_shift)
                powers[j] = p
                weighted[j] = p * (y[j] - x[j])
            s[BASE_SUM] += row_sum(powers, size)
            s[WEIGHTED] += row_sum(weighted, size)


@kernel
def unpack(affine: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """16-bit log-probabilities to float32: `affine` is [rows, 2] of scales and minima, `codes` uint16 [rows, n].

    Those of -16 or less, which llama-perplexity leaves out of its sums, come 1000 lower, so that they weigh nothing.
    """
    for i in range(codes.shape[0]):
        scale, least = affine[i, 0], affine[i, 1]
        row, to = codes[i], out[i]
        for j in range(row.size):
            v = scale * np.float32(row[j]) + least
            to[j] = v if v > _LIKELY else v - _FAR


@kernel
def pack(logits: np.ndarray, targets: np.ndarray, affine: np.ndarray, codes: np.ndarray, nll: np.ndarray) -> None:
    """Logits to 16-bit log-probabilities, in llama-perplexity's order of operations.

    `logits` is [rows, n]; `affine` [rows, 2] gets scales and minima, `codes` (uint16) [rows, n]. The codes cover at
    most 16 below the largest logit. `nll` (float64 [rows]) gets the negative log-likelihoods of `targets`.
    """
    n = logits.shape[1]
    powers = scratch(np.float32, _PIECE_VECTORS)
    for i in range(logits.shape[0]):
        row, to = logits[i], codes[i]
        largest = row_maximum(row, n)
        least = largest
        for j in range(n):
            least = row[j] if row[j] < least else least
        least = max(least, np.float32(largest - _SIXTEEN))
        total = 0.0
        for at in range(0, n, _PIECE):
            size = min(_PIECE, n - at)
            for j in range(size):
                powers[j] = exp(row[at + j] - largest)
            total += row_sum(powers, size)
        log_total = math.log(total)
        scale = np.float32(np.float32(largest - least) / _CODES)
        affine[i, 0] = scale
        affine[i, 1] = np.float32(np.float32(least - largest) - np.float32(log_total))
        nll[i] = np.float64(largest) + log_total - np.float64(row[targets[i]])
        if scale > 0:
            inverse = np.float32(np.float32(1.0) / scale)
            for j in range(n):
                # Adding 1.5 * 2^23 rounds to even and leaves the integer in the low bits.
                bits = np.float32(inverse * np.float32(row[j] - least) + _MAGIC).view(np.int32)
                code = (bits & 0x7FFFFF) - 0x400000
                to[j] = code if row[j] > least else 0
        else:
            to[:] = 0
