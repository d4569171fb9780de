"""Rounding with error feedback: the errors of a row's first columns are made up for by those that come after.

What a matrix's rounding does to its output is `(w - q) H (w - q)T` for each row, H being the mean of `x xT` over its
input. Rounding each weight to the nearest level makes the diagonal small, but inputs are correlated. GPTQ (Frantar et
al., arXiv 2210.17323) settles columns in order and moves those not yet settled to where the error so far hurts least.
Here the same is written with the triangular factor of H itself: with `H = R RT`, R upper triangular, the loss is
`|(w - q) R|^2`, one term for each column, in which only columns up to that one appear.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from quantkit import blocks
from quantkit.blocks.parts import GridParts, Parts, grid_parts, parts
from quantkit.blocks.types import GGMLType
from quantkit.calibration.feedback_kernels import points_of, visit_levels, visit_points
from quantkit.errors import QuantkitError
from quantkit.machine import default_threads

ROWS = 256  # rows that are worked on together: in lanes of sixteen, and as the width of matrix products
PANEL = 256  # columns whose errors reach the others by a matrix product
DAMPING = 0.01  # of the moments' diagonal, as a share of its mean
SWEEPS = 3  # how often all sub-blocks are settled again
_GROUPS, COUPLED_SWEEPS = 16, 1  # of rows whose outputs are coupled: groups, and how often they are settled again
_PARTS = 8  # of a group, worked on side by side
OUTPUT_DAMPING = 0.3  # moments of gradients are noisy, and only roughly the same for all inputs
_FACTOR_BLOCK = 512
_SHIFT = np.float32(0.125)  # of the levels of IQ1_S and IQ1_M

SUPPORTED: frozenset[GGMLType] = frozenset(
    {
        GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_XS, GGMLType.IQ4_NL,
        GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.MXFP4, GGMLType.IQ3_S,
        GGMLType.IQ3_XXS, GGMLType.IQ2_S, GGMLType.IQ2_XS, GGMLType.IQ2_XXS, GGMLType.IQ1_M, GGMLType.IQ1_S,
    }
)  # fmt: skip


class _SingleThreaded:
    """BLAS on one thread while anyone needs it so: what it adds up, and in which order, can depend on its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limit: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._limit = ThreadpoolController().limit(limits=1, user_api="blas")
                self._limit.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._limit.__exit__(None, None, None)


single_threaded = _SingleThreaded()


@dataclass(frozen=True)
class _Steps:
    """What settling the columns of a panel needs: see `visit_levels`."""

    coupling: np.ndarray  # float32 [m, m]
    solve: np.ndarray  # float32 [m / n_sub, n_sub, n_sub]
    chain: np.ndarray
    left: np.ndarray  # float32 [m]


class Curvature:
    """How much errors of the columns of a matrix cost, alone and together: made once for each input.

    `n` is the number of columns, `scale` the mean of the moments' diagonal, `damping` what was added to the diagonal as
    a share of `scale`, and `importance` the diagonal itself, float32 [n], as an importance matrix has it.
    """

    def __init__(self, damped: np.ndarray, factor: np.ndarray, importance: np.ndarray, scale: float, damping: float):
        self.n = len(damped)
        self.importance, self.scale, self.damping = importance, scale, damping
        # Divided by `scale`: the damped moments, and the lower triangular factor L with R = L.T.
        self._damped, self._factor = damped, factor
        self._left = np.ascontiguousarray(np.diag(factor) ** 2)
        self._steps: dict[tuple[str, int, int, int], _Steps] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, moments: np.ndarray, *, damping: float = DAMPING) -> Curvature:
        """The curvature that `moments`, the mean of x xT, float64 or float32 [n, n], describe.

        `damping` is added to the diagonal, as a share of its mean: moments of few tokens are singular, and what they
        say of the directions that were hardly seen is not to be trusted. Raises QuantkitError for moments that are not
        finite, not symmetric, all zero or, damped, not positive definite.
        """
        if not damping >= 0:
            raise QuantkitError(f"a damping of {damping} is not possible: use 0 or more")
        # Turned round, so that the lower triangular factor of numpy becomes the upper triangular one.
        moments = np.asarray(moments)
        work, scale = _normalised(moments[::-1, ::-1], "second moments")
        importance = np.diag(moments).astype(np.float32)
        work[np.diag_indices(len(work))] += damping
        damped = np.ascontiguousarray(work[::-1, ::-1], np.float32)
        with single_threaded():
            _factorise(work)
        # Reversed, factored and reversed again: the upper triangular factor. Its transpose is kept.
        factor = np.ascontiguousarray(work[::-1, ::-1].T, np.float32)
        return cls(damped, factor, importance, scale, damping)

    def host(self) -> Curvature:
        """This, which is the processor's."""
        return self

    def loss(self, errors: np.ndarray) -> np.ndarray:
        """`e H eT` of each row of `errors`, float32 [n_rows, n], with H as it was before damping: float64 [n_rows]."""
        through = errors @ self._damped
        damped = np.einsum("ij,ij->i", through, errors, dtype=np.float64)
        squares = np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
        return np.asarray((damped - self.damping * squares) * self.scale)

    def _first(self, start: int, stop: int, n_sub: int) -> _Steps:
        """For columns of which those before are settled and those after are free."""
        return self._cached("first", start, stop, n_sub)

    def _again(self, start: int, stop: int, n_sub: int) -> _Steps:
        """For columns all of whose others are settled."""
        return self._cached("again", start, stop, n_sub)

    def _cached(self, which: str, start: int, stop: int, n_sub: int) -> _Steps:
        with self._lock:
            key = which, start, stop, n_sub
            if key not in self._steps:
                source = self._factor if which == "first" else self._damped
                panel = np.ascontiguousarray(source[start:stop, start:stop])
                each = [slice(at, at + n_sub) for at in range(0, stop - start, n_sub)]
                own = np.stack([panel[at, at] for at in each]).astype(np.float64)
                if which == "first":
                    factors = own
                else:
                    factors = np.linalg.cholesky(own[:, ::-1, ::-1])[:, ::-1, ::-1].transpose(0, 2, 1)
                diagonal = np.diagonal(factors, axis1=1, axis2=2)
                self._steps[key] = _Steps(
                    panel.reshape(-1),
                    np.ascontiguousarray(np.linalg.inv(own), np.float32).reshape(-1),
                    np.ascontiguousarray(factors / diagonal[:, :, None], np.float32).reshape(-1),
                    np.ascontiguousarray(diagonal**2, np.float32).reshape(-1),
                )
            return self._steps[key]


def _normalised(moments: np.ndarray, what: str) -> tuple[np.ndarray, float]:
    """Second moments divided by the mean of their diagonal, float64, and that mean. Refuses what is none."""
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or moments.shape[0] == 0:
        raise QuantkitError(f"{what} must be a square matrix, not of shape {moments.shape}")
    diagonal = np.diag(moments).astype(np.float64)
    scale = float(diagonal.mean())
    if not np.isfinite(moments).all() or not np.isfinite(scale):
        raise QuantkitError(f"{what} are not finite: the calibration text makes the model overflow")
    if scale == 0 and not moments.any():
        raise QuantkitError(f"{what} are all zero: nothing has passed through this matrix")
    if not (diagonal >= 0).all() or scale == 0:
        raise QuantkitError(f"{what} with a negative diagonal are no moments")
    normalised = moments / np.float64(scale)
    if not _symmetric(normalised):
        raise QuantkitError(f"{what} must be symmetric")
    return normalised, scale


def _symmetric(matrix: np.ndarray) -> bool:
    """Whether a matrix is its transpose, up to rounding in float32."""
    size = float(np.abs(matrix).max())
    return all(
        np.abs(matrix[at : at + 256] - matrix[:, at : at + 256].T).max() <= 1e-4 * size
        for at in range(0, len(matrix), 256)
    )


def _factorise(a: np.ndarray) -> None:
    """Replace `a`, float64, by its lower triangular Cholesky factor, in place and block column by block column."""
    for at in range(0, len(a), _FACTOR_BLOCK):
        stop = min(len(a), at + _FACTOR_BLOCK)
        a[at:, at:stop] -= a[at:, :at] @ a[at:stop, :at].T
        try:
            own = np.linalg.cholesky(a[at:stop, at:stop])
        except np.linalg.LinAlgError:
            raise QuantkitError(
                "second moments are not positive definite: too few tokens for this damping, or not moments"
            ) from None
        a[at:stop, at:stop] = own
        a[stop:, at:stop] = a[stop:, at:stop] @ np.linalg.inv(own).T
        a[at:stop, stop:] = 0


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
            settled = _rounding(rows, curvature, kind)
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
        turned = self._order[::-1]
        work, _ = _normalised(np.asarray(outputs)[np.ix_(turned, turned)], "moments of outputs")
        work[np.diag_indices(n_rows)] += OUTPUT_DAMPING
        self._coupling = work[::-1, ::-1].astype(np.float32)
        _factorise(work)
        self._factor = work[::-1, ::-1].astype(np.float32)
        self._targets = np.ascontiguousarray(weights[self._order].T, np.float32)
        self._errors = np.zeros_like(self._targets)
        ends = np.cumsum([len(group) for group in groups])
        self._groups = [slice(end - len(group), end) for end, group in zip(ends, groups, strict=True)]
        self._settled: dict[int, _Rounding] = {}

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
                self._settled[start] = _rounding(np.ascontiguousarray(targets.T), self._curvature, self._kind)
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


def _rounding(rows: np.ndarray, curvature: Curvature, kind: GGMLType) -> _Rounding:
    if kind in parts():
        return _LevelRounding(rows, curvature, kind)
    return _PointRounding(rows, curvature, grid_parts()[kind])


class _Rounding(ABC):
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
            steps = c._first(start, stop, self._n_sub)
            whole = c._first(start, stop, size)
            targets = self._targets[start:stop]
            if start:
                pushed = c._factor[start:stop, :start] @ self._errors[:start]
                targets = targets + whole.solve.reshape(size, size) @ pushed
            data = blocks.encode(np.ascontiguousarray(targets.T), self._kind, c._left[start:stop])
            self._take(data, start // size)
            errors = np.empty_like(targets)
            self._visit(start, stop, steps, np.ascontiguousarray(targets), targets, errors, False)
            self._errors[start:stop] = errors + (self._targets[start:stop] - targets)

    def again(self) -> None:
        """Settle every sub-block anew, as all others are."""
        c = self._curvature
        for start in range(0, c.n, PANEL):
            stop = min(c.n, start + PANEL)
            steps = c._again(start, stop, self._n_sub)
            errors = self._errors[start:stop]
            outside = c._damped[start:stop] @ self._errors - steps.coupling.reshape(stop - start, -1) @ errors
            self._visit(start, stop, steps, self._targets[start:stop], outside, errors, True)

    def _visit(
        self, start: int, stop: int, steps: _Steps, targets: np.ndarray, outside: np.ndarray, errors: np.ndarray,
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


class _LevelRounding(_Rounding):
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


class _PointRounding(_Rounding):
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
