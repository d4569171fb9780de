"""A model seen as GGUF: metadata, and named tensors that are loaded on demand."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo
from quantkit.wording import count_text

if TYPE_CHECKING:
    import numpy as np

    from quantkit.sources.checkpoint import CheckpointSource, OutType

MAX_SHARDS = 65535  # split.count is a 16-bit number
log = logging.getLogger(__name__)

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class TensorSource(Protocol):
    """Where tensors come from: a GGUF file, or a checkpoint seen through its architecture.

    Functions that take a source take either. Tensor names, shapes and types are GGUF's.
    """

    @property
    def label(self) -> str:
        """The file or directory, as the user would name it in a message."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that it is read from, which no output may replace."""
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

        A view of a mapped file, or a new array. Safe from several threads.
        """
        ...

    def release(self, name: str) -> None:
        """Release the memory that reading tensor `name` has mapped. It can be read again."""
        ...


class GGUFSource:
    """A GGUF model as a TensorSource: one file, or all the shards of a split model.

    `path` is the file, or any shard of a split model; the other shards are found by the standard names beside it.
    `shards` are the files, opened; `shard_of` says which of them holds a tensor. The metadata is the first shard's,
    without the keys that describe the split.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        first = GGUFFile(self.path)
        count = first.metadata.integer("split.count", 0, MAX_SHARDS, default=0)
        self.shards = [first] if count <= 1 else [GGUFFile(shard) for shard in self._shards(count)]
        self.metadata = Metadata(self.shards[0].metadata)
        self.tensors: dict[str, TensorInfo] = {}
        self.shard_of: dict[str, int] = {}
        for index, file in enumerate(self.shards):
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise QuantkitError(f"{file.path}: the tensor {name!r} is in another shard too")
                self.tensors[name] = info
                self.shard_of[name] = index
        expected = self.metadata.integer("split.tensors.count", default=len(self.tensors))
        if count > 1 and expected != len(self.tensors):
            raise QuantkitError(f"{self.path}: its shards hold {len(self.tensors)} tensors, not {expected}")
        for key in SPLIT_KEYS:
            self.metadata.pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is opened again: by the absolute path, for another process."""
        return GGUFSource, (self.path.absolute(),)

    def _shards(self, count: int) -> list[Path]:
        match = _SPLIT_NAME.fullmatch(self.path.name)
        if match is None or int(match["count"]) != count:
            raise QuantkitError(
                f"{self.path}: one of {count} shards, but not named like one (…-00001-of-{count:05d}.gguf); rename it"
            )
        shards = [self.path.with_name(split_name(match["prefix"], i, count)) for i in range(count)]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise QuantkitError(f"{self.path}: {len(missing)} of {count} shards are missing, first {missing[0]}")
        return shards

    @property
    def label(self) -> str:
        """The path that was opened."""
        return str(self.path)

    @property
    def files(self) -> list[Path]:
        """See TensorSource: the shards."""
        return [shard.path for shard in self.shards]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See TensorSource: always a new array."""
        return self.shards[self.shard_of[name]].read(name, start, stop)

    def release(self, name: str) -> None:
        """See TensorSource. Nothing is mapped; checks that the file has not changed."""
        self.shards[self.shard_of[name]].check()


def stored_as(source: TensorSource, name: str) -> str:
    """How the file keeps tensor `name` where `source` dequantizes it while reading, in words; empty for others."""
    told = getattr(source, "stored_as", None)
    return str(told(name)) if told is not None else ""


def split_name(prefix: str, index: int, count: int) -> str:
    """The standard name of shard `index` (from 0) of `count`."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def open_model(
    model: TensorSource | str | os.PathLike[str],
    *,
    revision: str | None = None,
    outtype: OutType = "auto",
    pre: str | None = None,
    allow_nonfinite: bool = False,
    remote: bool = False,
) -> TensorSource:
    """Open a model: a GGUF file (any shard), a checkpoint directory, a hub id `org/name`, or a GGUF file on the hub.

    The latter is `org/name:TYPE` or `org/name:FILE.gguf`. For a checkpoint, `outtype` is the type that its matrices are
    seen in ("auto": as they are stored), `pre` names its pre-tokenizer where that is not recognised, and
    `allow_nonfinite` accepts weights that are NaN or infinite; `revision` is a branch, tag or commit on the hub; with
    `remote` the weights of a model there are read by HTTP when they are needed, and not kept on disk. A model that is
    open already is returned as it is.
    Raises QuantkitError when there is no such model.
    """
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model)
    if not path.is_file() and ":" in str(model):
        from quantkit.sources.hub import gguf_of

        found = gguf_of(str(model), revision)
        if found is not None and remote:
            raise QuantkitError(f"{model}: of GGUF files the weights cannot be read from the hub while they are needed")
        path = found or path
    if path.is_file():
        file = GGUFSource(path)
        log.info(
            "%s: GGUF, %s, %s", path, count_text(len(file.shards), "shard"), count_text(len(file.tensors), "tensor")
        )
        return file
    if str(model).endswith(".gguf"):
        raise QuantkitError(f"{model}: no such file")
    checkpoint = open_checkpoint(
        str(model), revision=revision, outtype=outtype, pre=pre, allow_nonfinite=allow_nonfinite, remote=remote
    )
    log.info(
        "%s: checkpoint%s, %s, matrices as %s",
        model, "" if path == checkpoint.directory else f" in {checkpoint.directory}",
        count_text(len(checkpoint.tensors), "tensor"), checkpoint.type.name,
    )  # fmt: skip
    if checkpoint.dequantized:
        log.info("%s: %s", model, checkpoint.dequantized)
    return checkpoint


def open_checkpoint(
    checkpoint: str, *, revision: str | None = None, remote: bool = False, projector: bool = False, **options: Any
) -> CheckpointSource:
    """Open a checkpoint directory or a model on the hub, or with `projector` the part of it that sees or hears.

    `options` are as for `CheckpointSource`. See `open_model`.
    """
    from quantkit.sources.checkpoint import CheckpointSource
    from quantkit.sources.hub import is_hub_id, resolve
    from quantkit.sources.projector import ProjectorSource

    kind = ProjectorSource if projector else CheckpointSource
    if not remote:
        return kind(resolve(checkpoint, revision), **options)
    if not is_hub_id(checkpoint):
        raise QuantkitError(f"{checkpoint}: only a model on the hub, named org/name, can be read from there")
    from quantkit.sources.remote import RemoteShards

    shards = RemoteShards(checkpoint, revision)
    return kind(shards.directory, elsewhere=shards, **options)


def open_source(model: TensorSource | str | os.PathLike[str], **options: Any) -> TensorSource:
    """The old name of `open_model`."""
    warnings.warn("open_source is called open_model now; this name goes with the next release", DeprecationWarning, 2)
    return open_model(model, **options)
