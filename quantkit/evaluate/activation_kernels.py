"""Nonlinearities of feed-forward blocks, and gates.

The kernels run over rows as those of norms do: see `norm_kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantkit.compile.kernel import kernel, piece
from quantkit.evaluate.row_pieces import exp

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# -2 sqrt(2 / pi), and that times 0.044715.
_GELU_LINEAR = np.float32(-2.0 * math.sqrt(2.0 / math.pi))
_GELU_CUBIC = np.float32(-2.0 * math.sqrt(2.0 / math.pi) * 0.044715)
# gpt-oss's bounds and slope.
_LIMIT, _SLOPE = np.float32(7.0), np.float32(1.702)


@kernel
def multiply_sigmoid(x: np.ndarray, gate: np.ndarray) -> None:
    """`x *= sigmoid(gate)`, both [rows, n]."""
    for i in range(x.shape[0]):
        row, by = x[i], gate[i]
        for j in range(row.size):
            row[j] /= _ONE + exp(-by[j])


@kernel
def silu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`silu(gate) * up`: rows of gate's n numbers and then up's n to rows of n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            to[j] = gate[j] / (_ONE + exp(-gate[j])) * up[j]


@kernel
def clamped_silu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """g sigmoid(1.702 g) (u + 1), with the gate at most 7 and u within 7 of 0: gate's n numbers, then up's, to n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            g, u = gate[j], up[j]
            g = g if not g > _LIMIT else _LIMIT
            u = u if not u > _LIMIT else _LIMIT
            u = u if not u < -_LIMIT else -_LIMIT
            to[j] = g / (_ONE + exp(-_SLOPE * g)) * (u + _ONE)


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
def relu(x: np.ndarray, out: np.ndarray) -> None:
    """What is above 0, and 0: rows of n to rows of n."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            to[j] = row[j] if row[j] > _ZERO or row[j] != row[j] else _ZERO


@kernel
def relu_squared(x: np.ndarray, out: np.ndarray) -> None:
    """The square of what is above 0, and 0: rows of n to rows of n."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            v = row[j] if row[j] > _ZERO or row[j] != row[j] else _ZERO
            to[j] = v * v


@kernel
def xielu(
    x: np.ndarray, positive: np.float32, negative: np.float32, beta: np.float32, eps: np.float32, out: np.ndarray
) -> None:
    """`positive` x^2 + `beta` x above 0, `negative` (e^min(x, eps) - 1 - x) + `beta` x below: [rows, n] to same."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            v = row[j]
            if v > _ZERO:
                to[j] = positive * v * v + beta * v
            else:
                to[j] = negative * (np.float32(math.expm1(min(v, eps))) - v) + beta * v
