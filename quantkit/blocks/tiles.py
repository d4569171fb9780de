"""Sixteen blocks side by side: block k goes to lane k, so that a block's own chain of sums is lane arithmetic.

Element e of sixteen blocks is `xs[16 * e : 16 * e + 16]`.
"""

from __future__ import annotations

from quantkit.blocks.lane_memory import transpose_tile
from quantkit.blocks.lanes import LANES, Floats, Longs, minimum
from quantkit.compile.kernel import piece

SUPER = 256  # weights in a super-block


@piece
def block_starts(first: int, n_blocks: int, size: int, n_per_row: int, starts: Longs, columns: Longs) -> int:
    """Where sixteen blocks of `size` weights begin, in all rows and in their own; returns how many are different.

    Lanes beyond the last block repeat it.
    """
    for lane in range(LANES):
        starts[lane] = minimum(first + lane, n_blocks - 1) * size
        columns[lane] = starts[lane] % n_per_row
    return minimum(LANES, n_blocks - first)


@piece
def spread(x: Floats, starts: Longs, at: int, n: int, xs: Floats) -> None:
    """Lay out `n` elements (a multiple of 16) of each block, from its element `at` on."""
    for i in range(0, n, LANES):
        transpose_tile(x, starts, at + i, xs, i * LANES)
