"""Norms of rows, and what is added to them.

As all kernels of a forward pass, each runs over all rows that it is given, on one thread; threads share work by taking
different rows. Arrays are float32 and contiguous unless said otherwise.
"""

from __future__ import annotations

import math

import numpy as np

from quantkit.compile.kernel import kernel
from quantkit.evaluate.row_pieces import row_squares, row_sum


@kernel
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` over their root mean square, times `weight`: [rows, n] to [rows, n]."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        scale = np.float32(1.0 / math.sqrt(row_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` less their mean, over their standard deviation, times `weight`, plus `bias`: [rows, n] to same."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        mean = np.float32(row_sum(row, n) / n)
        for j in range(n):
            to[j] = row[j] - mean
        scale = np.float32(1.0 / math.sqrt(row_squares(to, n) / n + eps))
        for j in range(n):
            to[j] = to[j] * scale * weight[j] + bias[j]


@kernel
def rms_norm_columns(x: np.ndarray, first: int, count: int, weight: np.ndarray, eps: float) -> None:
    """`rms_norm` in place of `count` vectors that stand side by side in every row of `x`, from column `first` on."""
    size = weight.size
    for i in range(x.shape[0]):
        for at in range(first, first + count * size, size):
            part = x[i, at : at + size]
            scale = np.float32(1.0 / math.sqrt(row_squares(part, size) / size + eps))
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
        scale = np.float32(1.0 / math.sqrt(row_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def add_bias(x: np.ndarray, bias: np.ndarray) -> None:
    """`x += bias` in every row of [rows, n]."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] += bias[j]
