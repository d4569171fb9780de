"""`quantkit tasks`: HellaSwag, Winogrande and multiple-choice scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import (
    Backend,
    Device,
    Json,
    Model,
    Pre,
    Precision,
    Quiet,
    Revision,
    Threads,
    Verbose,
    emit,
    measure_progress,
    measured_ahead,
    setup,
)
from quantkit.errors import QuantkitError


def command(
    source: Model,
    hellaswag: Annotated[Path | None, typer.Option(metavar="FILE", help="HellaSwag tasks: six lines each.")] = None,
    winogrande: Annotated[Path | None, typer.Option(metavar="FILE", help="Winogrande tasks: CSV.")] = None,
    multiple_choice: Annotated[Path | None, typer.Option(metavar="FILE", help="Multiple-choice tasks: binary.")] = None,
    n_tasks: Annotated[
        int | None,
        typer.Option("--tasks", min=1, metavar="N", show_default="all", help="Number of tasks, picked at random."),
    ] = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score a model on tasks, as llama-perplexity does, from files in its formats.

    The model's answer is the ending with the highest mean log-likelihood per token.
    """
    setup(verbose, quiet)
    files = {"hellaswag": hellaswag, "winogrande": winogrande, "multiple-choice": multiple_choice}
    wanted = {kind: path for kind, path in files.items() if path is not None}
    if not wanted:
        raise QuantkitError("no tasks: give a file with --hellaswag, --winogrande or --multiple-choice")
    from quantkit.evaluate.settings import Compute
    from quantkit.evaluate.tasks import read_tasks, tasks
    from quantkit.report.measurements import computed_by
    from quantkit.sources.source import open_model

    compute = Compute(backend=backend, device=device, precision=precision, threads=threads)
    items = {kind: read_tasks(kind, path, n_tasks) for kind, path in wanted.items()}
    model = open_model(source, revision=revision, pre=pre)
    lines, data = [], []
    for kind, own in items.items():
        with measured_ahead(model, threads, backend), measure_progress(kind, "{:.1%}", "task") as progress:
            result = tasks(model, own, kind=kind, compute=compute, progress=progress)
        lines.append(
            f"{kind}: {100 * result.accuracy.value:.4f} % ± {100 * result.accuracy.stderr:.4f} "
            f"({result.n_right} of {result.n_tasks} tasks; 95 %: {100 * result.low:.2f} "
            f"to {100 * result.high:.2f}; {computed_by(result)})"
        )
        data.append({"path": wanted[kind], **asdict(result)})
    emit("\n".join(lines), {"model": model.label, "tasks": data}, as_json)
