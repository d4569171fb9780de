"""`quantkit report`: convert, quantize and measure in one go."""

from __future__ import annotations

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
    emit,
    note,
    read_text,
    setup,
    split_list,
)
from quantkit.cli.type_options import FileTypes
from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import DEFAULT


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

    The files, and the report beside them, go to the directory given with -o.
    """
    setup(verbose, quiet)
    from quantkit.evaluate.settings import Chunking, Compute

    compute = Compute(backend=backend, device=device, precision=precision, threads=threads)
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.formats.atomic import OutputGroup
    from quantkit.machine import default_threads
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import Destination, stem
    from quantkit.report.ladder import build, ladder_kernels, measure
    from quantkit.sources.source import open_model

    given = None if output is None else Destination.of(output)
    if given is not None and not given.is_directory:
        raise QuantkitError(f"{output}: a report is several files; name a directory: {output}/")
    words = read_text(text)
    model = open_model(checkpoint, revision=revision, pre=pre)
    files = [file_type(name) for name in split_list(types)]
    directory = given.path if given is not None else Path(f"{stem(model)}-GGUF")
    total = sum(info.nbytes for info in model.tensors.values())
    with (
        OutputGroup(force=force, inputs=[*model.files, text], directory=directory) as group,
        compiled_ahead(ladder_kernels(model, files, backend), threads or default_threads()),
    ):
        with byte_progress(total, "quantize") as progress:
            built = build(model, files, directory, group, threads=threads, progress=progress)
        with chunk_progress("measure") as bar:
            ladder = measure(
                model,
                built,
                group,
                words,
                text_name=Path(text).name,
                chunking=Chunking(n_ctx=n_ctx, chunks=chunks),
                compute=compute,
                progress=lambda done, all_of_them, kld: bar(done, all_of_them, f"KLD = {kld:.6f}"),
            )
        written = ladder.write(directory, group)
    emit(str(ladder), ladder.as_dict(), as_json)
    for path in written:
        note(f"wrote {path}")
