"""A model seen as GGUF: metadata, and named tensors that load when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    import numpy as np


class TensorSource(Protocol):
    """Where tensors come from: a GGUF file, or a checkpoint seen through its architecture.

    Whatever takes a source takes either. Tensor names, shapes and types are GGUF's.
    """

    @property
    def label(self) -> str:
        """The file or directory, as the user would name it in a message."""
        ...

    @property
    def metadata(self) -> Metadata:
        """Everything that a GGUF file of this model holds before its tensors."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name, in file order."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of tensor `name`, encoded in its type: uint8 of shape (rows, bytes of a row).

        A view of the file where the bytes stand there as they are, else a new array. Safe from several threads.
        """
        ...
