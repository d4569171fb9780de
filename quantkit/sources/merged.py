"""A model with LoRA adapters merged into its weights while these are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.compile.kernel import allocating_kernel
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo
from quantkit.sources.overlay import Overlay, ReadRows
from quantkit.sources.source import GGUFSource, TensorSource

_EMBEDDING = "token_embd.weight"
_MAX_SCALE = 1e6


class MergedModel(Overlay):
    """The model `base` with adapters merged into its weights: a TensorSource. See `merge_lora`."""

    def __init__(self, base: TensorSource, adapters: Sequence[tuple[TensorSource, float]]) -> None:
        self._adapters = tuple(adapters)
        changes: dict[str, list[_Change]] = {}
        for adapter, scale in self._adapters:
            for name, change in _changes(base, adapter, scale).items():
                changes.setdefault(name, []).append(change)
        self._changes = changes
        self._lock = threading.Lock()
        replaced: dict[str, tuple[GGMLType, ReadRows]] = {
            name: (GGMLType.F32, partial(self._merged, name)) for name in changes
        }
        super().__init__(base, replaced)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, its parts are opened again, for another process."""
        return MergedModel, (self._base, self._adapters)

    @property
    def files(self) -> Sequence[Path]:
        """The base's and the adapters'."""
        return [*self._base.files, *(path for adapter, _ in self._adapters for path in adapter.files)]

    def release(self, name: str) -> None:
        """See TensorSource."""
        self._base.release(name)
        for change in self._changes.get(name, ()):
            change.release()

    def _merged(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of tensor `name` with all that changes it, float32 as bytes."""
        rows = _decoded(self._base, name, start, stop)
        for change in self._changes[name]:
            with self._lock:  # what several threads need is read once
                factor = change.load()
            rows = change.applied(rows, start, stop, factor)
        return rows.view(np.uint8)


@dataclass
class _Change:
    """What an adapter does to a tensor: an adapter's tensor takes its place, or scale * B A is added.

    `rows` and `columns` are the names of the adapter's factors [rows, rank] and [rank, row length], or with
    `transposed` [row length, rank]; `matrix` is the number of rows of each matrix, of which there may be several.
    """

    adapter: TensorSource
    scale: float
    rows: str
    columns: str = ""
    transposed: bool = False
    matrix: int = 0
    held: np.ndarray | None = None

    def load(self) -> np.ndarray | None:
        """The factor that all rows need, float32 [matrices, rank, row length], which is held until `release`."""
        if self.columns and self.held is None:
            whole = _decoded(self.adapter, self.columns, 0, self.adapter.tensors[self.columns].n_rows)
            whole = np.ascontiguousarray(whole.T if self.transposed else whole)
            self.held = whole.reshape(-1, self.adapter.tensors[self.rows].n_per_row, whole.shape[1])
        return self.held

    def release(self) -> None:
        """Hold nothing."""
        self.held = None
        for name in filter(None, (self.rows, self.columns)):
            self.adapter.release(name)

    def applied(self, weights: np.ndarray, start: int, stop: int, factor: np.ndarray | None) -> np.ndarray:
        """`weights`, rows `start` to `stop` of the tensor, after the change, which may be made in place."""
        theirs = _decoded(self.adapter, self.rows, start, stop)
        if factor is None:
            return theirs
        for first in range(start - start % self.matrix, stop, self.matrix):
            low, high = max(first, start) - start, min(first + self.matrix, stop) - start
            add_product(weights[low:high], theirs[low:high], factor[first // self.matrix], np.float32(self.scale))
        return weights


@allocating_kernel
def add_product(weights: Any, rows: Any, columns: Any, scale: Any) -> None:
    """Add scale * rows columns to `weights` [rows, row length]; `rows` are [rows, rank], `columns` [rank, row length].

    Each number is summed over the rank in order, so that it does not depend on which rows are computed together.
    """
    change = np.empty(weights.shape[1], np.float32)
    for i in range(weights.shape[0]):
        change[:] = 0
        for k in range(columns.shape[0]):
            factor = rows[i, k]
            for j in range(change.size):
                change[j] += factor * columns[k, j]
        for j in range(change.size):
            weights[i, j] += scale * change[j]


def merge_lora(
    base: TensorSource, adapters: Sequence[tuple[TensorSource | str | os.PathLike[str], float]]
) -> TensorSource:
    """The model `base` with LoRA adapters added to its weights, each with a scale, usually 1.

    An adapter is a GGUF file, a directory as PEFT saves it, a hub id, or one of these that is open. Weights that change
    are float32, and are merged row by row when they are read. Tensors that an adapter holds entirely take the place
    of the model's, whatever the scale. Raises QuantkitError for an adapter of another architecture, or with tensors
    that the model does not have in that shape.
    """
    opened = [
        (_opened(base, each) if isinstance(each, (str, os.PathLike)) else each, scale) for each, scale in adapters
    ]
    return MergedModel(base, opened) if opened else base


def _opened(base: TensorSource, adapter: str | os.PathLike[str]) -> TensorSource:
    """An adapter by name. One of PEFT takes the names and shapes of `base` where that is a checkpoint."""
    from quantkit.sources.adapter import open_adapter
    from quantkit.sources.checkpoint import CheckpointSource

    name = os.fspath(adapter)
    if Path(name).is_file() or name.endswith(".gguf"):
        return GGUFSource(name)
    return open_adapter(name, str(base.directory) if isinstance(base, CheckpointSource) else None)


def _changes(base: TensorSource, adapter: TensorSource, scale: float) -> Mapping[str, _Change]:
    """What `adapter` changes, by the name of the model's tensor."""
    metadata, tensors = adapter.metadata, adapter.tensors
    if metadata.string("general.type", "") != "adapter" or metadata.string("adapter.type", "") != "lora":
        raise QuantkitError(f"{adapter.label}: not a LoRA adapter, by its metadata")
    if metadata.architecture != base.metadata.architecture:
        raise QuantkitError(
            f"{adapter.label}: an adapter of {metadata.architecture} does not fit {base.label}, "
            f"which is {base.metadata.architecture}"
        )
    if "adapter.alora.invocation_tokens" in metadata:
        raise QuantkitError(f"{adapter.label}: it acts only after certain tokens, so it cannot be merged")
    if not abs(scale) < _MAX_SCALE:
        raise QuantkitError(f"{adapter.label}: {scale} is no scale of an adapter")
    alpha = metadata.number("adapter.lora.alpha", default=0.0)
    if not tensors:
        raise QuantkitError(f"{adapter.label}: it holds no tensors")
    found: dict[str, _Change] = {}
    for name, info in tensors.items():
        target = name.removesuffix(".lora_a").removesuffix(".lora_b")
        if (wanted := base.tensors.get(target)) is None:
            raise QuantkitError(f"{adapter.label}: it changes {target!r}, which {base.label} does not have")
        if target == name:
            _require(adapter, info, wanted, wanted.shape)
            found[name] = _Change(adapter, scale, name)
        elif f"{target}.lora_a" not in tensors or f"{target}.lora_b" not in tensors:
            raise QuantkitError(f"{adapter.label}: {name!r} stands alone: a LoRA has two factors")
        elif target not in found:
            found[target] = _product(adapter, target, wanted, scale, alpha)
    return found


def _product(adapter: TensorSource, target: str, wanted: TensorInfo, scale: float, alpha: float) -> _Change:
    a, b = adapter.tensors[f"{target}.lora_a"], adapter.tensors[f"{target}.lora_b"]
    rank = b.shape[0]
    if rank < 1:
        raise QuantkitError(f"{adapter.label}: {b.name!r} has the rank 0")
    if not wanted.type.has_codec or len(wanted.shape) < 2:
        raise QuantkitError(f"{adapter.label}: it changes {target!r}, which is no matrix of weights")
    columns, rows, *matrices = wanted.shape
    if alpha:  # as llama.cpp: without one, the scale is all
        scale = scale * alpha / rank
    if target == _EMBEDDING:
        _require(adapter, a, wanted, (rank, rows))
        _require(adapter, b, wanted, (rank, columns))
        return _Change(adapter, scale, a.name, b.name, True, rows)
    _require(adapter, a, wanted, (columns, rank, *matrices))
    _require(adapter, b, wanted, (rank, rows, *matrices))
    return _Change(adapter, scale, b.name, a.name, False, rows)


def _require(adapter: TensorSource, info: TensorInfo, wanted: TensorInfo, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of an adapter whose shape is not `shape`, or whose type cannot be decoded."""
    if info.shape != shape:
        raise QuantkitError(
            f"{adapter.label}: {info.name!r} of shape {list(info.shape)} does not fit {wanted.name!r} of shape "
            f"{list(wanted.shape)}: another model's?"
        )
    if not info.type.has_codec:
        raise QuantkitError(f"{adapter.label}: {info.name!r} is {info.type.name}, which holds no weights")


def _decoded(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor, float32 [rows, row length], a new array."""
    return blocks.decode(source.read(name, start, stop), source.tensors[name].type)
