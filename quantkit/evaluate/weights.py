"""A model's weights as float32, decoded when needed, kept when memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from quantkit.blocks import decode
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo
from quantkit.sources.source import TensorSource

# Weights that one task decodes: enough to hide its overhead, little enough to share a matrix among threads.
_DECODE_WEIGHTS = 1 << 19
# Rows that are looked up are read by slabs of so many bytes, but one by one where a slab has few of them.
_SLAB_BYTES = 1 << 22
_FEW_ROWS = 64

Runner = Callable[[Iterable[Callable[[], None]]], None]


class Weights:
    """Decodes the tensors of `source` on the threads of `run`, a function that carries out tasks side by side.

    With `keep` every matrix is decoded once and held; else the next matrix of the same role takes its place, in
    `scratch`, arrays by role, which models that take turns may share.
    """

    def __init__(self, source: TensorSource, run: Runner, keep: bool) -> None:
        self.keep = keep
        self._source, self._run = source, run
        self._kept: dict[str, np.ndarray] = {}
        self.scratch: dict[str, np.ndarray] = {}

    def vector(self, name: str, size: int) -> np.ndarray:
        """Tensor `name`, which must hold `size` numbers, as float32 [size]. Always kept."""
        if name not in self._kept:
            self.check(name, 1, size)
            self._kept[name] = self._rows(name, 0, 1).reshape(-1)
        return self._kept[name]

    def matrix(self, role: str, parts: Sequence[tuple[str, int]], n_in: int) -> np.ndarray:
        """Tensors below each other as float32 [all rows, n_in]; `parts` are their names and numbers of rows.

        Valid until the next call with the same `role`.
        """
        key = parts[0][0]
        if key in self._kept:
            return self._kept[key]
        for name, n_rows in parts:
            self.check(name, n_rows, n_in)
        out = self._new(role, sum(n for _, n in parts), n_in)
        at, pieces = 0, []
        for name, n_rows in parts:
            pieces.append((name, 0, n_rows, out[at : at + n_rows]))
            at += n_rows
        self._decode(pieces, n_in)
        if self.keep:
            self._kept[key] = out
        return out

    def constant(self, role: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Tensor `name`, a vector or a matrix, as float32 of this shape; a matrix is valid as `matrix` says."""
        *n_rows, n_in = shape
        return self.matrix(role, [(name, n_rows[0])], n_in) if n_rows else self.vector(name, n_in)

    def slab(self, role: str, name: str, n_rows: int, n_in: int, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of matrix `name`, which has `n_rows`, as float32.

        Valid until the next call with the same `role`.
        """
        if self.keep:
            return self.matrix(role, [(name, n_rows)], n_in)[start:stop]
        self.check(name, n_rows, n_in)
        out = self._new(role, stop - start, n_in)
        self._decode([(name, start, stop, out)], n_in)
        return out

    def lookup(self, name: str, rows: np.ndarray, n_in: int) -> np.ndarray:
        """The rows of matrix `name` with these indices, as float32 [rows.shape, n_in]."""
        present = self._source.tensors.get(name)
        info = self.check(name, 0 if present is None else present.n_rows, n_in)
        unique, inverse = np.unique(rows, return_inverse=True)
        if unique.size and not 0 <= unique[0] <= unique[-1] < info.n_rows:
            wrong = unique[-1] if unique[0] >= 0 else unique[0]
            raise QuantkitError(f"{self._source.label}: token {wrong} is not one of the {info.n_rows} of {name}")
        encoded = self._some_rows(name, unique, info)
        return decode(encoded, info.type)[inverse].reshape(*rows.shape, n_in)

    def _some_rows(self, name: str, wanted: np.ndarray, info: TensorInfo) -> np.ndarray:
        """The encoded rows `wanted`, ascending, without holding the whole matrix: few by themselves, many by slabs."""
        step = max(1, _SLAB_BYTES // info.type.row_nbytes(info.n_per_row))
        found = [np.empty((0, info.type.row_nbytes(info.n_per_row)), np.uint8)]
        for slab in np.split(wanted, np.flatnonzero(np.diff(wanted // step)) + 1):
            if len(slab) <= _FEW_ROWS:
                found += [self._source.read(name, row, row + 1) for row in slab.tolist()]
            else:
                start, stop = int(slab[0]), int(slab[-1]) + 1
                found.append(self._source.read(name, start, stop)[slab - start])
        return np.concatenate(found)

    def _new(self, role: str, n_rows: int, n_in: int) -> np.ndarray:
        if self.keep:
            return np.empty((n_rows, n_in), np.float32)
        if role not in self.scratch or self.scratch[role].size < n_rows * n_in:
            self.scratch[role] = np.empty(n_rows * n_in, np.float32)
        return self.scratch[role][: n_rows * n_in].reshape(n_rows, n_in)

    def check(self, name: str, n_rows: int, n_in: int) -> TensorInfo:
        """The entry of tensor `name`. Raises QuantkitError where it is missing or of another shape."""
        info = self._source.tensors.get(name)
        if info is None:
            raise QuantkitError(f"{self._source.label}: the tensor {name} is missing")
        if (info.n_rows, info.n_per_row) != (n_rows, n_in):
            raise QuantkitError(
                f"{self._source.label}: tensor {name} has shape {list(info.shape)}, "
                f"but the metadata asks for {n_rows} rows of {n_in}"
            )
        return info

    def _rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        return decode(self._source.read(name, start, stop), self._source.tensors[name].type, out)

    def _decode(self, pieces: Iterable[tuple[str, int, int, np.ndarray]], n_in: int) -> None:
        """Decode rows start to stop of each named tensor into its array, cut into tasks."""
        step = max(1, _DECODE_WEIGHTS // n_in)

        def task(name: str, start: int, stop: int, out: np.ndarray) -> Callable[[], None]:
            def decode_rows() -> None:
                self._rows(name, start, stop, out)

            return decode_rows

        pieces = list(pieces)
        self._run(
            task(name, at, min(at + step, stop), out[at - start : min(at + step, stop) - start])
            for name, start, stop, out in pieces
            for at in range(start, stop, step)
        )
        for name, *_ in pieces:
            self._source.release(name)


class Replaced(Weights):
    """The weights `base`, with other values for some tensors: `tensors` are float32 [n_rows, n_in] by name."""

    def __init__(self, base: Weights, tensors: Mapping[str, np.ndarray]) -> None:
        self.keep = base.keep
        self._base, self._tensors = base, tensors

    def vector(self, name: str, size: int) -> np.ndarray:
        """See `Weights`: those of `base`."""
        return self._base.vector(name, size)

    def matrix(self, role: str, parts: Sequence[tuple[str, int]], n_in: int) -> np.ndarray:
        """See `Weights`; a new matrix where a part is replaced."""
        whole: np.ndarray = self._base.matrix(role, parts, n_in)
        if not any(name in self._tensors for name, _ in parts):
            return whole
        whole = np.array(whole)
        at = 0
        for name, n_rows in parts:
            if name in self._tensors:
                whole[at : at + n_rows] = self._tensors[name]
            at += n_rows
        return whole

    def slab(self, role: str, name: str, n_rows: int, n_in: int, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        if name in self._tensors:
            part: np.ndarray = self._tensors[name][start:stop]
            return part
        return self._base.slab(role, name, n_rows, n_in, start, stop)

    def lookup(self, name: str, rows: np.ndarray, n_in: int) -> np.ndarray:
        """See `Weights`."""
        if name in self._tensors:
            found: np.ndarray = self._tensors[name][rows]
            return found
        return self._base.lookup(name, rows, n_in)
