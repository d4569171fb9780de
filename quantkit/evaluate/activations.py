"""Where activations stand: in memory, or in a file where they are too large for that."""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError


class Activations:
    """What one layer hands to the next: float32 [n_chunks, n_ctx, width], in memory or in a file.

    More than `budget` bytes go to a temporary file in `directory`, which goes away with the values; fewer, to memory
    that `new` gives. Raises QuantkitError where the disk has no room for them.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        budget: int,
        directory: Path | None = None,
        new: Callable[[tuple[int, ...]], np.ndarray] = partial(np.empty, dtype=np.float32),  # noqa: B008
    ) -> None:
        nbytes = 4 * math.prod(shape)
        if nbytes <= budget or not nbytes:
            self.values: np.ndarray = new(shape)
            return
        home = directory or Path(tempfile.gettempdir())
        if free_disk(home) < nbytes:
            raise QuantkitError(
                f"{home}: activations take {nbytes / 1e9:.1f} GB, more than is free there: use fewer chunks of text"
            )
        with tempfile.TemporaryFile(prefix="activations-", suffix=".f32", dir=home) as file:
            file.truncate(nbytes)
            self.values = np.memmap(file, np.float32, "r+", shape=shape)

    def close(self) -> None:
        """Give back memory, and the file."""
        self.values = np.empty((0, 0, 0), np.float32)


def free_disk(home: Path | None = None) -> int:
    """The bytes that are free in `home`, by default where temporary files go."""
    return shutil.disk_usage(home or tempfile.gettempdir()).free


def let_go(x: np.ndarray, part: slice) -> None:
    """Let the system reuse the memory of chunks `part` of `x`, if `x` is in a file: it is read again when needed."""
    mapped: Any = getattr(x, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    size = x[0].nbytes
    before = x.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    first = -(-(before + part.start * size) // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (before + part.stop * size) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, stop - first)
