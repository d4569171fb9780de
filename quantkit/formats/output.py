"""Writing GGUF files: a file appears under its name only when it is whole."""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Container, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quantkit.formats.atomic import OutputFile
from quantkit.formats.gguf import DEFAULT_ALIGNMENT, Metadata, TensorInfo, encode_header, padded

if TYPE_CHECKING:
    import numpy as np


class GGUFOutput:
    """A GGUF file being written: the header at once, then the bytes of the tensors, in any pieces.

    A context manager. `target` is a path, or a file of an `OutputGroup`, which then decides when it appears. `write`
    fills the tensors in header order, `write_tensor_at` any of them anywhere; every byte is written once. When the
    block ends well, all that the header promises must have been written (ValueError else); tensors named in `present`
    are in the file already, from a run that was stopped. Raises QuantkitError when
    the disk is too small (asked before the first byte) or the file cannot be written.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | OutputFile,
        metadata: Metadata,
        tensors: Sequence[TensorInfo],
        present: Container[str] = (),
    ) -> None:
        alignment = metadata.alignment if "general.alignment" in metadata else DEFAULT_ALIGNMENT
        self._header = encode_header(metadata, tensors, alignment)
        at = len(self._header)
        self._starts: dict[str, int] = {}
        self._missing: dict[str, _Extents] = {}
        for info in tensors:
            self._starts[info.name] = at
            if info.nbytes and info.name not in present:
                self._missing[info.name] = _Extents(info.nbytes)
            at += padded(info.nbytes, alignment)
        self.nbytes = at
        self._n_tensors = len(tensors)
        self._file = OutputFile.of(target)
        self._file.nbytes = self.nbytes
        self.path = self._file.path

    def __enter__(self) -> GGUFOutput:
        """Create the temporary file and write the header."""
        try:
            self._file.begin(self.nbytes)
            self._file.write(self._header)
        except BaseException:
            self._file.abandon()
            raise
        return self

    @property
    def complete(self) -> bool:
        """Whether every tensor has been written."""
        return not self._missing

    def write(self, data: np.ndarray) -> None:
        """Write contiguous bytes of the first tensor that is not whole, where its first gap begins."""
        if not data.nbytes:
            return
        if self.complete:
            raise ValueError(f"{self.path}: every tensor has been written")
        name, extents = next(iter(self._missing.items()))
        self.write_tensor_at(name, extents.first_gap, data)

    def write_tensor_at(self, name: str, offset: int, data: np.ndarray) -> None:
        """Write contiguous bytes of tensor `name` at byte `offset` of it. Safe from several threads.

        Raises ValueError for bytes beyond the tensor's end, and for those that have been written before.
        """
        with self._file.group.lock:
            extents = self._missing.get(name)
            if extents is None or not extents.add(offset, offset + data.nbytes):
                raise ValueError(
                    f"{self.path}: {data.nbytes} bytes at {offset} of {name!r} are not its own, or written twice"
                )
            if extents.whole:
                del self._missing[name]
            self._file.write_at(self._starts[name] + offset, data)

    def place(self, name: str) -> tuple[Path, tuple[int, int], int]:
        """Where another process may write tensor `name`: the unfinished file, its device and inode, and the offset."""
        path, identity = self._file.hand_out()
        return path, identity, self._starts[name]

    def written_elsewhere(self, name: str, offset: int, nbytes: int) -> None:
        """Take note that another process has written `nbytes` at byte `offset` of tensor `name`, and synced them."""
        with self._file.group.lock:
            extents = self._missing.get(name)
            if extents is None or not extents.add(offset, offset + nbytes):
                raise ValueError(f"{self.path}: {nbytes} bytes at {offset} of {name!r} written twice")
            if extents.whole:
                del self._missing[name]

    def __contains__(self, name: object) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._starts

    def sync(self) -> None:
        """See that what has been written is on the disk."""
        self._file.sync()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name, or remove what there is of it."""
        if kind is not None:
            self._file.abandon()
            return
        if not self.complete:
            self._file.abandon()
            n = self._n_tensors
            raise ValueError(f"{self.path}: {n - len(self._missing)} of {n} tensors were written")
        try:
            self._file.extend(self.nbytes)  # the padding after the last tensor
        except BaseException:
            self._file.abandon()
            raise
        self._file.finish()


class _Extents:
    """Which bytes of `size` have been written: disjoint, sorted intervals."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> bool:
        """Add an interval; False, and no change, where it overlaps another or leaves the range."""
        if not 0 <= start <= stop <= self._size:
            return False
        if start == stop:
            return True
        at = bisect(self._starts, start)
        if (at and self._stops[at - 1] > start) or (at < len(self._starts) and self._starts[at] < stop):
            return False
        if at and self._stops[at - 1] == start:
            at -= 1
            self._stops[at] = stop
        else:
            self._starts.insert(at, start)
            self._stops.insert(at, stop)
        if at + 1 < len(self._starts) and self._starts[at + 1] == stop:
            self._stops[at] = self._stops[at + 1]
            del self._starts[at + 1], self._stops[at + 1]
        return True

    @property
    def first_gap(self) -> int:
        """Where the first byte that is missing stands."""
        return self._stops[0] if self._starts[:1] == [0] else 0

    @property
    def whole(self) -> bool:
        """Whether all is there."""
        return self.first_gap == self._size
