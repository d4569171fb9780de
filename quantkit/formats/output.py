"""Writing GGUF files: a file appears under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import DEFAULT_ALIGNMENT, Metadata, TensorInfo, encode_header, padded

if TYPE_CHECKING:
    import numpy as np


# Bytes given to the system at a time. Linux finds room in its cache for an eighth of a megabyte several times faster
# than for several megabytes at once.
WRITE = 1 << 17


class GGUFOutput:
    """A GGUF file being written: the header at once, then the tensors' bytes in header order, in pieces.

    A context manager. The bytes go to `NAME.partial`, which takes the final name when the block ends well and
    everything promised in the header was written, and is removed otherwise. Raises QuantkitError when the disk
    is too small (asked before the first byte) or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Metadata, tensors: Sequence[TensorInfo]) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        alignment = metadata.alignment if "general.alignment" in metadata else DEFAULT_ALIGNMENT
        self._header = encode_header(metadata, tensors, alignment)
        self._sizes = [info.nbytes for info in tensors]
        self._alignment = alignment
        self.nbytes = len(self._header) + sum(padded(size, alignment) for size in self._sizes)
        self._tensor, self._written = 0, 0
        self._skip_empty()

    def __enter__(self) -> GGUFOutput:
        """Open the partial file and write the header."""
        try:
            free = shutil.disk_usage(self.path.parent).free
            if free < self.nbytes:
                raise QuantkitError(
                    f"{self.path}: needs {self.nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there"
                )
            if self.path.is_dir():
                raise QuantkitError(f"{self.path}: is a directory; name the file to write")
            self._file = open(self.partial, "wb", buffering=0)
        except OSError as error:
            raise QuantkitError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        try:
            self._put(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    @property
    def complete(self) -> bool:
        """Whether every tensor has been written."""
        return self._tensor == len(self._sizes)

    def write(self, data: np.ndarray) -> None:
        """Append contiguous bytes of the current tensor; its padding follows its last byte by itself."""
        self._put(data.data.cast("B"))
        self._written += data.nbytes
        size = self._sizes[self._tensor]
        if self._written > size:
            raise ValueError(f"{self.path}: more bytes than tensor {self._tensor} has")
        if self._written == size:
            self._put(bytes(padded(size, self._alignment) - size))
            self._tensor += 1
            self._written = 0
            self._skip_empty()

    def _skip_empty(self) -> None:
        while not self.complete and self._sizes[self._tensor] == 0:
            self._tensor += 1

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view[:WRITE]) :]
        except OSError as error:
            raise QuantkitError(
                f"{self.path}: {error.strerror or error}; it needs {self.nbytes / 1e9:.2f} GB in all"
            ) from None

    def _discard(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name, or remove what there is of it."""
        if kind is not None:
            self._discard()
            return
        if not self.complete:
            self._discard()
            raise ValueError(f"{self.path}: {self._tensor} of {len(self._sizes)} tensors were written")
        self._file.close()
        try:
            self.partial.replace(self.path)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise QuantkitError(f"{self.path}: cannot be written: {error.strerror or error}") from None
