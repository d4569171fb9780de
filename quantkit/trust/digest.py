"""Digests of what a model computes with: they depend on no metadata, no order of tensors, no split into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.formats.reading import InputFile
from quantkit.machine import default_threads
from quantkit.pipeline.execute import Progress
from quantkit.sources.source import TensorSource

READ = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class ModelDigests:
    """SHA-256 digests, as hexadecimal text.

    `tensors` has that of each tensor's bytes, by name, in the file's order. `model` is the digest of the lines
    "name TYPE shape digest", sorted by name: equal for two files exactly when their tensors are.
    """

    label: str
    model: str
    tensors: dict[str, str]

    def __str__(self) -> str:
        """A line for each tensor, as sha256sum prints files, and one for the model."""
        return "\n".join([f"{digest}  {name}" for name, digest in self.tensors.items()] + [f"{self.model}  (model)"])

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {"path": self.label, "algorithm": "sha256", "digest": self.model, "digests": self.tensors}


def model_digests(source: TensorSource, threads: int | None = None, progress: Progress | None = None) -> ModelDigests:
    """The digests of `source`, a GGUF model or a checkpoint seen as one.

    A checkpoint has those of the GGUF file that it would be converted to. Progress counts bytes of tensors.
    """

    def one(name: str) -> str:
        info, digest = source.tensors[name], hashlib.sha256()
        step = max(1, READ // max(1, info.type.row_nbytes(info.n_per_row)))
        for start in range(0, info.n_rows, step):
            digest.update(source.read(name, start, min(start + step, info.n_rows)).reshape(-1).data)
        source.release(name)
        return digest.hexdigest()

    tensors: dict[str, str] = {}
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for name, digest in zip(source.tensors, pool.map(one, source.tensors), strict=True):
            tensors[name] = digest
            if progress is not None:
                progress(name, source.tensors[name].nbytes)
    whole = hashlib.sha256()
    for name in sorted(tensors):
        info = source.tensors[name]
        line = f"{name} {info.type.name} {'x'.join(map(str, info.shape))} {tensors[name]}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return ModelDigests(source.label, whole.hexdigest(), tensors)


def file_digests(paths: Sequence[Path]) -> dict[Path, str]:
    """The SHA-256 of each file, as hexadecimal text."""

    def one(path: Path) -> str:
        file, digest = InputFile(path), hashlib.sha256()
        for at in range(0, file.nbytes, READ):
            digest.update(file.read(at, min(READ, file.nbytes - at)))
        file.check()
        return digest.hexdigest()

    with ThreadPoolExecutor(default_threads()) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))
