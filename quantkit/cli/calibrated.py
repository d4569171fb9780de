"""What `quantkit quantize` does with a calibration text: rounding by it, and types chosen by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantkit.cli.console import joined, read_text, work_progress

if TYPE_CHECKING:
    from quantkit.calibration.planning import Wishes
    from quantkit.calibration.progress import Step
    from quantkit.calibration.rounding import RoundedTensor
    from quantkit.evaluate.settings import Chunking, Compute
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.naming import Destination
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.plan import Plan
    from quantkit.sources.source import TensorSource


@dataclass(frozen=True)
class CalibrationOptions:
    """The command's options that have to do with a calibration."""

    calibration: str | None
    rounding: str | None
    chunking: Chunking
    compute: Compute
    resume: bool
    sizes: Sequence[str]
    plan: Path | None
    save_plan: Path | None
    dry_run: bool

    @property
    def wanted(self) -> bool:
        """Whether there is more to do than llama-quantize does."""
        return bool(self.calibration or self.sizes or self.plan or self.rounding not in (None, "nearest"))

    def run(
        self,
        model: TensorSource,
        types: Sequence[str],
        options: QuantizeOptions,
        wishes: Wishes,
        destination: Destination,
        group: OutputGroup,
        cluster: str | None,
        **common: object,
    ) -> tuple[list[tuple[Plan, Path]], list[list[RoundedTensor]]]:
        """Choose types where they are to be, and write the files unless this is a dry run."""
        from quantkit.calibration.planning import ChosenPlan, Target, load_plan, save_plan
        from quantkit.calibration.run import CalibratedRun, Calibration
        from quantkit.compile.ahead import compiled_ahead
        from quantkit.formats.unfinished import WorkDirectory
        from quantkit.machine import default_threads
        from quantkit.pipeline.naming import output_paths

        self._check(types, options)
        saved = None if self.plan is None else load_plan(self.plan, model, options)
        rounding = self.rounding or (saved.rounding if saved is not None else "gptq" if self.sizes else "nearest")
        calibration = None
        if self.calibration is not None:
            calibration = Calibration(
                text=read_text(self.calibration),
                name=self.calibration,
                rounding=rounding,
                chunking=self.chunking,
                compute=self.compute,
            )
        targets = [Target.parse(size) for size in self.sizes]
        with ExitStack() as stack:
            workers = stack.enter_context(joined(cluster))
            run = CalibratedRun(
                model,
                calibration,
                options,
                types=types if saved is None else [saved],
                targets=targets,
                wishes=wishes,
                progress=stack.enter_context(_steps()),
                cluster=workers,
            )
            if workers is None:
                stack.enter_context(compiled_ahead(run.kernels(), self.compute.threads or default_threads()))
            paths = output_paths(destination, model, run.names, run.marks)
            work = None
            if not self.dry_run:
                for path in paths:
                    group.check(path)
                work = WorkDirectory(paths[0], self.resume)
            plans_file = None if self.save_plan is None else group.add(self.save_plan)
            outputs = list(zip(run.plans(work, None if saved is None else saved.costs), paths, strict=True))
            if plans_file is not None and isinstance(plan := outputs[0][0], ChosenPlan):
                save_plan(plan, model, plans_file)
            if work is None:
                return outputs, []
            return outputs, run.write(outputs, work, group, **common)

    def _check(self, types: Sequence[str], options: QuantizeOptions) -> None:
        """Raise BadParameter for options that do not go together."""
        if self.calibration is None and not (self.plan is not None and not self.sizes and self.dry_run):
            what = f"--rounding {self.rounding}" if types else "a choice of types"
            raise typer.BadParameter(f"{what} needs a text: name one with --calibration.")
        if options.imatrix is not None:
            raise typer.BadParameter("--calibration takes the place of --imatrix: use one of them.")
        if options.prune_layers:
            raise typer.BadParameter(
                "--calibration runs the whole model: prune layers first, then quantize the result."
            )
        if self.save_plan is not None and (len(self.sizes) or (self.plan is not None)) != 1:
            raise typer.BadParameter("--save-plan needs one --target-size whose plan it saves.")
        if self.sizes and options.pure:
            raise typer.BadParameter("--pure gives all tensors one type: nothing is left to choose.")


def wishes_of(minimum: str | None, maximum: str | None, ties: Sequence[str], engine: str | None) -> Wishes:
    """What types may be chosen."""
    from quantkit.blocks.types import GGMLType
    from quantkit.calibration.choice import SMALLEST
    from quantkit.calibration.planning import Wishes

    return Wishes(
        SMALLEST if minimum is None else GGMLType.parse(minimum),
        None if maximum is None else GGMLType.parse(maximum),
        engine,
        ties,
    )


@contextmanager
def _steps() -> Iterator[Callable[[Step], None]]:
    """A progress bar for the phases of a run, one after the other."""
    phase, bars = "", []

    def advance(step: Step) -> None:
        nonlocal phase
        if step.phase != phase:
            close()
            bars.append(work_progress(step.phase))
            shows.append(bars[-1].__enter__())
            phase = step.phase
        shows[-1](step.done / step.total if step.total else 1.0, step.where)

    def close() -> None:
        while bars:
            bars.pop().__exit__(None, None, None)

    shows: list[Callable[[float, str], None]] = []
    try:
        yield advance
    finally:
        close()


def summary(report: Sequence[RoundedTensor]) -> Iterator[str]:
    """What to say of how tensors came out, a line each."""
    losses = [(each.loss, each.plain_loss) for each in report if each.loss is not None and each.plain_loss]
    if losses:
        kept = math.exp(sum(math.log(max(loss, 1e-30) / plain) for loss, plain in losses) / len(losses))
        yield f"{len(losses)} tensors with feedback, their errors {1 - kept:.0%} smaller than to the nearest"
    for reason in dict.fromkeys(each.note for each in report if each.note):
        names = [each.name for each in report if each.note == reason]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield f"{reason}: {some}"
