"""Quantizing in one call, with a calibration text or without."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.atomic import OutputGroup
from quantkit.pipeline import run as pipeline
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_all
from quantkit.sources.source import TensorSource, open_model

if TYPE_CHECKING:
    import numpy as np


ROUNDINGS = ("nearest", "gptq")


def quantize(
    source: TensorSource | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    type: str | Sequence[str],
    rounding: str = "nearest",
    calibration: str | np.ndarray | os.PathLike[str] | None = None,
    calibration_name: str = "",
    chunking: Chunking | None = None,
    compute: Compute | None = None,
    resume: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    max_buffer_size: int | None = None,
    progress: Callable[..., None] | None = None,
    force: bool = False,
    options: QuantizeOptions | None = None,
    **changes: Any,
) -> list[Path]:
    """Quantize a GGUF file, a checkpoint directory or a hub id to one file type or several, in one reading.

    `out` is as for `pipeline.run.quantize`: a file, or a directory, in which files are named by model and type.
    `rounding` is nearest, as llama-quantize rounds, or gptq: error feedback by the second moments of `calibration`.
    That is a text, token ids or the path of a text file, of which `chunks` chunks are taken (a good number if None);
    `calibration_name` is what the files call it. With nearest rounding it takes the place of an importance matrix.
    `resume` goes on after a stop of a run with error feedback. `progress` is called as by `pipeline.execute`, with
    error feedback with a `rounding.Step`. `options` and `changes` are as for `plan`, the others as for
    `pipeline.execute`. Returns the files written. Raises QuantkitError.
    """
    if rounding not in ROUNDINGS:
        raise QuantkitError(f"there is no rounding {rounding!r}: use {' or '.join(ROUNDINGS)}")
    options = replace(options or QuantizeOptions(), **changes)
    model = source
    if isinstance(model, (str, os.PathLike)):
        model = open_model(model, allow_nonfinite=allow_nonfinite)
    compute = Compute(threads=threads) if compute is None else compute
    common: dict[str, Any] = {"threads": threads, "allow_nonfinite": allow_nonfinite}
    common |= {"max_buffer_size": max_buffer_size, "progress": progress}
    if calibration is None:
        if rounding != "nearest":
            raise QuantkitError(f"{model.label}: rounding {rounding} needs a calibration text")
        return pipeline.quantize(model, out, type=type, force=force, options=options, **common)
    if isinstance(calibration, os.PathLike):
        calibration_name = calibration_name or Path(calibration).name
        calibration = Path(calibration).read_text("utf-8")
    if rounding == "nearest":
        from quantkit.evaluate.importance import importance_matrix

        matrix = importance_matrix(
            model, calibration, chunking=chunking or Chunking(), compute=compute, dataset=calibration_name
        )
        options = replace(options, imatrix=matrix)
        return pipeline.quantize(model, out, type=type, force=force, options=options, **common)
    from quantkit.calibration.rounding import describe, execute_with_feedback
    from quantkit.calibration.text import CHUNKING, CalibrationText
    from quantkit.evaluate.backends import load

    names = [file_type(name).name for name in ([type] if isinstance(type, str) else type)]
    named = os.fspath(source) if isinstance(source, (str, os.PathLike)) else model.label
    destination = Destination.of(out, home_of(named))
    paths = output_paths(destination, model, names, rounding)
    text = CalibrationText.of(model, calibration, chunking or CHUNKING, name=calibration_name)
    plans = plan_all(model, names, replace(options, calibrated=True))
    for plan in plans:
        describe(plan, text)
    outputs = list(zip(plans, paths, strict=True))
    loaded = load(model, compute, keep=False)
    with OutputGroup(force=force, directory=destination.directory) as group:
        execute_with_feedback(loaded, outputs, text, resume=resume, group=group, **common)
    return [path for plan, target in outputs for path, _, _ in plan.files(target)]
