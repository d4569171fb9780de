"""Sixteen super-blocks side by side: what formats with super-blocks of 256 weights share.

Super-block k goes to lane k, so sums over a whole super-block and searches over its sub-block scales are lane
arithmetic too. Element e of the sixteen is `xs[16 * e : 16 * e + 16]`.
"""

from __future__ import annotations

from typing import Any

from quantkit.blocks.base import piece
from quantkit.blocks.lanes import LANES

SUPER = 256  # weights in a super-block


@piece
def transpose(x: Any, first: Any, n_blocks: Any, xs: Any) -> None:
    """Lay out super-blocks from `first` on. Lanes beyond the last super-block repeat it."""
    for lane in range(LANES):
        start = min(first + lane, n_blocks - 1) * SUPER
        for i in range(SUPER):
            xs[i * LANES + lane] = x[start + i]


@piece
def gather_importance(weights: Any, first: Any, n_blocks: Any, n_per_row: Any, at: Any, n: Any, ws: Any) -> None:
    """Lay out the importance weights of `n` elements of each super-block, from its element `at` on."""
    for lane in range(LANES):
        start = min(first + lane, n_blocks - 1) * SUPER % n_per_row + at
        for i in range(n):
            ws[i * LANES + lane] = weights[start + i]
