"""Sixteen super-blocks side by side: what formats with super-blocks of 256 weights share.

Super-block k goes to lane k, so sums over a whole super-block and searches over its sub-block scales are lane
arithmetic too. Element e of the sixteen is `xs[16 * e : 16 * e + 16]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.base import piece
from quantkit.blocks.lanes import LANES, load, splat, sqrt, store

SUPER = 256  # weights in a super-block


@piece
def transpose(x: Any, first: Any, n_blocks: Any, xs: Any) -> None:
    """Lay out super-blocks from `first` on. Lanes beyond the last super-block repeat it."""
    for lane in range(LANES):
        start = min(first + lane, n_blocks - 1) * SUPER
        for i in range(SUPER):
            xs[i * LANES + lane] = x[start + i]


@piece
def mean_square(xs: Any, factor: Any) -> Any:
    """`factor` (1 or 2) times the mean square of each super-block, in the reference's order of operations."""
    total = splat(np.float32(0))
    for i in range(SUPER):
        v = load(xs, i * LANES)
        total = total + v * v
    return splat(np.float32(factor)) * total / splat(np.float32(SUPER))


@piece
def weigh(weights: Any, first: Any, n_blocks: Any, n_per_row: Any, at: Any, xs: Any, sigma: Any, n: Any, ws: Any) -> Any:
    """Weights of `n` elements of each super-block from its element `at` on: importance times sqrt(sigma + x squared).

    `xs` begins with these elements. Returns their sums.
    """
    for lane in range(LANES):
        start = min(first + lane, n_blocks - 1) * SUPER % n_per_row + at
        for i in range(n):
            ws[i * LANES + lane] = weights[start + i]
    total = splat(np.float32(0))
    for i in range(n):
        x = load(xs, i * LANES)
        w = load(ws, i * LANES) * sqrt(sigma + x * x)
        store(ws, i * LANES, w)
        total = total + w
    return total
