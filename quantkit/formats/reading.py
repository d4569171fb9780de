"""Reading pieces of large files: by position, from several threads, and safe from a file that changes meanwhile.

Memory maps would be simpler, but a file that shrinks under a map ends the process with SIGBUS. Here every read says
in one line that the file has changed. Few files are open at once, however many shards a model has.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    import numpy as np

# Files held open at once, far below the usual limit of a process.
MOST_OPEN = 32


class _Descriptor:
    """An open file, closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_lock = threading.Lock()
_open: OrderedDict[int, _Descriptor] = OrderedDict()  # by the id of the InputFile, last used last


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class InputFile:
    """A file to read from by position. `nbytes` is its size when it was first opened.

    Raises QuantkitError when it cannot be opened or is no regular file, and every method when it has changed since.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: tuple[int, ...] = ()
        weakref.finalize(self, _open.pop, id(self), None).atexit = False
        self.nbytes = os.fstat(self._descriptor().number).st_size

    def _descriptor(self) -> _Descriptor:
        with _lock:
            found = _open.get(id(self))
            if found is not None:
                _open.move_to_end(id(self))
                return found
        try:
            if not self.path.is_file():
                # A pipe would wait for a writer, and a device has no size.
                what = "a directory" if self.path.is_dir() else "not a regular file" if self.path.exists() else None
                raise QuantkitError(f"{self.path}: {what or 'no such file'}")
            found = _Descriptor(self.path)
            now = _identity(os.fstat(found.number))
        except OSError as error:
            raise QuantkitError(f"{self.path}: {error.strerror or error}") from None
        if self._known and now != self._known:
            raise self.changed()
        self._known = now
        with _lock:
            _open[id(self)] = found
            while len(_open) > MOST_OPEN:
                _open.popitem(last=False)
        return found

    def changed(self) -> QuantkitError:
        """The error that says that this is not the file any more that was opened."""
        return QuantkitError(f"{self.path}: the file has changed while it was read; start again when it is whole")

    def check(self) -> None:
        """Raise QuantkitError when the file's size or time has changed since it was opened."""
        if _identity(os.fstat(self._descriptor().number)) != self._known:
            raise self.changed()

    def read_into(self, offset: int, buffer: np.ndarray | bytearray) -> None:
        """Fill the contiguous `buffer` with the bytes from `offset` on. Safe from several threads."""
        left, descriptor = memoryview(buffer).cast("B"), self._descriptor()  # type: ignore[arg-type]
        while left:
            try:
                count = _read(descriptor.number, left, offset)
            except OSError as error:
                raise QuantkitError(f"{self.path}: cannot be read: {error.strerror or error}") from None
            if count == 0:
                raise self.changed()
            left, offset = left[count:], offset + count

    def read(self, offset: int, nbytes: int) -> bytes:
        """`nbytes` bytes from `offset` on, which must lie within the file."""
        if offset + nbytes > self.nbytes:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + nbytes} of {self.nbytes}")
        data = bytearray(nbytes)
        self.read_into(offset, data)
        return bytes(data)


if hasattr(os, "preadv"):

    def _read(descriptor: int, buffer: memoryview, offset: int) -> int:
        # Linux reads at most 2 GiB at a time.
        return os.preadv(descriptor, [buffer[: 1 << 30]], offset)

else:  # Windows has no reading by position

    def _read(descriptor: int, buffer: memoryview, offset: int) -> int:
        with _lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(buffer[: 1 << 24]))
        buffer[: len(data)] = data
        return len(data)
