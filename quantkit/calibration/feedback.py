"""Rounding with error feedback: the errors of a row's first columns are made up for by those that come after.

`curvature` says what errors cost, `settling` how a few rows are rounded by it. Here a whole matrix is: its rows apart,
or together where errors of its outputs add up.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import Curvature, factorise, normalised, single_threaded
from quantkit.calibration.settling import RowRounding, row_rounding
from quantkit.errors import QuantkitError
from quantkit.machine import default_threads

ROWS = 256  # rows that are worked on together: in lanes of sixteen, and as the width of matrix products
SWEEPS = 3  # how often all sub-blocks are settled again
OUTPUT_DAMPING = 0.3  # moments of gradients are noisy, and only roughly the same for all inputs
_GROUPS, COUPLED_SWEEPS = 16, 1  # of rows whose outputs are coupled: groups, and how often they are settled again
_PARTS = 8  # of a group, worked on side by side

SUPPORTED: frozenset[GGMLType] = frozenset(
    {
        GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_XS, GGMLType.IQ4_NL,
        GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.MXFP4, GGMLType.IQ3_S,
        GGMLType.IQ3_XXS, GGMLType.IQ2_S, GGMLType.IQ2_XS, GGMLType.IQ2_XXS, GGMLType.IQ1_M, GGMLType.IQ1_S,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Rounded:
    """Rows in a type's blocks, and what the rounding costs."""

    data: np.ndarray  # uint8 [n_rows, bytes of a row]
    loss: np.ndarray  # float64 [n_rows]: (w - q) H (w - q)T, H without damping
    plain_loss: np.ndarray  # the same of the encoder with importance weights

    @classmethod
    def empty(cls, n_rows: int, n: int, kind: GGMLType) -> Rounded:
        """Room for `n_rows` rows of `n` weights."""
        return cls(np.empty((n_rows, kind.row_nbytes(n)), np.uint8), np.empty(n_rows), np.empty(n_rows))


def round_with_feedback(
    weights: np.ndarray,
    curvature: Curvature,
    kind: GGMLType,
    *,
    outputs: np.ndarray | None = None,
    threads: int | None = None,
) -> Rounded:
    """Quantize float32 `weights` of shape (n_rows, n) to `kind` so that the loss under `curvature` is small.

    The bytes are real blocks of the type. A row whose loss would not become smaller has the bytes of the encoder with
    importance weights. The result is the same for any number of `threads`.

    `outputs`, float [n_rows, n_rows], say how errors of different outputs add up: the mean of g gT, g being the
    gradient of what matters by the outputs. Then errors of rows are made up for by the rows after them as well, as
    YAQA does (arXiv 2505.22988), and what becomes small is the trace of `outputs (w - q) H (w - q)T`. A row's own
    loss may then be larger than the plain one.

    Raises QuantkitError when `kind` is none of SUPPORTED, when blocks do not divide rows, and when the curvature or
    the outputs are of another size.
    """
    if kind not in SUPPORTED:
        raise QuantkitError(f"{kind.name} cannot be rounded with error feedback")
    n_rows, n = weights.shape
    if n != curvature.n:
        raise QuantkitError(f"rows of {n} weights cannot be rounded by the moments of {curvature.n} columns")
    kind.row_nbytes(n)
    with single_threaded(), ThreadPoolExecutor(threads or default_threads()) as pool:
        if outputs is not None and n_rows > 1:
            return _Coupled(weights, curvature, kind, outputs, pool).rounded()
        result = Rounded.empty(n_rows, n, kind)
        parts_of_rows = [slice(start, min(n_rows, start + ROWS)) for start in range(0, n_rows, ROWS)]

        def work(part: slice) -> None:
            rows = np.ascontiguousarray(weights[part], np.float32)
            settled = row_rounding(rows, curvature, kind)
            settled.first()
            for _ in range(SWEEPS):
                settled.again()
            _keep(rows, settled.packed(), curvature, kind, result, part)

        for _ in pool.map(work, parts_of_rows):
            pass
    return result


def _keep(
    rows: np.ndarray,
    data: np.ndarray,
    curvature: Curvature,
    kind: GGMLType,
    result: Rounded,
    where: slice | np.ndarray,
    each: bool = True,
) -> None:
    """Put rounded rows into the result, or what the encoder with importance weights gives where that loses less.

    Rows that have made up for others' errors are not kept `each` for itself: only where their loss is no number.
    """
    plain = blocks.encode(rows, kind, curvature.importance)
    plain_loss = curvature.loss(rows - blocks.decode(plain, kind))
    loss = curvature.loss(rows - blocks.decode(data, kind))
    better = loss < plain_loss if each else np.isfinite(loss)
    result.data[where] = np.where(better[:, None], data, plain)
    result.loss[where] = np.where(better, loss, plain_loss)
    result.plain_loss[where] = plain_loss


def coupled_groups(n_rows: int) -> list[np.ndarray]:
    """The numbers of the rows of each group that is settled together where outputs are coupled."""
    n_groups = min(_GROUPS, -(-n_rows // 16))
    return [np.arange(g, n_rows, n_groups) for g in range(n_groups)]


class _Coupled:
    """Rows that are rounded one group after another, because their outputs' errors add up.

    Rows of a group are far apart, and so less alike than neighbours. With `B = S ST`, S upper triangular, B being the
    damped curvature of the outputs, the loss is `|ST (w - q) R|^2`: for a group of rows, the loss of rounding targets
    that make up for the rows before. Afterwards each group is settled again as the others are. What its own rows share
    is then majorised by the sums of their coupling, so that the loss can only fall.
    """

    def __init__(
        self, weights: np.ndarray, curvature: Curvature, kind: GGMLType, outputs: np.ndarray, pool: ThreadPoolExecutor
    ) -> None:
        n_rows = len(weights)
        if outputs.shape != (n_rows, n_rows):
            raise QuantkitError(f"{n_rows} outputs cannot be coupled by moments of shape {outputs.shape}")
        self._weights, self._curvature, self._kind, self._pool = weights, curvature, kind, pool
        groups = coupled_groups(n_rows)
        self._order = np.concatenate(groups)
        backwards = self._order[::-1]
        work, _ = normalised(np.asarray(outputs)[np.ix_(backwards, backwards)], "moments of outputs")
        work[np.diag_indices(n_rows)] += OUTPUT_DAMPING
        self._coupling = work[::-1, ::-1].astype(np.float32)
        factorise(work)
        self._factor = work[::-1, ::-1].astype(np.float32)
        self._targets = np.ascontiguousarray(weights[self._order].T, np.float32)
        self._errors = np.zeros_like(self._targets)
        ends = np.cumsum([len(group) for group in groups])
        self._groups = [slice(end - len(group), end) for end, group in zip(ends, groups, strict=True)]
        self._settled: dict[int, RowRounding] = {}

    def rounded(self) -> Rounded:
        for group in self._groups:
            solve = np.linalg.inv(self._factor[group, group].astype(np.float64))
            before = slice(0, group.start)
            self._settle(group, before, (self._factor[before, group] @ solve).astype(np.float32), None)
        for _ in range(COUPLED_SWEEPS):
            for group in self._groups:
                weigh = np.abs(self._coupling[group, group]).sum(1)
                self._settle(group, slice(None), self._coupling[:, group] / weigh, self._errors[:, group].copy())
        n_rows, n = self._weights.shape
        result = Rounded.empty(n_rows, n, self._kind)

        def keep(start: int) -> None:
            settled = self._settled[start]
            where = self._order[start : start + settled.count]
            rows = np.ascontiguousarray(self._weights[where], np.float32)
            _keep(rows, settled.packed(), self._curvature, self._kind, result, where, each=False)

        for _ in self._pool.map(keep, self._settled):
            pass
        return result

    def _settle(self, group: slice, others: slice, push: np.ndarray, own: np.ndarray | None) -> None:
        """Settle a group's rows at targets moved by what `others` miss times `push`, less the rows' `own` share."""
        # Groups wait for each other, so that each is cut into as many parts as there may be threads.
        step = 16 * -(-(group.stop - group.start) // (16 * _PARTS))

        def work(start: int) -> None:
            stop = min(group.stop, start + step)
            part = slice(start - group.start, stop - group.start)
            moved = self._errors[:, others] @ push[:, part]
            if own is not None:
                moved -= own[:, part]
            targets = self._targets[:, start:stop] + moved
            if own is None:
                self._settled[start] = row_rounding(np.ascontiguousarray(targets.T), self._curvature, self._kind)
                self._settled[start].first()
            else:
                self._settled[start].retarget(targets)
            self._settled[start].again()
            # Parts of a group do not see each other's errors of this round, whatever runs first.
            done[start] = self._settled[start].errors - moved

        done: dict[int, np.ndarray] = {}
        for _ in self._pool.map(work, range(group.start, group.stop, step)):
            pass
        for start, errors in done.items():
            self._errors[:, start : start + errors.shape[1]] = errors
