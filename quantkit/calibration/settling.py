"""Rows on their way to being rounded: each sub-block of columns is settled as the errors of the others ask for.

GPTQ (Frantar et al., arXiv 2210.17323) settles columns in order and moves those not yet settled to where the error so
far hurts least. Here a sub-block's scale is chosen with its levels, by the loss, among a few near what the encoder's
search finds. Afterwards every sub-block is settled again, as all others are by then: coordinate descent on the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np

from quantkit import blocks
from quantkit.blocks.parts import GridParts, Parts, grid_parts, parts
from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import Curvature, Steps
from quantkit.calibration.feedback_kernels import points_of, visit_levels, visit_points

PANEL = 256  # columns whose errors reach the others by a matrix product
_SHIFT = np.float32(0.125)  # of the levels of IQ1_S and IQ1_M


def row_rounding(rows: np.ndarray, curvature: Curvature, kind: GGMLType) -> RowRounding:
    """Float32 `rows` [n_rows, n], to be rounded to `kind` by `curvature`."""
    if kind in parts():
        return _LevelRounding(rows, curvature, kind)
    return _PointRounding(rows, curvature, grid_parts()[kind])


class RowRounding(ABC):
    """Some rows on their way to being rounded: arrays of float32 [columns, rows].

    The units are the two floats of a block that codes multiply, float32 [blocks, 2, rows], or None.
    """

    def __init__(self, rows: np.ndarray, curvature: Curvature, kind: GGMLType, n_sub: int, coded: bool) -> None:
        self.count, n = rows.shape
        self._curvature, self._kind, self._n_sub = curvature, kind, n_sub
        self._n_rows = -(-self.count // 16) * 16
        self._targets = np.zeros((n, self._n_rows), np.float32)
        self._targets[:, : self.count] = rows.T
        self._errors = np.zeros_like(self._targets)
        self._values = np.zeros_like(self._targets)
        self._scales = np.zeros((n // n_sub, self._n_rows), np.float32)
        self._lows = np.zeros_like(self._scales)
        self._units = np.zeros((n // kind.block_size, 2, self._n_rows), np.float32) if coded else None
        # What a kind adds: the kernel, its rule, the range of codes, and what it tries at first and again.
        self._kernel: Any
        self._rule: Any
        self._ranges: np.ndarray
        self._trials: tuple[np.ndarray, np.ndarray]

    @property
    def errors(self) -> np.ndarray:
        """What the rows miss their targets by, [columns, rows]."""
        return self._errors[:, : self.count]

    def retarget(self, targets: np.ndarray) -> None:
        """Other targets, [columns, rows], for the values that the rows have."""
        self._errors[:, : self.count] += targets - self._targets[:, : self.count]
        self._targets[:, : self.count] = targets

    def first(self) -> None:
        """Settle all columns in order: scales by the encoder's search, levels with feedback."""
        c, size = self._curvature, self._kind.block_size
        for start in range(0, c.n, size):
            stop = start + size
            steps = c.first(start, stop, self._n_sub)
            whole = c.first(start, stop, size)
            targets = self._targets[start:stop]
            if start:
                pushed = c.factor[start:stop, :start] @ self._errors[:start]
                targets = targets + whole.solve.reshape(size, size) @ pushed
            data = blocks.encode(np.ascontiguousarray(targets.T), self._kind, c.left[start:stop])
            self._take(data, start // size)
            errors = np.empty_like(targets)
            self._visit(start, stop, steps, np.ascontiguousarray(targets), targets, errors, False)
            self._errors[start:stop] = errors + (self._targets[start:stop] - targets)

    def again(self) -> None:
        """Settle every sub-block anew, as all others are."""
        c = self._curvature
        for start in range(0, c.n, PANEL):
            stop = min(c.n, start + PANEL)
            steps = c.again(start, stop, self._n_sub)
            errors = self._errors[start:stop]
            outside = c.damped[start:stop] @ self._errors - steps.coupling.reshape(stop - start, -1) @ errors
            self._visit(start, stop, steps, self._targets[start:stop], outside, errors, True)

    def _visit(
        self, start: int, stop: int, steps: Steps, targets: np.ndarray, outside: np.ndarray, errors: np.ndarray,
        again: bool,
    ) -> None:  # fmt: skip
        subs = slice(start // self._n_sub, stop // self._n_sub)
        self._kernel(
            targets.reshape(-1), outside.reshape(-1), steps.coupling, steps.solve, steps.chain, steps.left,
            None if self._units is None else self._units[start // self._kind.block_size].reshape(-1),
            self._scales[subs].reshape(-1), self._lows[subs].reshape(-1), self._values[start:stop].reshape(-1),
            errors.reshape(-1), self._trials[again], self._ranges, self._rule, self._n_rows, self._n_sub, again,
        )  # fmt: skip

    @abstractmethod
    def _take(self, data: np.ndarray, block: int) -> None:
        """The scales of one block of every row, as the encoder has chosen them."""

    @abstractmethod
    def packed(self) -> np.ndarray:
        """The rows as blocks: uint8 [n_rows, bytes of a row]."""

    def _by_block(self, array: np.ndarray) -> np.ndarray:
        """What sub-blocks have, [sub-blocks, rows], row by row and block by block: [rows, blocks, sub-blocks]."""
        count = self._kind.block_size // self._n_sub
        return np.ascontiguousarray(array[:, : self.count].T.reshape(self.count, -1, count))


@lru_cache
def level_rule(kind: GGMLType) -> LevelRule:
    """How weights of `kind`, a format of levels, are settled."""
    return LevelRule(parts()[kind])


class LevelRule:
    """How weights of a format of levels are settled: its levels, and what is tried for its scales.

    `values` are the levels in order, float32, and `borders` those between them, None where the levels are neighbouring
    integers. `ranges` are the lowest and highest code of scales and of minimums; `trials` what to change in a
    sub-block's codes, at first and again: pairs, see `visit_levels`. `coded` says whether scales are codes at all.
    """

    def __init__(self, made_of: Parts) -> None:
        self.parts = made_of
        self.values, chosen = np.unique(made_of.values, return_index=True)  # a format may have two forms of zero
        uniform = len(self.values) == self.values[-1] - self.values[0] + 1
        self.borders = None if uniform else (self.values[1:] + self.values[:-1]) / np.float32(2)
        self._level_of = np.zeros(256, np.uint8)
        self._level_of[(self.values + 128).astype(np.int64)] = chosen
        low, high = made_of.scale_codes or (0, 0)
        self.coded = made_of.scale_codes is not None
        self.ranges = np.array([low, high, 0, made_of.top_low], np.float32)
        self.trials = _level_trials(made_of, 3), _level_trials(made_of, 1)

    def take(self, data: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes and floats of blocks, see `Parts`: [n_rows, codes of a block] and [n_rows, 2], more than `data`."""
        codes = np.zeros((n_rows, 2 * (self.parts.kind.block_size // self.parts.n_sub)), np.int32)
        floats = np.empty((n_rows, 2), np.float32)
        self.parts.take(data.reshape(-1), codes.reshape(-1), floats.reshape(-1))
        return codes, floats

    def pack(
        self, values: np.ndarray, scales: np.ndarray, lows: np.ndarray, units: np.ndarray | None, out: np.ndarray
    ) -> None:
        """Write rows as blocks into `out`, uint8 [rows, bytes of a row].

        `values` are uint8 [rows, n]: levels plus 128. `scales` and `lows` are [rows, blocks, sub-blocks], and `units`
        [rows, blocks, 2].
        """
        if units is None:
            codes, floats = np.zeros(0, np.int32), np.concatenate([scales, lows], 2)
        else:
            codes, floats = np.concatenate([scales, lows], 2).astype(np.int32), np.ascontiguousarray(units)
        levels = self._level_of[values]
        self.parts.put(levels.reshape(-1), codes.reshape(-1), floats.reshape(-1), out.reshape(-1))


class _LevelRounding(RowRounding):
    """Rows in a format of levels."""

    def __init__(self, rows: np.ndarray, curvature: Curvature, kind: GGMLType) -> None:
        rule = self._levels = level_rule(kind)
        super().__init__(rows, curvature, kind, rule.parts.n_sub, rule.coded)
        self._kernel = visit_levels
        self._rule, self._ranges, self._trials = (rule.values, rule.borders), rule.ranges, rule.trials

    def _take(self, data: np.ndarray, block: int) -> None:
        count = self._kind.block_size // self._n_sub
        codes, floats = self._levels.take(data, self._n_rows)
        if self._units is not None:
            self._units[block] = floats.T
            self._scales[block * count : (block + 1) * count] = codes[:, :count].T
            self._lows[block * count : (block + 1) * count] = codes[:, count:].T
        else:
            self._scales[block], self._lows[block] = floats.T

    def packed(self) -> np.ndarray:
        values = (self._values.T[: self.count] + 128).astype(np.uint8)
        units = None if self._units is None else self._units.transpose(2, 0, 1)[: self.count]
        out = np.empty((self.count, self._kind.row_nbytes(len(self._targets))), np.uint8)
        self._levels.pack(values, self._by_block(self._scales), self._by_block(self._lows), units, out)
        return out


class _PointRounding(RowRounding):
    """Rows in a format whose levels lie on a grid."""

    def __init__(self, rows: np.ndarray, curvature: Curvature, made_of: GridParts) -> None:
        super().__init__(rows, curvature, made_of.kind, made_of.n_sub, True)
        self._parts = made_of
        shifted = made_of.magnitudes is None
        levels = np.array([-1, 0, 1], np.float32) if made_of.magnitudes is None else made_of.magnitudes
        width = 2 if len(levels) == 3 else 3
        self._group = 8 if len(levels) == 3 else 4
        signed = 0 if shifted else 2 if made_of.even else 1
        n_shifts = 2 if shifted and not made_of.one_shift else 1
        padded = np.concatenate([levels, np.full(16 - len(levels), levels[-1])]).astype(np.float32)
        borders = (levels[1:] + levels[:-1]) / np.float32(2)
        self._kernel = visit_points
        self._rule = padded, borders, (self._group, width, signed, n_shifts), made_of.grid
        self._ranges = np.array([0.5, made_of.top_scale + 0.5, 0, 0], np.float32)
        # A shift is tried with either sign; where there is none, both are 0.
        signs = (1, -1) if made_of.one_shift else (1,)
        self._trials = tuple(
            np.array([(scale, sign) for scale in range(-reach, reach + 1) for sign in signs], np.float32).reshape(-1)
            for reach in (2, 1)
        )  # type: ignore[assignment]

    def _take(self, data: np.ndarray, block: int) -> None:
        count = self._kind.block_size // self._n_sub
        codes, floats = np.zeros((self._n_rows, count), np.int32), np.zeros(self._n_rows, np.float32)
        signs = np.zeros((self._n_rows, count, self._n_sub // 8), np.uint8)
        self._parts.take(data.reshape(-1), signs.reshape(-1), codes.reshape(-1), floats)
        assert self._units is not None
        self._units[block, 0] = floats * np.float32(self._parts.unit)
        subs = slice(block * count, (block + 1) * count)
        self._scales[subs] = codes.T + np.float32(0.5)
        if self._parts.one_shift:
            self._lows[subs] = np.where(signs[:, :, 0].T, -_SHIFT, _SHIFT)

    def packed(self) -> np.ndarray:
        assert self._units is not None
        n, count = len(self._targets), self.count
        points, signs = np.empty((count, n // self._group), np.uint16), np.empty((count, n // 8), np.uint8)
        points_of(self._values.reshape(-1), self._n_rows, self._rule, points.reshape(-1), signs.reshape(-1))
        if self._parts.one_shift:
            signs[:] = np.repeat(self._lows.T[:count] < 0, self._n_sub // 8, 1)
        codes = self._by_block(self._scales - np.float32(0.5)).astype(np.int32)
        floats = np.ascontiguousarray(self._units[:, 0, :count].T) / np.float32(self._parts.unit)
        out = np.empty((count, self._kind.row_nbytes(n)), np.uint8)
        self._parts.put(points.reshape(-1), signs.reshape(-1), codes.reshape(-1), floats.reshape(-1), out.reshape(-1))
        return out


def _level_trials(made_of: Parts, reach: int) -> np.ndarray:
    """What to add to a sub-block's two codes; or to its scale, as shares of it, and to its low, as shares of the scale.

    Trials beyond a reach of 3 hardly lower the loss, and do not lower the divergence of a model.
    """
    steps = range(-reach, reach + 1)
    scales: list[float] = [*steps]
    lows: list[float] = [*range(-min(reach, 2), min(reach, 2) + 1)]
    if made_of.kind == GGMLType.MXFP4:  # powers of two
        scales = [0.0, 1.0, -0.5]
    elif made_of.scale_codes is None:
        scales = [0.02 * i for i in steps] if made_of.affine else [0.01 * i for i in range(-2 * reach, 2 * reach + 1)]
        lows = [0.0, -0.5, 0.5]
    if not made_of.affine:
        lows = [0.0]
    return np.array([(scale, low) for scale in scales for low in lows], np.float32).reshape(-1)
