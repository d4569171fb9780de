"""Error feedback and the choice of types by the workers of a cluster: layers, and tensors, apart from each other.

Moments are those of the unquantized model, so no layer waits for the rounding of another. The text goes through some
layers, part by part on all workers, and what each of these layers reads is left in files of the work directory; then
each layer is a task of its own: it runs once more over the whole text, its moments are gathered and its tensors
rounded, while the text goes through the next layers. So the text goes through every layer twice, and there are files
of the activations for as many layers at a time as there are workers.

What types cost is asked of each worker for its share of the tensors; the text goes through the model for each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.calibration.moments import MomentsPass, batches
from quantkit.calibration.progress import Step
from quantkit.calibration.rounding import LayerRounding
from quantkit.calibration.spool import TensorFiles
from quantkit.calibration.survey import TensorCosts, survey
from quantkit.calibration.text import CalibrationText
from quantkit.errors import QuantkitError
from quantkit.evaluate.activations import Activations
from quantkit.evaluate.ensemble import models_here
from quantkit.evaluate.settings import Compute
from quantkit.formats.atomic import SharedFile
from quantkit.pipeline.cluster import Cluster, Task, packed, worker_limits
from quantkit.sources.source import TensorSource


@dataclass(frozen=True)
class Job:
    """What every task must know. `source` is packed, `directory` where the rounded tensors' files are put."""

    source: bytes
    compute: Compute
    text: CalibrationText
    wanted: Mapping[str, Sequence[GGMLType]]
    damping: float
    allow_nonfinite: bool
    directory: Path
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the activations between layers."""
        return (*self.text.tokens.shape, self.width)


@dataclass(frozen=True)
class InputsFile:
    """The file of what a layer reads, float32 of a `Job`'s shape, and its device and inode."""

    path: Path
    identity: tuple[int, int]

    @classmethod
    def new(cls, path: Path, nbytes: int) -> InputsFile:
        """Make it, of its full size."""
        with open(path, "wb") as file:
            file.truncate(nbytes)
            status = os.fstat(file.fileno())
        return cls(path.absolute(), (status.st_dev, status.st_ino))

    def read_into(self, x: np.ndarray, first: int) -> None:
        """Fill `x` with the chunks from `first` on."""
        with SharedFile(self.path, self.identity) as file:
            nbytes = x[0].nbytes
            for i, chunk in enumerate(x):
                file.read_into((first + i) * nbytes, chunk)

    def write(self, x: np.ndarray, first: int) -> None:
        """Put `x` in the place of the chunks from `first` on."""
        with SharedFile(self.path, self.identity) as file:
            file.write_at(first * x[0].nbytes, x)


def advance(job: Job, part: slice, start: int, before: InputsFile | None, into: Mapping[int, InputsFile]) -> None:
    """Take the chunks `part` from what layer `start` reads to what later layers read, into their files.

    `before` has what that layer reads, None for the embeddings of tokens. What a worker does.
    """
    with models_here((job.source,), job.compute, keep=False) as (model,):
        tokens = job.text.tokens[part]
        if before is None:
            x = model.embedded(tokens)
        else:
            x = np.empty((*tokens.shape, job.width), np.float32)
            before.read_into(x, part.start)
        for layer in range(start, max(into) + 1):
            if layer in into:
                into[layer].write(x, part.start)
            if layer < max(into):
                model.layer_pass(layer, tokens.shape[1])(x)


def round_layer(job: Job, index: int, inputs: InputsFile | None) -> dict[str, Any]:
    """Gather the moments of layer `index`, which reads `inputs`, and round its tensors; what to record of it.

    What a worker does.
    """
    with models_here((job.source,), job.compute, keep=False) as (model,):
        threads = job.compute.threads or worker_limits()[0]
        rounding = LayerRounding(model, job.wanted, job.text, "gptq", job.damping, threads, job.allow_nonfinite)
        activations = Activations(job.shape, model.memory // 4, job.directory)
        try:
            if inputs is not None:
                inputs.read_into(activations.values, 0)
            steps = MomentsPass(model, job.text.tokens, job.wanted, activations.values, index)
            return rounding.round_layer(steps.gather(), TensorFiles(job.directory))
        finally:
            activations.close()


def round_apart(
    cluster: Cluster,
    source: TensorSource,
    job: Callable[[bytes], Job],
    n_layer: int,
    done: int,
    finish: Callable[[int, dict[str, Any]], None],
) -> None:
    """Round all layers from `done` on, and what comes after the last, by the workers of `cluster`.

    `job` is made with the packed source; `finish(layer, record)` is called as layers are done. Raises QuantkitError
    where the disk has no room for the activations.
    """
    shared = job(packed(source))
    nbytes = 4 * int(np.prod(shared.shape))
    room = shutil.disk_usage(shared.directory).free // max(1, nbytes) - 1
    if room < 2:
        raise QuantkitError(
            f"{shared.directory}: activations of a layer take {nbytes / 1e9:.1f} GB, of which two must fit there: "
            "use fewer chunks of text"
        )
    together = min(max(2, cluster.n_workers), room // 2)
    files: dict[int, InputsFile] = {}
    rounding: list[Task] = []
    layers: list[int] = []
    first, position = done, 0
    try:
        while first <= n_layer or rounding:
            last = min(first + together, n_layer + 1)
            needed = [layer for layer in range(max(first, 1), min(last, n_layer) + 1) if layer not in files]
            tasks, before = list(rounding), files.get(position)
            into = {
                layer: InputsFile.new(shared.directory / f"inputs-{layer}.f32", nbytes)
                for layer in needed
                if layer > position
            }
            if into:
                name = f"text through blk.{position}-{max(into) - 1}"
                parts = batches(*shared.shape[:2])
                tasks += [Task(name, advance, (shared, part, position, before, into)) for part in parts]
                position = max(into)
            for number, result in cluster.run(tasks):
                if number < len(layers):
                    finish(layers[number], result)
            files |= into
            for layer in [layer for layer in files if layer < first]:
                files.pop(layer).path.unlink(missing_ok=True)
            layers = list(range(first, last))
            names = ["output" if layer == n_layer else f"blk.{layer}" for layer in layers]
            rounding = [
                Task(f"round {name}", round_layer, (shared, layer, files.get(layer)))
                for name, layer in zip(names, layers, strict=True)
            ]
            first = last
    finally:
        for path in shared.directory.glob("inputs-*.f32"):
            with suppress(OSError):
                path.unlink()


def survey_share(
    source: bytes,
    compute: Compute,
    text: CalibrationText,
    candidates: Mapping[str, Sequence[GGMLType]],
    feedback: bool,
    directory: Path | None,
) -> dict[str, TensorCosts]:
    """What a share of the tensors cost as their `candidates`: what a worker does."""
    with models_here((source,), compute, keep=False) as (model,):
        return survey(model, text, candidates, feedback=feedback, directory=directory)


def survey_apart(
    cluster: Cluster,
    source: TensorSource,
    compute: Compute,
    text: CalibrationText,
    candidates: Mapping[str, Sequence[GGMLType]],
    *,
    feedback: bool,
    directory: Path | None,
    progress: Callable[[Step], None] | None,
) -> dict[str, TensorCosts]:
    """What each tensor costs as each of its types, as `survey.survey` says, by the workers of `cluster`."""
    names, what = list(candidates), packed(source)
    # A tensor costs a worker the layers after its own: every share has some of all layers.
    n_shares = max(1, min(cluster.n_workers, len(names)))
    home = None if directory is None else directory.absolute()
    shares = [{name: candidates[name] for name in names[i::n_shares]} for i in range(n_shares)]
    tasks = [
        Task(f"types of {len(share)} tensors", survey_share, (what, compute, text, share, feedback, home))
        for share in shares
    ]
    found: dict[str, TensorCosts] = {}
    for done, (_, costs) in enumerate(cluster.run(tasks), 1):
        found |= costs
        if progress is not None:
            progress(Step("choose types", 0, 0, "", done, n_shares))
    return {name: found[name] for name in names if name in found}
