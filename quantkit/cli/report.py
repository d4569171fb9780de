"""`quantkit report`: convert, quantize and measure in one go."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.calibration.roundings import Rounding
from quantkit.cli.console import (
    Backend,
    Chunks,
    Context,
    Device,
    Force,
    Json,
    Memory,
    Pre,
    Precision,
    Quiet,
    Revision,
    Threads,
    Verbose,
    Workers,
    chunk_progress,
    emit,
    joined,
    measure_progress,
    note,
    read_text,
    setup,
    split_list,
    work_progress,
)
from quantkit.cli.type_options import FileTypes
from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import DEFAULT

Names = list[str]

# Sections of the help.
IMPORTANCE = "Importance matrix"
PAGE = "Report and card"
# What the command exits with when the files do not meet --require.
REQUIREMENT_FAILED = 3


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint directory, hub id ORG/NAME, or 16-bit GGUF file.")
    ],
    text: Annotated[
        Names,
        typer.Option("--text", "--file", "-f", metavar="FILE", help="Text to measure on; repeat it for several."),
    ] = [DEFAULT],  # noqa: B006
    types: FileTypes = [],  # noqa: B006
    ladder: Annotated[
        str | None, typer.Option("--ladder", metavar="NAME", help="Types by name: small, standard or full.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", show_default="NAME-GGUF/", help="Directory to write to."),
    ] = None,
    force: Force = False,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=IMPORTANCE, help="Importance matrix to use.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", rich_help_panel=IMPORTANCE, help="Text to compute an importance matrix from."),
    ] = None,
    calibration_chunks: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=IMPORTANCE, help="Chunks of the calibration text.")
    ] = 128,
    rounding: Annotated[
        Rounding,
        typer.Option(
            metavar="NAME",
            rich_help_panel=IMPORTANCE,
            help="Rounding: nearest, or gptq or yaqa (these need the calibration text).",
        ),
    ] = "nearest",
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are quantized already.")
    ] = False,
    require: Annotated[
        Names,
        typer.Option(
            metavar="NAME<=X", rich_help_panel=PAGE, help='Exit with 3 unless this holds, such as "kld<=0.05".'
        ),
    ] = [],  # noqa: B006
    prompts: Annotated[
        int,
        typer.Option(
            min=0, max=100, metavar="N", rich_help_panel=PAGE, help="Number of prompts that the files continue."
        ),
    ] = 8,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", rich_help_panel=PAGE, help="Hub id of the original, for the card.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", rich_help_panel=PAGE, help="Repository of the files, for the card."),
    ] = None,
    n_ctx: Context = 512,
    chunks: Chunks = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    memory: Memory = None,
    pre: Pre = None,
    revision: Revision = None,
    cluster: Workers = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Convert, quantize and measure in one go: files, a page that shows what each costs, and a model card.

    Everything is written to the directory given with -o: the GGUF files, report.html, report.md, report.json, and
    README.md for the hub. An interrupted run continues when it is started again.
    """
    setup(verbose, quiet)
    from quantkit.cli.parsing import parse_memory
    from quantkit.evaluate.settings import Chunking, Compute

    compute = Compute(backend=backend, device=device, precision=precision, threads=threads, memory=parse_memory(memory))
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.machine import default_threads
    from quantkit.pipeline.cluster import ClusterLostError
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import Destination, stem
    from quantkit.report.data import NamedText
    from quantkit.report.ladder import Ladder, LadderOptions, ladder_kernels, ladder_types
    from quantkit.report.summary import check_requirements, failures, short_table
    from quantkit.sources.source import open_model
    from quantkit.wording import size_text

    given = None if output is None else Destination.of(output)
    if given is not None and not given.is_directory:
        raise QuantkitError(f"{output}: a report is several files; name a directory: {output}/")
    if imatrix is not None and calibration is not None:
        raise typer.BadParameter("--calibration takes the place of --imatrix: use one of them.")
    if types and not split_list(types):
        raise QuantkitError("no file type is named")
    check_requirements(require)
    names = ladder_types([*split_list(types), *([ladder] if ladder else [])] or ["Q8_0", "Q4_K_M", "Q4_0"])
    texts = [NamedText(Path(name).name, read_text(name)) for name in text]
    if len({each.name for each in texts}) < len(texts):
        raise QuantkitError("two texts have the same name: the report could not tell them apart")
    calibrated = None if calibration is None else NamedText(Path(calibration).name, read_text(calibration))
    model = open_model(checkpoint, revision=revision, pre=pre)
    if base_model is None and "/" in checkpoint and not Path(checkpoint).exists():
        base_model = checkpoint
    directory = given.path if given is not None else Path(f"{stem(model)}-GGUF")
    options = LadderOptions(
        types=names,
        texts=texts,
        imatrix=imatrix,
        calibration=calibrated,
        calibration_chunking=Chunking(n_ctx=n_ctx, chunks=calibration_chunks),
        rounding=rounding,
        allow_requantize=allow_requantize,
        chunking=Chunking(n_ctx=n_ctx, chunks=chunks),
        compute=compute,
        n_prompts=prompts,
        base_model=base_model,
        repo=repo,
        command=shlex.join(["quantkit", *sys.argv[1:]]),
    )
    with joined(cluster) as workers:
        run = Ladder(model, directory, options, force, workers)
        kernels = ladder_kernels(model, [file_type(name) for name in names], backend) if workers is None else []
        try:
            with compiled_ahead(kernels, threads or default_threads()):
                if calibrated is not None and rounding == "nearest":
                    with measure_progress("calibrate") as progress:
                        run.calibrate(progress)
                with work_progress("quantize") as work:
                    run.quantize(work)
                with measure_progress("measure", "KLD = {:.6f}") as progress:
                    run.measure(progress)
                if prompts:
                    with chunk_progress("continue", "model") as bar:
                        run.say(lambda done, of: bar(done, of, ""))
                report = run.write()
        except ClusterLostError:
            raise  # what is there counts for the next run
        except (QuantkitError, OSError, MemoryError):
            run.undo()
            raise
    emit(short_table(report), report, as_json)
    for path in run.written:
        note(f"wrote {path}: {size_text(path.stat().st_size)}, sha256 {run.digest(path)}")
    failed = failures(report, require)
    for line in failed:
        note(f"failed: {line}")
    if failed:
        raise typer.Exit(REQUIREMENT_FAILED)
