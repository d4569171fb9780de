"""How the values of stored tensors move on their way to GGUF, for families that need the same.

Each is a `Rearrange`: it takes the config and a stored tensor, and gives a view. Where several names stand for one
field of the config, the first that is there counts. Rows are the second axis from the end, except in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from quantkit.architectures.base import Pieces, Rearrange, Transform
from quantkit.architectures.config import Config


def rows_axis(stored: np.ndarray) -> int:
    """Which axis counts the rows."""
    return max(0, stored.ndim - 2)


def interleave_rotary(*heads: str) -> Rearrange:
    """Rows of each head from two halves (transformers' rotary layout) to adjacent pairs (GGUF's).

    `heads` is the config field with the number of heads.
    """

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        n_heads = config.require(*heads)
        halves = stored.reshape(n_heads, 2, stored.shape[0] // n_heads // 2, *stored.shape[1:])
        return np.swapaxes(halves, 1, 2)

    return rearrange


def transpose(_config: Config, stored: np.ndarray) -> np.ndarray:
    """Rows and columns change places."""
    return np.swapaxes(stored, -1, -2)


def part(i: int, n: int) -> Rearrange:
    """The `i`-th of `n` equal parts of the rows."""

    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        axis = rows_axis(stored)
        size, rest = divmod(stored.shape[axis], n)
        if rest:
            raise ValueError
        return stored[(slice(None),) * axis + (slice(i * size, (i + 1) * size),)]

    return rearrange


def every(i: int, n: int) -> Rearrange:
    """Each `n`-th row from the `i`-th on."""

    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        return stored[(slice(None),) * rows_axis(stored) + (slice(i, None, n),)]

    return rearrange


def every_column(i: int, n: int) -> Rearrange:
    """Each `n`-th number of the last axis from the `i`-th on."""

    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        return stored[..., i::n]

    return rearrange


def fused_heads(which: str) -> Rearrange:
    """The rows of queries ("q"), keys ("k") or values ("v") of a product that has all three below each other."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        heads, groups = config.require("num_attention_heads"), config.require("num_key_value_heads")
        head = config.integer("head_dim") or config.require("hidden_size") // heads
        ends = [0, heads * head, (heads + groups) * head, (heads + 2 * groups) * head]
        if stored.shape[0] != ends[-1]:
            raise ValueError
        at = "qkv".index(which)
        return stored[ends[at] : ends[at + 1]]

    return rearrange


def in_turn(*steps: Rearrange) -> Rearrange:
    """One after the other."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        for step in steps:
            stored = step(config, stored)
        return stored

    return rearrange


def decay_rates(rows: np.ndarray) -> np.ndarray:
    """What a state decays with, of the logarithm that checkpoints hold.

    Rounded correctly, which the reference's exponential is not quite: that depends on the machine.
    """
    rates: np.ndarray = -np.exp(rows.astype(np.float64)).astype(rows.dtype)
    return rates


def kernel(_config: Config, stored: np.ndarray) -> np.ndarray:
    """The rows of a convolution's kernel [channels, 1, size], one for each channel."""
    return stored.reshape(stored.shape[0], stored.shape[-1])


def patches(_config: Config, stored: np.ndarray) -> np.ndarray:
    """The first matrix, over the pixels of a patch and the colours of each, as a convolution over both directions."""
    side = math.isqrt(stored.shape[1] // 3)
    return np.moveaxis(stored.reshape(stored.shape[0], side, side, 3), 3, 1)


# The order of gate and up projections in one tensor.
HALVES = ("gate", "up")
# Experts that come stacked, gate and up projections in one tensor, without `.weight`; and with it.
STACKED_EXPERTS: Mapping[str, Pieces] = {
    f".experts.{name}{ending}": pieces
    for ending in ("", ".weight")
    for name, pieces in {
        "gate_up_proj": {f".experts.{half}_proj.weight": Transform(part(i, 2)) for i, half in enumerate(HALVES)},
        "down_proj": {".experts.down_proj.weight": Transform()},
    }.items()
}
# The same with rows and columns exchanged.
TRANSPOSED_EXPERTS: Mapping[str, Pieces] = {
    f".experts.{name}{ending}": pieces
    for ending in ("", ".weight")
    for name, pieces in {
        "gate_up_proj": {
            f".experts.{half}_proj.weight": Transform(in_turn(transpose, part(i, 2))) for i, half in enumerate(HALVES)
        },
        "down_proj": {".experts.down_proj.weight": Transform(transpose)},
    }.items()
}
