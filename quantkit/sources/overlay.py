"""A model with some of its tensors replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.sources.source import TensorSource

if TYPE_CHECKING:
    import numpy as np

ReadRows = Callable[[int, int], "np.ndarray"]


class Overlay:
    """The source `base` with other data for some tensors: a TensorSource.

    `replaced` are types, and functions that read encoded rows from a first one to before another, uint8 [rows, bytes of
    a row], by tensor name. Shapes stay.
    """

    def __init__(self, base: TensorSource, replaced: Mapping[str, tuple[GGMLType, ReadRows]]) -> None:
        self._base, self._read = base, {name: read for name, (_, read) in replaced.items()}
        self.tensors: dict[str, TensorInfo] = {
            name: replace(info, type=replaced[name][0]) if name in replaced else info
            for name, info in base.tensors.items()
        }

    @property
    def label(self) -> str:
        """The base's."""
        return self._base.label

    @property
    def metadata(self) -> Metadata:
        """The base's."""
        return self._base.metadata

    @property
    def files(self) -> Sequence[Path]:
        """The base's."""
        return self._base.files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See TensorSource."""
        if name not in self._read:
            return self._base.read(name, start, stop)
        return self._read[name](start, self.tensors[name].n_rows if stop is None else stop)

    def release(self, name: str) -> None:
        """See TensorSource."""
        if name not in self._read:
            self._base.release(name)
