"""Where a long run keeps what it has finished, so that it can go on after a stop.

Tensors are finished layer by layer, which is not their order in a file, and each for several files: until the files
are written, their encoded rows stand in a directory of their own, with a record of the layers that are done and, now
and then, the activations that the next layer reads. The record says for which source, text and options it holds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo

# Seconds between two copies of the activations: what a resumed run may have to compute again.
_EVERY = 120.0
_RECORD = "progress.json"


class Spool:
    """The directory `path`, for a run that `digest` identifies.

    With `resume` it goes on with what is there. Raises QuantkitError when there is something and `resume` is not asked
    for, and when what is there belongs to another run.
    """

    def __init__(self, path: Path, digest: str, resume: bool = False) -> None:
        self.path, self._digest = path, digest
        self._record: dict[str, Any] = {"digest": digest, "layers": [], "activations": 0}
        self._saved = time.monotonic()
        record = path / _RECORD
        if path.exists():
            if not record.is_file():
                raise QuantkitError(f"{path}: is in the way: its name is needed for what a run has finished; move it")
            self._go_on(record, resume)
        path.mkdir(parents=True, exist_ok=True)
        self._write_record()

    def _go_on(self, record: Path, resume: bool) -> None:
        try:
            found = json.loads(record.read_text("utf-8"))
            layers, activations = list(found["layers"]), int(found["activations"])
            same = found["digest"] == self._digest
        except (ValueError, KeyError, TypeError):
            raise QuantkitError(f"{record}: damaged; remove {self.path}, to begin anew") from None
        if not resume:
            raise QuantkitError(
                f"{self.path}: a run was stopped here after {len(layers)} layers: resume it, or remove the directory"
            )
        if not same:
            raise QuantkitError(
                f"{self.path}: belongs to a run with another model, text, types or options: repeat these to resume it, "
                "or remove the directory"
            )
        self._record = {"digest": self._digest, "layers": layers, "activations": min(activations, len(layers))}

    @property
    def layers(self) -> list[Any]:
        """What was recorded of each layer that is done."""
        return list(self._record["layers"])

    @property
    def start(self) -> int:
        """The layer that reads the activations that were kept last; 0 where none were."""
        return int(self._record["activations"])

    def file(self, index: int, kind: GGMLType) -> Path:
        """The file of the encoded rows of tensor number `index` as `kind`."""
        return self.path / f"{index:05d}.{kind.name}"

    def reader(self, index: int, info: TensorInfo, kind: GGMLType) -> Callable[[int, int], np.ndarray]:
        """A function that reads encoded rows, from one to before another: uint8 [rows, bytes of a row].

        Raises QuantkitError where the file is not whole.
        """
        path, nbytes = self.file(index, kind), kind.row_nbytes(info.n_per_row)
        damaged = QuantkitError(f"{path}: missing or damaged; remove {self.path}, to begin anew")
        if not path.is_file() or path.stat().st_size != info.n_rows * nbytes:
            raise damaged

        def read(start: int, stop: int) -> np.ndarray:
            found = np.fromfile(path, np.uint8, (stop - start) * nbytes, offset=start * nbytes)
            if found.size != (stop - start) * nbytes:
                raise damaged
            return found.reshape(stop - start, nbytes)

        return read

    def finish(self, layer: Mapping[str, Any]) -> None:
        """Record a layer as done; its tensors' files are whole."""
        self._record["layers"].append(dict(layer))
        self._write_record()

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
        self._write_record()
        before.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def load_activations(self, x: np.ndarray) -> None:
        """Read what was kept into `x`. Raises QuantkitError where it is not whole."""
        path = self._activations(self.start)
        if not path.is_file() or path.stat().st_size != x.nbytes:
            raise QuantkitError(f"{path}: missing or damaged; remove {self.path}, to begin anew")
        with open(path, "rb") as file:
            for chunk in x:
                chunk[:] = np.fromfile(file, np.float32, chunk.size).reshape(chunk.shape)

    def remove(self) -> None:
        """Remove the directory: everything has been written where it belongs."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _activations(self, layer: int) -> Path:
        return self.path / f"activations-{layer}.f32"

    def _write_record(self) -> None:
        target = self.path / _RECORD
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(self._record), "utf-8")
        partial.replace(target)
