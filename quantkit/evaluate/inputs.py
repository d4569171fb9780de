"""What the matrices of a model are multiplied with, summed over a text: an importance matrix, or whole second moments.

The rows reach the sums from many threads and in any order. They are put in their place and added in that order, by
tasks whose cut does not depend on the number of threads: neither do the sums, to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from typing import Any, NamedTuple, Protocol

import numpy as np

from quantkit.compile.kernel import kernel
from quantkit.evaluate.threads import Threads

# Columns of the second moments that a task adds up.
_TILE = 256
# The share of the weights that tokens have alike where gradients weigh them.
ALIKE = 0.1

# The names of tensors that share an input, and the number of the expert that they belong to, None for other tensors.
Key = tuple[tuple[str, ...], "int | None"]


class InputSum(NamedTuple):
    """Sums over `n_rows` rows x: float64 [n_in] of the squares of x, or [n_in, n_in] of the products x xT.

    The products that a GPU added up are torch's, and still there: see `on_host`.
    """

    total: Any
    n_rows: int


def on_host(array: Any) -> np.ndarray:
    """An array that may be torch's, on a GPU, as numpy's."""
    found: np.ndarray = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return found


def squared_lengths(rows: Any) -> np.ndarray:
    """The squared length of each row, float32 [n_rows]; `rows` may be numpy's or torch's."""
    if not isinstance(rows, np.ndarray):
        rows = rows.float().square().sum(1)
        return on_host(rows)
    found: np.ndarray = np.einsum("ij,ij->i", rows, rows)
    return found


def all_finite(array: Any) -> bool:
    """Whether an array, of numpy or torch, holds neither NaN nor infinity."""
    return bool(np.isfinite(array).all() if isinstance(array, np.ndarray) else array.isfinite().all())


class Balance:
    """How much each token's row counts in sums of products, over chunks of `n_ctx` tokens.

    Where gradients are known, a row counts as much as they say: errors of what a matrix makes of a token change the
    model's predictions by the square of their gradient. `gradients(name)` gives the squared lengths of the gradients by
    what tensor `name` makes of each token of the text, float32 [n_tokens], or None; `first_token` is the number of the
    text's token that the next batch begins with, for whoever runs the batches to set. A tenth of the weight is shared
    by all tokens alike: where a model is certain its gradients vanish, but its errors do not. What it is certain of in
    one text, such as runs of spaces, it may not be in another.

    Where they are not, all rows count alike whatever their length: what follows a matrix is mostly normalised, and the
    longest rows would be made up for at the cost of all others. The first token of a chunk counts as an eighth of it:
    where there is nothing to attend to, trained models attend to the first token (attention sinks, Xiao et al., arXiv
    2309.17453). What is wrong there is in all that follows, and its rows are the least like the others.
    """

    def __init__(self, n_ctx: int, gradients: Callable[[str], np.ndarray | None] | None = None) -> None:
        self.n_ctx, self.first_token = n_ctx, 0
        self._gradients = gradients
        self._roots: dict[tuple[str, ...], np.ndarray | None] = {}

    @property
    def first(self) -> float:
        """The weight of a chunk's first token where no gradients are known; others have 1."""
        return max(1.0, self.n_ctx / 8)

    def roots(self, names: tuple[str, ...]) -> np.ndarray | None:
        """The roots of the weights of all the text's tokens, float32, for the input of `names`; None: no gradients.

        Those of tensors that share an input count alike: each has a mean weight of 1.
        """
        if self._gradients is None:
            return None
        if names not in self._roots:
            known = [each for each in map(self._gradients, names) if each is not None]
            weights = [each / mean for each in known if (mean := each.mean(dtype=np.float64)) > 0]
            mixed = ALIKE + (1 - ALIKE) * np.mean(weights, 0) if weights else None
            # Several threads may find that; none may see it half made.
            self._roots[names] = None if mixed is None else np.sqrt(mixed).astype(np.float32)
        return self._roots[names]

    def balanced(self, names: tuple[str, ...], rows: np.ndarray, at: int | np.ndarray) -> np.ndarray:
        """Float32 `rows` [n, n_in], what `names` are multiplied with, scaled by the roots of their weights.

        For `at` see `parts.Observer`.
        """
        places = at if isinstance(at, np.ndarray) else at + np.arange(len(rows))
        roots = self.roots(names)
        if roots is not None:
            scales = roots[self.first_token + places]
        else:
            lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
            sizes = np.where(places % self.n_ctx == 0, self.first**0.5, 1.0)
            scales = np.divide(sizes, lengths, out=lengths, where=lengths > 0).astype(np.float32)
        with np.errstate(invalid="ignore"):  # an infinite row becomes NaN, and is found with the sums
            scaled: np.ndarray = rows * scales[:, None]
        return scaled


class Sums(Protocol):
    """Sums over the inputs of matrices, whatever backend adds them."""

    def add(self, names: tuple[str, ...], rows: np.ndarray, at: int = 0) -> None:
        """Add float32 `rows` [n, n_in] from row `at` of the batch on, what `names` are multiplied with after layers."""
        ...

    def settle(self) -> None:
        """Add up what a batch brought: to be called after each batch."""
        ...

    def take(self) -> dict[Key, InputSum]:
        """The sums of what was settled, by tensors and expert; they begin anew."""
        ...

    def take_groups(self, n_rows: int) -> list[dict[Key, InputSum]]:
        """The sums of each `n_rows` rows of a batch that is not settled, where nothing ran together across these.

        A backend that knows no places gives one sum of the whole batch.
        """
        ...


class InputSums:
    """Sums over the inputs of matrices through numpy. `observe` is the observer of a model.

    With `full` the sums are those of x xT, of rows as `balance` weighs them, else of the squares of x. An input is
    summed when one of the tensors that share it is in `wanted`; None for all. They are added up on `threads`. With
    `full`, the inputs of a batch stay in memory until `settle`.
    """

    def __init__(
        self,
        full: bool,
        threads: Threads,
        wanted: Container[str] | None = None,
        balance: Balance | None = None,
    ) -> None:
        self._full, self._threads, self._wanted, self._balance = full, threads, wanted, balance
        self._lock = threading.Lock()
        self._pieces: dict[Key, list[tuple[int, int, np.ndarray]]] = {}
        self._joined: dict[Key, np.ndarray] = {}
        self._totals: dict[Key, np.ndarray] = {}
        self._counts: dict[Key, int] = {}

    def observe(self, names: tuple[str, ...], rows: np.ndarray, at: int | np.ndarray, expert: int | None) -> None:
        """Take `rows` of the batch, which tensors `names` are multiplied with; for `at` see `parts.Observer`."""
        if self._wanted is not None and not any(name in self._wanted for name in names):
            return
        if not self._full:
            piece = _squares_by_column(rows)
        else:
            piece = rows.copy() if self._balance is None else self._balance.balanced(names, rows, at)
        if isinstance(at, np.ndarray):
            at = int(at[0]) if len(at) else 0
        with self._lock:
            self._pieces.setdefault((names, expert), []).append((at, len(rows), piece))

    def add(self, names: tuple[str, ...], rows: np.ndarray, at: int = 0) -> None:
        """See `Sums`."""
        self.observe(names, rows, at, None)

    def take_groups(self, n_rows: int) -> list[dict[Key, InputSum]]:
        """See `Sums`: of squares alone."""
        pieces, self._pieces = self._pieces, {}
        groups: dict[int, dict[Key, InputSum]] = {}
        for key, parts in pieces.items():
            for at, n, squares in sorted(parts, key=lambda part: part[0]):
                group = groups.setdefault(at // n_rows, {})
                if key in group:
                    total, before = group[key]
                    total += squares
                    group[key] = InputSum(total, before + n)
                else:
                    group[key] = InputSum(squares, n)
        return [groups[number] for number in sorted(groups)]

    def settle(self) -> None:
        """See `Sums`."""
        pieces, self._pieces = self._pieces, {}
        products = []
        for key in list(pieces):
            parts = sorted(pieces.pop(key), key=lambda part: part[0])
            self._counts[key] = self._counts.get(key, 0) + sum(n for _, n, _ in parts)
            if self._full:
                rows = self._joined_rows(key, [rows for _, _, rows in parts])
                n = rows.shape[1]
                total = self._totals.setdefault(key, np.zeros((n, n)))
                products += [(rows, total, start) for start in range(0, n, _TILE)]
                continue
            total = self._totals.setdefault(key, np.zeros(parts[0][2].shape))
            for _, _, squares in parts:
                total += squares
        # The largest first, so that no thread is left with one at the end.
        products.sort(key=lambda product: product[2] - product[0].shape[1])
        with self._threads.alone() as each:
            each(lambda number: _add_columns(*products[number]), len(products))

    def _joined_rows(self, key: Key, pieces: list[np.ndarray]) -> np.ndarray:
        """The pieces below each other, where those of the last batch were: new memory takes as long as the copy."""
        shape = sum(map(len, pieces)), pieces[0].shape[1]
        room = self._joined.get(key)
        if room is None or len(room) < shape[0]:
            room = self._joined[key] = np.empty(shape, np.float32)
        return np.concatenate(pieces, out=room[: shape[0]])

    def take(self) -> dict[Key, InputSum]:
        """See `Sums`."""
        self._joined = {}
        totals, self._totals = self._totals, {}
        counts, self._counts = self._counts, {}
        if self._full:
            for total in totals.values():
                mirror(total)
        return {key: InputSum(total, counts[key]) for key, total in totals.items()}


def _add_columns(rows: np.ndarray, total: np.ndarray, start: int) -> None:
    """Add the columns of `rows`.T @ `rows` from `start` on that are a tile, its lower triangle and what is below.

    The products of a batch are summed in float32 by BLAS. numpy has it work out only half of a matrix times its own
    transpose.
    """
    stop = min(start + _TILE, rows.shape[1])
    columns = rows[:, start:stop]
    total[start:stop, start:stop] += columns.T @ columns
    total[stop:, start:stop] += rows[:, stop:].T @ columns


def mirror(square: np.ndarray) -> None:
    """Copy the lower triangle of `square` onto the upper one, in place, without a second matrix of its size."""
    n = len(square)
    for start in range(0, n, _TILE):
        stop = min(start + _TILE, n)
        square[start:stop, stop:] = square[stop:, start:stop].T
        block = square[start:stop, start:stop]
        block[:] = np.tril(block) + np.tril(block, -1).T


def _squares_by_column(x: np.ndarray) -> np.ndarray:
    """The sum of the squares of each column of `x` [rows, n]: float64 [n]."""
    sums = np.zeros(x.shape[1])
    add_squares(x, sums)
    return sums


@kernel
def add_squares(x: np.ndarray, sums: np.ndarray) -> None:
    """Add the squares of the rows of `x` [rows, n] to `sums`, float64 [n]."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            v = np.float64(row[j])
            sums[j] += v * v
