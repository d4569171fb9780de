"""What errors of a matrix's columns cost, alone and together, factored so that they can be settled in order.

What a matrix's rounding does to its output is `(w - q) H (w - q)T` for each row, H being the mean of `x xT` over its
input. With `H = R RT`, R upper triangular, it is `|(w - q) R|^2`: one term for each column, in which only columns up to
that one appear.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from quantkit.errors import QuantkitError

DAMPING = 0.01  # of the moments' diagonal, as a share of its mean
_FACTOR_BLOCK = 512


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
class Steps:
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
        self.damped, self.factor = damped, factor
        self.left = np.ascontiguousarray(np.diag(factor) ** 2)
        self._steps: dict[tuple[str, int, int, int], Steps] = {}
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
        # Reversed, so that the lower triangular factor of numpy becomes the upper triangular one.
        moments = np.asarray(moments)
        work, scale = normalised(moments[::-1, ::-1], "second moments")
        importance = np.diag(moments).astype(np.float32)
        work[np.diag_indices(len(work))] += damping
        damped = np.ascontiguousarray(work[::-1, ::-1], np.float32)
        with single_threaded():
            factorise(work)
        # Reversed, factored and reversed again: the upper triangular factor. Its transpose is kept.
        factor = np.ascontiguousarray(work[::-1, ::-1].T, np.float32)
        return cls(damped, factor, importance, scale, damping)

    def host(self) -> Curvature:
        """This, which is the processor's."""
        return self

    def loss(self, errors: np.ndarray) -> np.ndarray:
        """`e H eT` of each row of `errors`, float32 [n_rows, n], with H as it was before damping: float64 [n_rows]."""
        through = errors @ self.damped
        damped = np.einsum("ij,ij->i", through, errors, dtype=np.float64)
        squares = np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
        return np.asarray((damped - self.damping * squares) * self.scale)

    def first(self, start: int, stop: int, n_sub: int) -> Steps:
        """For columns of which those before are settled and those after are free."""
        return self._cached("first", start, stop, n_sub)

    def again(self, start: int, stop: int, n_sub: int) -> Steps:
        """For columns all of whose others are settled."""
        return self._cached("again", start, stop, n_sub)

    def _cached(self, which: str, start: int, stop: int, n_sub: int) -> Steps:
        with self._lock:
            key = which, start, stop, n_sub
            if key not in self._steps:
                source = self.factor if which == "first" else self.damped
                panel = np.ascontiguousarray(source[start:stop, start:stop])
                each = [slice(at, at + n_sub) for at in range(0, stop - start, n_sub)]
                own = np.stack([panel[at, at] for at in each]).astype(np.float64)
                if which == "first":
                    factors = own
                else:
                    factors = np.linalg.cholesky(own[:, ::-1, ::-1])[:, ::-1, ::-1].transpose(0, 2, 1)
                diagonal = np.diagonal(factors, axis1=1, axis2=2)
                self._steps[key] = Steps(
                    panel.reshape(-1),
                    np.ascontiguousarray(np.linalg.inv(own), np.float32).reshape(-1),
                    np.ascontiguousarray(factors / diagonal[:, :, None], np.float32).reshape(-1),
                    np.ascontiguousarray(diagonal**2, np.float32).reshape(-1),
                )
            return self._steps[key]


def normalised(moments: np.ndarray, what: str) -> tuple[np.ndarray, float]:
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


def factorise(a: np.ndarray) -> None:
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
