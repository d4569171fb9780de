"""Where a long run keeps what it has finished, so that it can go on after a stop.

Tensors are finished layer by layer, which is not their order in a file, and each for several files: until the files
are written, their encoded rows stand in a directory of their own, with a record of the layers that are done and, now
and then, the activations that the next layer reads. It says for which model, text and options it holds.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import TensorInfo
from quantkit.formats.unfinished import WorkDirectory

# Seconds between two copies of the activations: what a resumed run may have to compute again.
_EVERY = 120.0


class TensorFiles:
    """The files of encoded rows in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, index: int, kind: GGMLType) -> Path:
        """The file of the encoded rows of tensor number `index` as `kind`."""
        return self.path / f"{index:05d}.{kind.name}"

    def load_moments(self, index: int) -> np.ndarray:
        """Moments that were kept: there are none."""
        raise KeyError(index)


class Spool(TensorFiles):
    """The rounded layers in the work directory `work`, of the run that `digest` identifies.

    Raises QuantkitError when there are some already that belong to another run.
    """

    def __init__(self, work: WorkDirectory, digest: str) -> None:
        super().__init__(work.make())
        self._work, self._digest = work, digest
        self._saved = time.monotonic()
        found = work.load_record(digest)
        try:
            layers, activations = list(found.get("layers", [])), int(found.get("activations", 0))
            lengths = [int(each) for each in found.get("lengths", [])]
        except (ValueError, TypeError):
            raise work.damaged(self.path) from None
        self._record: dict[str, Any] = {
            "layers": layers,
            "activations": min(activations, len(layers)),
            "moments": found.get("moments") is True,
            "lengths": lengths,
        }
        self._save()

    def _save(self) -> None:
        self._work.save_record(self._digest, self._record)

    @property
    def layers(self) -> list[Any]:
        """What was recorded of each layer that is done."""
        return list(self._record["layers"])

    @property
    def start(self) -> int:
        """The layer that reads the activations that were kept last; 0 where none were."""
        return int(self._record["activations"])

    def reader(self, index: int, info: TensorInfo, kind: GGMLType) -> Callable[[int, int], np.ndarray]:
        """A function that reads encoded rows, from one to before another: uint8 [rows, bytes of a row].

        Raises QuantkitError where the file is not whole.
        """
        path, nbytes = self.file(index, kind), kind.row_nbytes(info.n_per_row)
        if not path.is_file() or path.stat().st_size != info.n_rows * nbytes:
            raise self._work.damaged(path)

        def read(start: int, stop: int) -> np.ndarray:
            found = np.fromfile(path, np.uint8, (stop - start) * nbytes, offset=start * nbytes)
            if found.size != (stop - start) * nbytes:
                raise self._work.damaged(path)
            return found.reshape(stop - start, nbytes)

        return read

    @property
    def has_moments(self) -> bool:
        """Whether all moments were kept."""
        return bool(self._record["moments"])

    def keep_moments(self, index: int, moments: np.ndarray) -> None:
        """Keep float32 `moments` [n, n] that belong to tensor number `index`."""
        moments.tofile(self._moments(index))

    def keep_lengths(self, index: int, lengths: np.ndarray) -> None:
        """Keep float32 `lengths`, of gradients by what tensor number `index` makes of each token."""
        lengths.tofile(self._lengths(index))

    def finish_moments(self, lengths: Sequence[int]) -> None:
        """Record that all moments are kept, and all lengths: those of these tensors."""
        self._record["moments"], self._record["lengths"] = True, list(lengths)
        self._save()

    def load_moments(self, index: int) -> np.ndarray:
        """What was kept. Raises QuantkitError where it is not whole."""
        path = self._moments(index)
        found = np.fromfile(path, np.float32) if path.is_file() else np.empty(2, np.float32)
        size = math.isqrt(found.size)
        if size * size != found.size:
            raise self._work.damaged(path)
        return found.reshape(size, size)

    def load_lengths(self, index: int, n_tokens: int) -> np.ndarray | None:
        """What was kept, None if nothing. Raises QuantkitError where it is not whole."""
        if index not in self._record["lengths"]:
            return None
        path = self._lengths(index)
        if not path.is_file() or path.stat().st_size != 4 * n_tokens:
            raise self._work.damaged(path)
        return np.fromfile(path, np.float32)

    def finish(self, layer: Mapping[str, Any]) -> None:
        """Record a layer as done; its tensors' files are whole."""
        self._record["layers"].append(dict(layer))
        self._save()

    def keep_activations(self, x: np.ndarray) -> None:
        """Keep a copy of what the layer after those that are done reads, if the last was kept a while ago."""
        if time.monotonic() - self._saved < _EVERY:
            return
        done = len(self._record["layers"])
        target, before = self._activations(done), self._activations(self.start)
        if shutil.disk_usage(self.path).free < 2 * x.nbytes:
            return
        with open(target, "wb") as file:
            for chunk in x:
                chunk.tofile(file)
        self._record["activations"] = done
        self._save()
        before.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def load_activations(self, x: np.ndarray) -> None:
        """Read what was kept into `x`. Raises QuantkitError where it is not whole."""
        path = self._activations(self.start)
        if not path.is_file() or path.stat().st_size != x.nbytes:
            raise self._work.damaged(path)
        with open(path, "rb") as file:
            for chunk in x:
                chunk[:] = np.fromfile(file, np.float32, chunk.size).reshape(chunk.shape)

    def _moments(self, index: int) -> Path:
        return self.path / f"{index:05d}.moments"

    def _lengths(self, index: int) -> Path:
        return self.path / f"{index:05d}.lengths"

    def _activations(self, layer: int) -> Path:
        return self.path / f"activations-{layer}.f32"
