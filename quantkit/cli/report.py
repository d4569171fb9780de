"""`quantkit report`: convert, quantize and measure in one go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import (
    Backend,
    Chunks,
    Context,
    Device,
    Force,
    Json,
    Pre,
    Precision,
    Quiet,
    Revision,
    Text,
    Threads,
    Verbose,
    byte_progress,
    chunk_progress,
    computed_imatrix,
    emit,
    note,
    read_text,
    setup,
    split_list,
)
from quantkit.cli.type_options import FileTypes
from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import DEFAULT
from quantkit.wording import size_text


def command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint directory, hub id ORG/NAME, or 16-bit GGUF file.")
    ],
    text: Text = DEFAULT,
    types: FileTypes = ["Q8_0", "Q4_K_M", "Q4_0"],  # noqa: B006
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", show_default="NAME-GGUF/", help="Directory to write to."),
    ] = None,
    force: Force = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Importance matrix to quantize with, GGUF or .dat."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text (UTF-8), or wikitext-2[:SPLIT]: compute one from its first 128 chunks.",
        ),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are quantized already.")
    ] = False,
    n_ctx: Context = 512,
    chunks: Chunks = None,
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
    """Convert, quantize and measure in one go: a table of what each type costs, and report.md and report.json.

    The files, and the report beside them, go to the directory given with -o; when something fails, nothing does.
    """
    setup(verbose, quiet)
    if imatrix is not None and calibration is not None:
        raise typer.BadParameter("--calibration takes the place of --imatrix: use one of them.")
    from quantkit.calibration.text import CHUNKING
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.evaluate.settings import Chunking, Compute
    from quantkit.formats.atomic import OutputGroup
    from quantkit.machine import default_threads
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import Destination, output_paths, stem
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.plan import plan_all
    from quantkit.report.ladder import REPORT_FILES, ladder_kernels, measure, text_tokens
    from quantkit.sources.source import open_model
    from quantkit.trust.digest import file_digests

    given = None if output is None else Destination.of(output)
    if given is not None and not given.is_directory:
        raise QuantkitError(f"{output}: a report is several files; name a directory: {output}/")
    compute = Compute(backend=backend, device=device, precision=precision, threads=threads)
    options = QuantizeOptions(imatrix=imatrix, calibrated=calibration is not None, allow_requantize=allow_requantize)
    words, chunking = read_text(text), Chunking(n_ctx=n_ctx, chunks=chunks)
    model = open_model(checkpoint, revision=revision, pre=pre)
    names = [file_type(name).name for name in split_list(types)]
    directory = given.path if given is not None else Path(f"{stem(model)}-GGUF")
    paths = output_paths(Destination(directory, True), model, names)
    inputs = [*model.files, text, *(each for each in (imatrix, calibration) if each is not None)]
    with OutputGroup(force=force, inputs=inputs, directory=directory) as group:
        matrix_file = directory / "imatrix.gguf" if calibration is not None else None
        for path in (*paths, *(directory / name for name in REPORT_FILES), *([matrix_file] if matrix_file else [])):
            group.check(path)
        plans = plan_all(model, names, options)
        tokens = text_tokens(model, words, chunking)
        if calibration is not None and matrix_file is not None:
            cut = Chunking(n_ctx=n_ctx, chunks=CHUNKING.chunks)
            matrix = computed_imatrix(model, calibration, cut, compute)
            matrix.save(group.add(matrix_file))
            plans = plan_all(model, names, replace(options, imatrix=matrix))
        built = list(zip(plans, paths, strict=True))
        with compiled_ahead(ladder_kernels(model, plans, backend), threads or default_threads()):
            total = sum(info.nbytes for info in model.tensors.values())
            with byte_progress(total, "quantize") as progress:
                execute(model, built, threads=threads, progress=progress, group=group)
            with chunk_progress("measure") as bar:
                ladder = measure(
                    model,
                    built,
                    group,
                    tokens,
                    text_name=Path(text).name,
                    imatrix=matrix_file or imatrix,
                    chunking=chunking,
                    compute=compute,
                    progress=lambda done, all_of_them, kld: bar(done, all_of_them, f"KLD = {kld:.6f}"),
                )
        pages = ladder.write(directory, group)
    emit(str(ladder), ladder.as_dict(), as_json)
    digests = {rung.path: rung.sha256 for rung in ladder.rungs if rung.path is not None}
    digests |= file_digests([*([matrix_file] if matrix_file else []), *pages])
    for path, digest in digests.items():
        note(f"wrote {path}: {size_text(path.stat().st_size)}, sha256 {digest}")
