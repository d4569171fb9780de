"""What kernels do to a row of numbers, sixteen at a time: exponentials, sums, maxima.

Sums run in sixteen lanes, so they round like short sums. A product and the sum it goes into round once where the
machine can; fastmath stays off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantkit.blocks.lane_memory import load
from quantkit.blocks.lanes import LANES, get, like, maximum, minimum, multiply_add, power_of_two, splat
from quantkit.compile.kernel import kernel, piece

_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_LOG2_E, _MAGIC = np.float32(math.log2(math.e)), np.float32(12582912.0)
# ln 2 in two parts. The first has few bits, so its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
# (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, interpolated at 400 Chebyshev nodes: relative error of e^r under 4e-9.
_C0, _C1, _C2, _C3, _C4 = (
    np.float32(c) for c in (0.5, 0.16666574776172638, 0.041666459292173386, 0.00836347509175539, 0.0013934092130512)
)
_MIN_INT = np.int32(-2147483648)


@piece
def exp(x: Any) -> Any:
    """e^x of a float32 or of sixteen, with a relative error under 1.5e-7, for x in [-87, 88].

    Beyond, the value at that end; NaN is NaN. The exponent is rounded by adding 1.5 * 2^23, which leaves it in the low
    bits of the sum; a polynomial does the rest. LLVM vectorises loops over this.
    """
    x = maximum(like(_LOWEST, x), x)
    x = minimum(like(_HIGHEST, x), x)
    shifted = multiply_add(x, like(_LOG2_E, x), like(_MAGIC, x))
    n = shifted - like(_MAGIC, x)
    r = multiply_add(n, like(-_LN2_LOW, x), multiply_add(n, like(-_LN2_HIGH, x), x))
    p = multiply_add(like(_C4, x), r, like(_C3, x))
    p = multiply_add(p, r, like(_C2, x))
    p = multiply_add(p, r, like(_C1, x))
    p = multiply_add(p, r, like(_C0, x))
    return multiply_add(p, r * r, r + like(_ONE, x)) * power_of_two(shifted)


@kernel
def exponentials(x: np.ndarray, out: np.ndarray) -> None:
    """`exp` of every number of 1-D `x`."""
    for j in range(x.size):
        out[j] = exp(x[j])


@piece
def capped(x: Any, cap: Any) -> Any:
    """cap * tanh(x / cap) of a float32 or of sixteen; absolute error under 2e-7 * cap."""
    return like(cap, x) - like(cap + cap, x) / (exp(x * like(_TWO / cap, x)) + like(_ONE, x))


@piece
def lanes_total(lanes: Any) -> Any:
    """The sum of sixteen lanes, in float64."""
    total = 0.0
    for j in range(LANES):
        total += get(lanes, j)
    return total


@piece
def row_sum(x: Any, n: int) -> Any:
    """The sum of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        lanes = lanes + load(x, j)
    total = lanes_total(lanes)
    for j in range(whole, n):
        total += x[j]
    return total


@piece
def row_squares(x: Any, n: int) -> Any:
    """The sum of the squares of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        v = load(x, j)
        lanes = multiply_add(v, v, lanes)
    total = lanes_total(lanes)
    for j in range(whole, n):
        total += np.float64(x[j]) * np.float64(x[j])
    return total


@piece
def row_maximum(x: Any, n: int) -> Any:
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
