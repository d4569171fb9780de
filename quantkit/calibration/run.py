"""Quantizing with a calibration text, and choosing types by one, in single calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.calibration.roundings import check_rounding
from quantkit.errors import QuantkitError
from quantkit.evaluate.settings import Chunking, Compute, Progress
from quantkit.formats.atomic import OutputGroup
from quantkit.pipeline import run as pipeline
from quantkit.pipeline.execute import execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, plan_all, weights_for
from quantkit.sources.source import TensorSource, open_model

if TYPE_CHECKING:
    import numpy as np

    from quantkit.calibration.planning import ChosenPlan, Target, Wishes
    from quantkit.calibration.progress import Step
    from quantkit.calibration.rounding import RoundedTensor
    from quantkit.calibration.survey import TensorCosts
    from quantkit.calibration.text import CalibrationText
    from quantkit.compile.ahead import KernelJob
    from quantkit.formats.imatrix import ImportanceMatrix
    from quantkit.formats.unfinished import WorkDirectory
    from quantkit.pipeline.cluster import Cluster

# Chunks of a text that second moments are taken of, unless told otherwise: more gain little.
_CHUNKS = 128


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A text, and what is made of it.

    `text` is a string or token ids, `name` what files call it. `rounding` is nearest, with the importance of the
    columns, gptq: error feedback by second moments, or yaqa: by those of gradients too. The text is cut as `chunking`
    says, by default into chunks of 512 tokens, of which 128 are used for second moments and all for importance;
    `compute` says what computes. Raises QuantkitError for an unknown rounding.
    """

    text: str | np.ndarray = field(repr=False)
    name: str = ""
    rounding: str = "nearest"
    chunking: Chunking = field(default_factory=Chunking)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        check_rounding(self.rounding)

    def cut(self, source: TensorSource) -> CalibrationText:
        """The text as the model `source` reads it."""
        from quantkit.calibration.text import CalibrationText

        chunking = self.chunking
        return CalibrationText.of(
            source, self.text, replace(chunking, chunks=chunking.chunks or _CHUNKS), Path(self.name).name
        )

    def importance(
        self,
        source: TensorSource,
        output: bool = False,
        progress: Progress | None = None,
        cluster: Cluster | None = None,
    ) -> ImportanceMatrix:
        """The importance matrix of `source` over the text, with `output` of output.weight too."""
        from quantkit.evaluate.importance import importance_matrix

        return importance_matrix(
            source,
            self.text,
            chunking=self.chunking,
            compute=self.compute,
            process_output=output,
            dataset=self.name,
            progress=progress,
            cluster=cluster,
        )


class CalibratedRun:
    """Files to be written by a calibration: their types, whether named or chosen, and their writing.

    `types` are file types or plans; with `targets` types are chosen for these sizes instead, within `wishes`. Without a
    `calibration` only plans can be had, and not written. `progress` is told of every step.
    With `cluster`, its workers gather importance, try types, round (gptq alone) and write.

    Raises QuantkitError for sizes that cannot be reached, before anything is computed.
    """

    def __init__(
        self,
        model: TensorSource,
        calibration: Calibration | None,
        options: QuantizeOptions,
        *,
        cluster: Cluster | None = None,
        types: Sequence[str | Plan] = (),
        targets: Sequence[Target] = (),
        wishes: Wishes | None = None,
        progress: Callable[[Step], None] | None = None,
    ) -> None:
        from quantkit.calibration.planning import ChosenPlan, Target, TypeChooser, Wishes

        self._model, self._calibration, self._options, self._progress = model, calibration, options, progress
        self._cluster = cluster
        rounding = "" if calibration is None or calibration.rounding == "nearest" else calibration.rounding
        self._chooser = None
        if targets:
            if calibration is None:
                raise QuantkitError(f"{model.label}: choosing types needs a calibration text", option="calibration")
            text = calibration.cut(model)
            self._chooser = TypeChooser(model, targets, options, text, calibration.rounding, wishes or Wishes())
            self.names, marks = self._chooser.labels, self._chooser.marks
        else:
            self.names = [kind.name if isinstance(kind, Plan) else file_type(kind).name for kind in types]
            marks = [Target.parse(kind.target).mark if isinstance(kind, ChosenPlan) else "" for kind in types]
        self.marks = ["-".join(filter(None, (rounding, mark))) for mark in marks]
        self._types = list(types)

    def kernels(self) -> list[KernelJob]:
        """The kernels that the run will need, as far as its types are known, to be compiled ahead."""
        from quantkit import blocks
        from quantkit.evaluate.needed_kernels import measuring_kernels

        calibration = self._calibration
        if calibration is None:
            return []
        measuring = measuring_kernels(self._model, inputs=True) if calibration.compute.backend == "numpy" else []
        named = [kind for kind in self._types if isinstance(kind, str)]
        plans = [kind for kind in self._types if isinstance(kind, Plan)]
        plans += plan_all(self._model, named, replace(self._options, calibrated=True))
        # The importance of embeddings and of the output matrix is not measured.
        encoded = [
            (t.info.type, "token_embd" not in t.info.name and t.info.name != "output.weight")
            for plan in plans
            for t in plan
            if not t.is_copy
        ]
        return [*measuring, *blocks.codec_kernels(dict.fromkeys(encoded))]

    def plans(self, work: WorkDirectory | None = None, costs: Mapping[str, TensorCosts] | None = None) -> list[Plan]:
        """The plan of each file. Types are chosen by a survey of the model, unless its `costs` are known.

        Unfinished work is kept in `work`; without one the plans are for show: nothing is computed for files whose types
        are named.
        """
        calibration, options = self._calibration, replace(self._options, calibrated=self._calibration is not None)
        if self._chooser is not None and calibration is not None:
            if costs is None:
                costs = self._chooser.survey(
                    calibration.compute, work=work, progress=self._progress, cluster=self._cluster
                )
            self._types = list(self._chooser.choose(costs))
        matrix = None
        if work is not None and calibration is not None and calibration.rounding == "nearest":
            matrix = self._importance(calibration)
            options = replace(options, imatrix=matrix)
        made = iter(plan_all(self._model, [kind for kind in self._types if isinstance(kind, str)], options))
        plans = []
        for kind in self._types:
            plan = kind if isinstance(kind, Plan) else next(made)
            if matrix is not None and isinstance(kind, Plan):
                weigh(self._model, plan, matrix)
            plans.append(plan)
        return plans

    def write(
        self, outputs: Sequence[tuple[Plan, Path]], work: WorkDirectory, group: OutputGroup, **options: Any
    ) -> list[list[RoundedTensor]]:
        """Write the plans that `plans` gave; says how tensors with error feedback came out.

        `options` are those of `execute`, but for progress.
        """
        from quantkit.calibration.rounding import execute_with_feedback
        from quantkit.evaluate.backends import load

        if self._calibration is None or self._calibration.rounding == "nearest":
            execute(self._model, outputs, group=group, cluster=self._cluster, **options)
            group.then(work.remove)
            return []
        text = self._calibration.cut(self._model)
        for plan, _ in outputs:
            text.describe(plan.metadata, self._calibration.rounding)
        model = load(self._model, self._calibration.compute, keep=False)
        return execute_with_feedback(
            model,
            outputs,
            text,
            rounding=self._calibration.rounding,
            work=work,
            group=group,
            progress=self._progress,
            cluster=self._cluster,
            **options,
        )

    def _importance(self, calibration: Calibration) -> ImportanceMatrix:
        def advance(done: float, total: int, _: float | None) -> None:
            if self._progress is not None:
                self._progress(Step("calibrate", 0, 0, "", done, total))

        from quantkit.calibration.progress import Step

        output = any(isinstance(kind, Plan) for kind in self._types)
        return calibration.importance(self._model, output, advance, self._cluster)


def quantize(
    source: TensorSource | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    type: str | Plan | Sequence[str | Plan],
    rounding: str = "nearest",
    calibration: str | np.ndarray | os.PathLike[str] | None = None,
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

    `out` is the file, or a directory: one that exists, or a name that ends in a slash. Several types need a directory,
    in which files are named after the model and the type; left out, it is that of the model. `force` replaces files.
    `type` names file types, or is what `plan` or `choose_types` made, to be carried out with this calibration.

    `rounding` is nearest, as llama-quantize rounds, gptq: error feedback by the second moments of `calibration`, or
    yaqa: by those of gradients too. That is a text, token ids, or the path of a text file; `chunking` and `compute` are
    as for `Calibration`. With nearest rounding it takes the place of an importance matrix. `resume` goes on after a
    stop of a run with feedback.
    `progress` is called as by `execute`, with a calibration with a `Step`. `options` and `changes` are as for `plan`,
    the others as for `execute`. Returns the files written. Raises QuantkitError.
    """
    kinds = [type] if isinstance(type, (str, Plan)) else list(type)
    common: dict[str, Any] = {"threads": threads, "allow_nonfinite": allow_nonfinite}
    common["max_buffer_size"] = max_buffer_size
    if calibration is None:
        check_rounding(rounding)
        if rounding != "nearest":
            raise QuantkitError(f"rounding {rounding} needs a calibration text", option="calibration")
        names = [kind for kind in kinds if isinstance(kind, str)]
        if len(names) < len(kinds):
            raise QuantkitError("a plan needs its calibration text, or `execute`", option="calibration")
        return pipeline.quantize(
            source, out, type=names, progress=progress, force=force, options=options, **common, **changes
        )
    from quantkit.formats.unfinished import WorkDirectory

    options = replace(options or QuantizeOptions(), **changes)
    model = open_model(source, allow_nonfinite=allow_nonfinite)
    used = calibration_of(calibration, rounding, chunking, compute or Compute(threads=threads))
    run = CalibratedRun(model, used, options, types=kinds, progress=progress)
    destination = Destination.of(out, home_of(source if isinstance(source, (str, os.PathLike)) else model.label))
    paths = output_paths(destination, model, run.names, run.marks)
    with OutputGroup(force=force, directory=destination.directory) as group:
        for path in paths:
            group.check(path)
        work = WorkDirectory(paths[0], resume)
        outputs = list(zip(run.plans(work), paths, strict=True))
        run.write(outputs, work, group, **common)
    return [path for plan, target in outputs for path, _, _ in plan.files(target)]


def choose_types(
    source: TensorSource | str | os.PathLike[str],
    target: str | Target,
    calibration: str | np.ndarray | os.PathLike[str],
    *,
    rounding: str = "gptq",
    wishes: Wishes | None = None,
    chunking: Chunking | None = None,
    compute: Compute | None = None,
    progress: Callable[[Step], None] | None = None,
    options: QuantizeOptions | None = None,
    **changes: Any,
) -> ChosenPlan:
    """A plan whose types lose least on `calibration` within the bytes of `target`, for `quantize` to carry out.

    `target` is a size such as 5.2GB, bits per weight such as 4.5bpw, or a file type such as Q4_K_M for the size of
    that. `wishes` bound the types and tie tensors; tensors whose type `options` or `changes` name keep it. The others
    are as for `quantize`. Raises QuantkitError for a size that cannot be reached.
    """
    from quantkit.calibration.planning import ChosenPlan, Target

    model = open_model(source)
    used = calibration_of(calibration, rounding, chunking, compute or Compute())
    targets = [Target.parse(target) if isinstance(target, str) else target]
    options = replace(options or QuantizeOptions(), **changes)
    (plan,) = CalibratedRun(model, used, options, targets=targets, wishes=wishes, progress=progress).plans()
    assert isinstance(plan, ChosenPlan)
    return plan


def calibration_of(
    text: str | np.ndarray | os.PathLike[str], rounding: str, chunking: Chunking | None, compute: Compute
) -> Calibration:
    """What the arguments of `quantize` and `choose_types` say. Raises QuantkitError where a file cannot be read."""
    name = ""
    if isinstance(text, os.PathLike):
        name = os.fspath(text)
        try:
            text = Path(text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise QuantkitError(f"{name}: {problem}") from None
    return Calibration(text=text, name=name, rounding=rounding, chunking=chunking or Chunking(), compute=compute)


def weigh(model: TensorSource, plan: Plan, matrix: ImportanceMatrix) -> None:
    """Give the tensors of `plan` the importance of `matrix`."""
    weights = matrix.weights()
    for line in plan:
        if not line.is_copy:
            line.weights = weights_for(line.info, line.source_name, weights, model.label)
