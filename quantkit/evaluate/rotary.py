"""Rotary embeddings: by how much each position turns, and turning heads by that."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from quantkit.architectures.mixers import Rope


def rotation_tables(rope: Rope, n_positions: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of a rotary embedding, times its magnitude: float32 [n_positions, n_dims / 2] each."""
    pair = np.arange(rope.n_dims // 2)
    frequency = rope.freq_base ** (-2.0 * pair / rope.n_dims)
    if factors is not None:
        frequency = frequency / factors
    slow = frequency * rope.freq_scale
    if rope.yarn is not None:
        yarn = rope.yarn

        def dimension(rotations: float) -> float:
            """The pair, counted in dimensions, that makes this many rotations over the original context."""
            return rope.n_dims * math.log(rope.n_ctx_orig / (rotations * 2 * math.pi)) / (2 * math.log(rope.freq_base))

        low = max(0.0, math.floor(dimension(yarn.beta_fast)))
        high = min(rope.n_dims - 1.0, math.ceil(dimension(yarn.beta_slow)))
        ramp = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
        slow = slow + (frequency - slow) * ramp * yarn.ext_factor
    angle = np.arange(n_positions)[:, None] * slow
    return (np.cos(angle) * rope.magnitude).astype(np.float32), (np.sin(angle) * rope.magnitude).astype(np.float32)


def rotate(x: np.ndarray, c: np.ndarray, s: np.ndarray, neighbours: bool) -> None:
    """Rotate the rows of `x` [rows, heads, dimensions] in place; cosines and sines are [rows, 1, dimensions / 2]."""
    half = x.shape[2] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    turned = a * c - b * s
    b[:] = a * s + b * c
    a[:] = turned


def unsupported_rotation(rope: Rope | None, size: int) -> Iterable[str]:
    """What of a rotary embedding of heads of `size` numbers cannot be."""
    if rope is None:
        return
    if not (0 <= rope.n_dims <= size and rope.n_dims % 2 == 0):
        yield f"{rope.n_dims} rotated dimensions in heads of {size}"
    if not rope.freq_base > 0:
        yield f"a rotary base of {rope.freq_base}"
    yarn = rope.yarn
    if yarn is not None and not (rope.freq_base > 1 and min(yarn.beta_fast, yarn.beta_slow) > 0):
        yield f"YaRN with a rotary base of {rope.freq_base}, from {yarn.beta_slow} to {yarn.beta_fast} rotations"
