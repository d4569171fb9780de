"""Rounding with error feedback: the errors of a row's first columns are made up for by those that come after.

What a matrix's rounding does to its output is `(w - q) H (w - q)T` for each row, H being the mean of `x xT` over its
input. Rounding each weight to the nearest level makes the diagonal small, but inputs are correlated. GPTQ (Frantar et
al., arXiv 2210.17323) settles columns in order and moves those not yet settled to where the error so far hurts least.
Here the same is written with the triangular factor of H itself: with `H = R RT`, R upper triangular, the loss is
`|(w - q) R|^2`, one term for each column, in which only columns up to that one appear.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from quantkit import blocks
from quantkit.blocks.parts import Parts, parts
from quantkit.blocks.types import GGMLType
from quantkit.calibration.feedback_kernels import visit
from quantkit.errors import QuantkitError
from quantkit.machine import default_threads

ROWS = 256  # rows that are worked on together: in lanes of sixteen, and as the width of matrix products
PANEL = 256  # columns whose errors reach the others by a matrix product
_FACTOR_BLOCK = 512

SUPPORTED: frozenset[GGMLType] = frozenset(
    {
        GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_XS, GGMLType.IQ4_NL,
        GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.MXFP4,
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


_single_threaded = _SingleThreaded()


@dataclass(frozen=True)
class _Steps:
    """What settling the columns of a panel needs: see `visit`."""

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
    def of(cls, moments: np.ndarray, *, damping: float = 0.01) -> Curvature:
        """The curvature that `moments`, the mean of x xT, float64 or float32 [n, n], describe.

        `damping` is added to the diagonal, as a share of its mean: moments of few tokens are singular, and what they
        say of the directions that were hardly seen is not to be trusted. Raises QuantkitError for moments that are not
        finite, not symmetric, all zero or, damped, not positive definite.
        """
        moments = np.asarray(moments)
        if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or moments.shape[0] == 0:
            raise QuantkitError(f"second moments must be a square matrix, not of shape {moments.shape}")
        if not damping >= 0:
            raise QuantkitError(f"a damping of {damping} is not possible: use 0 or more")
        diagonal = np.diag(moments).astype(np.float64)
        scale = float(diagonal.mean())
        if not np.isfinite(moments).all() or not np.isfinite(scale):
            raise QuantkitError("second moments are not finite: the calibration text makes the model overflow")
        if scale == 0 and not moments.any():
            raise QuantkitError("second moments are all zero: nothing has passed through this matrix")
        if not (diagonal >= 0).all() or scale == 0:
            raise QuantkitError("second moments with a negative diagonal are no moments")
        work = moments[::-1, ::-1] / np.float64(scale)
        if not _symmetric(work):
            raise QuantkitError("second moments must be symmetric")
        work[np.diag_indices(len(work))] += damping
        damped = np.ascontiguousarray(work[::-1, ::-1], np.float32)
        with _single_threaded():
            _factorise(work)
        # The factor of the matrix turned round, turned round, is the upper triangular one; kept is its transpose.
        factor = np.ascontiguousarray(work[::-1, ::-1].T, np.float32)
        return cls(damped, factor, diagonal.astype(np.float32), scale, damping)

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


def round_with_feedback(
    weights: np.ndarray, curvature: Curvature, kind: GGMLType, *, threads: int | None = None
) -> Rounded:
    """Quantize float32 `weights` of shape (n_rows, n) to `kind` so that the loss under `curvature` is small.

    The bytes are real blocks of the type. A row whose loss would not become smaller has the bytes of the encoder with
    importance weights. The result is the same for any number of `threads`. Raises QuantkitError when `kind` is none of
    SUPPORTED, when blocks do not divide rows, and when the curvature is of another number of columns.
    """
    if kind not in SUPPORTED:
        raise QuantkitError(f"{kind.name} cannot be rounded with error feedback")
    n_rows, n = weights.shape
    if n != curvature.n:
        raise QuantkitError(f"rows of {n} weights cannot be rounded by the moments of {curvature.n} columns")
    nbytes = kind.row_nbytes(n)
    result = Rounded(np.empty((n_rows, nbytes), np.uint8), np.empty(n_rows), np.empty(n_rows))

    def work(start: int) -> None:
        part = slice(start, min(n_rows, start + ROWS))
        data, loss, plain_loss = _round_rows(np.ascontiguousarray(weights[part], np.float32), curvature, kind)
        result.data[part], result.loss[part], result.plain_loss[part] = data, loss, plain_loss

    with _single_threaded(), ThreadPoolExecutor(threads or default_threads()) as pool:
        for _ in pool.map(work, range(0, n_rows, ROWS)):
            pass
    return result


def _round_rows(rows: np.ndarray, curvature: Curvature, kind: GGMLType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to ROWS rows: bytes, loss, and the loss of the plain encoder."""
    plain = blocks.encode(rows, kind, curvature.importance)
    plain_loss = curvature.loss(rows - blocks.decode(plain, kind))
    settled = _Rounding(rows, curvature, parts()[kind])
    settled.first()
    for _ in range(settled.sweeps):
        settled.again()
    data = settled.packed()
    loss = curvature.loss(rows - blocks.decode(data, kind))
    better = loss < plain_loss  # false for what has overflowed
    data[~better] = plain[~better]
    return data, np.where(better, loss, plain_loss), plain_loss


class _Rounding:
    """Some rows on their way to being rounded: arrays of float32 [columns, rows]."""

    sweeps = 4

    def __init__(self, rows: np.ndarray, curvature: Curvature, made_of: Parts):
        self._count, n = rows.shape
        self._curvature, self._parts = curvature, made_of
        self._n_rows = -(-self._count // 16) * 16
        self._targets = np.zeros((n, self._n_rows), np.float32)
        self._targets[:, : self._count] = rows.T
        self._errors = np.zeros_like(self._targets)
        self._values = np.zeros_like(self._targets)
        n_sub = made_of.n_sub
        self._scales = np.zeros((n // n_sub, self._n_rows), np.float32)
        self._lows = np.zeros_like(self._scales)
        size = made_of.kind.block_size
        coded = made_of.scale_codes is not None
        self._units = np.zeros((n // size, 2, self._n_rows), np.float32) if coded else None
        order = np.argsort(made_of.values, kind="stable")
        values, chosen = np.unique(made_of.values[order], return_index=True)
        self._table = values
        uniform = len(values) == values[-1] - values[0] + 1
        self._borders = None if uniform else (values[1:] + values[:-1]) / np.float32(2)
        self._level_of = np.zeros(256, np.uint8)
        self._level_of[(values + 128).astype(np.int64)] = order[chosen]
        low, high = made_of.scale_codes or (0, 0)
        self._ranges = np.array([low, high, 0, made_of.top_low], np.float32)
        self._trials = _trials(made_of)

    def first(self) -> None:
        """Settle all columns in order: scales by the encoder's search, levels with feedback."""
        c, made_of = self._curvature, self._parts
        size, n_sub = made_of.kind.block_size, made_of.n_sub
        for start in range(0, c.n, size):
            stop = start + size
            steps = c._first(start, stop, n_sub)
            whole = c._first(start, stop, size)
            targets = self._targets[start:stop]
            if start:
                pushed = c._factor[start:stop, :start] @ self._errors[:start]
                targets = targets + whole.solve.reshape(size, size) @ pushed
            data = blocks.encode(np.ascontiguousarray(targets.T), made_of.kind, c._left[start:stop])
            self._take(data, start // size)
            errors = np.empty_like(targets)
            self._visit(start, stop, steps, np.ascontiguousarray(targets), targets, errors, False)
            self._errors[start:stop] = errors + (self._targets[start:stop] - targets)

    def again(self) -> None:
        """Settle every sub-block anew, as all others are."""
        c = self._curvature
        for start in range(0, c.n, PANEL):
            stop = min(c.n, start + PANEL)
            steps = c._again(start, stop, self._parts.n_sub)
            errors = self._errors[start:stop]
            outside = c._damped[start:stop] @ self._errors - steps.coupling.reshape(stop - start, -1) @ errors
            self._visit(start, stop, steps, self._targets[start:stop], outside, errors, True)

    def _visit(
        self, start: int, stop: int, steps: _Steps, targets: np.ndarray, outside: np.ndarray, errors: np.ndarray,
        again: bool,
    ) -> None:  # fmt: skip
        n_sub, size = self._parts.n_sub, self._parts.kind.block_size
        subs = slice(start // n_sub, stop // n_sub)
        visit(
            targets.reshape(-1), outside.reshape(-1), steps.coupling, steps.solve, steps.chain, steps.left,
            None if self._units is None else self._units[start // size].reshape(-1),
            self._scales[subs].reshape(-1), self._lows[subs].reshape(-1), self._values[start:stop].reshape(-1),
            errors.reshape(-1), self._trials, self._ranges, self._table, self._borders, self._n_rows, n_sub, again,
        )  # fmt: skip

    def _take(self, data: np.ndarray, block: int) -> None:
        """The scales of one block of every row, as the encoder has chosen them."""
        made_of = self._parts
        count = made_of.kind.block_size // made_of.n_sub
        codes = np.zeros((self._n_rows, 2 * count), np.int32)
        floats = np.empty((self._n_rows, 2), np.float32)
        made_of.take(data.reshape(-1), codes.reshape(-1), floats.reshape(-1))
        if self._units is not None:
            self._units[block] = floats.T
            self._scales[block * count : (block + 1) * count] = codes[:, :count].T
            self._lows[block * count : (block + 1) * count] = codes[:, count:].T
        else:
            self._scales[block], self._lows[block] = floats.T

    def packed(self) -> np.ndarray:
        """The rows as blocks: uint8 [n_rows, bytes of a row]."""
        made_of, n, count = self._parts, len(self._targets), self._count
        levels = self._level_of[(self._values.T[:count] + 128).astype(np.uint8)]
        n_blocks = n // made_of.kind.block_size
        if self._units is not None:
            both = np.stack([self._scales, self._lows]).reshape(2, n_blocks, -1, self._n_rows)
            codes = np.ascontiguousarray(both.transpose(3, 1, 0, 2)[:count], np.int32)
            floats = np.ascontiguousarray(self._units.transpose(2, 0, 1)[:count])
        else:
            codes = np.zeros(0, np.int32)
            floats = np.ascontiguousarray(np.stack([self._scales, self._lows]).transpose(2, 1, 0)[:count])
        out = np.empty((count, made_of.kind.row_nbytes(n)), np.uint8)
        made_of.put(levels.reshape(-1), codes.reshape(-1), floats.reshape(-1), out.reshape(-1))
        return out


def _trials(made_of: Parts) -> np.ndarray:
    """What to add to a sub-block's two codes, or to its scale as a share and to its low as a share of the scale."""
    if made_of.scale_codes is not None:
        scales, lows = [0, -1, 1, -2, 2, -3, 3], [0, -1, 1, -2, 2] if made_of.affine else [0]
    else:
        scales, lows = [0], [0]
    return np.array([(scale, low) for scale in scales for low in lows], np.float32).reshape(-1)
