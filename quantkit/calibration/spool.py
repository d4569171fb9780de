"""Where a long run keeps what it has finished, so that it can go on after a stop.

Tensors are finished layer by layer, which is not their order in a file, and each for several files: until the files
are written, their encoded rows stand in a directory of their own, with a record of the layers that are done and, now
and then, the activations that the next layer reads. What types would cost is kept there too. Each says for which model,
text and options it holds.
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
# The directory's own file, so that no other directory is taken for one.
_MARK = "quantkit-unfinished"
_RECORD = "progress.json"
_COSTS = "costs.json"


class WorkDirectory:
    """The directory of unfinished work beside the file `output`; made when it is first needed.

    With `resume` what is there is used. Raises QuantkitError when something is there and `resume` is not asked for.
    """

    def __init__(self, output: Path, resume: bool = False) -> None:
        self.path = output.with_name(output.name + ".unfinished")
        if self.path.exists() or self.path.is_symlink():
            if self.path.is_symlink() or not (self.path / _MARK).is_file():
                raise QuantkitError(f"{self.path}: is in the way: its name is needed for unfinished work; move it")
            if not resume:
                raise QuantkitError(
                    f"{self.path}: holds the work of a run that was stopped: remove the directory, or resume the run",
                    option="resume",
                )

    def make(self) -> Path:
        """See that the directory is there; returns its path."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _MARK).touch()
        return self.path

    def load_costs(self, digest: str) -> Any:
        """What `save_costs` kept, None if nothing. Raises QuantkitError when that was for another run."""
        path = self.path / _COSTS
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            same, costs = found["digest"] == digest, found["costs"]
        except (ValueError, KeyError, TypeError):
            raise self.damaged(path) from None
        if not same:
            raise self.another()
        return costs

    def save_costs(self, digest: str, costs: Any) -> None:
        """Keep what types would cost."""
        write_json(self.make() / _COSTS, {"digest": digest, "costs": costs})

    def damaged(self, path: Path) -> QuantkitError:
        """What to say of a file that is not as it was written."""
        return QuantkitError(f"{path}: missing or damaged; remove {self.path}, to begin anew")

    def another(self) -> QuantkitError:
        """What to say where the work is another run's."""
        return QuantkitError(
            f"{self.path}: belongs to a run with another model, text, types or options: repeat these to resume it, "
            "or remove the directory"
        )

    def remove(self) -> None:
        """Remove the directory: everything has been written where it belongs."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_json(target: Path, data: Any) -> None:
    """Write or replace a file in one step."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(data), "utf-8")
    partial.replace(target)


class Spool:
    """The rounded layers in the work directory `work`, of the run that `digest` identifies.

    Raises QuantkitError when there are some already that belong to another run.
    """

    def __init__(self, work: WorkDirectory, digest: str) -> None:
        self._work, self.path = work, work.make()
        self._record: dict[str, Any] = {"digest": digest, "layers": [], "activations": 0}
        self._saved = time.monotonic()
        record = self.path / _RECORD
        if record.exists():
            try:
                found = json.loads(record.read_text("utf-8"))
                layers, activations = list(found["layers"]), int(found["activations"])
                same = found["digest"] == digest
            except (ValueError, KeyError, TypeError):
                raise work.damaged(record) from None
            if not same:
                raise work.another()
            self._record |= {"layers": layers, "activations": min(activations, len(layers))}
        write_json(record, self._record)

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
        if not path.is_file() or path.stat().st_size != info.n_rows * nbytes:
            raise self._work.damaged(path)

        def read(start: int, stop: int) -> np.ndarray:
            found = np.fromfile(path, np.uint8, (stop - start) * nbytes, offset=start * nbytes)
            if found.size != (stop - start) * nbytes:
                raise self._work.damaged(path)
            return found.reshape(stop - start, nbytes)

        return read

    def finish(self, layer: Mapping[str, Any]) -> None:
        """Record a layer as done; its tensors' files are whole."""
        self._record["layers"].append(dict(layer))
        write_json(self.path / _RECORD, self._record)

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
        write_json(self.path / _RECORD, self._record)
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

    def _activations(self, layer: int) -> Path:
        return self.path / f"activations-{layer}.f32"
