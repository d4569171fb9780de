"""`quantkit quantize`: a checkpoint or a GGUF file, in one type or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import (
    Json,
    Pre,
    Quiet,
    Revision,
    Threads,
    Verbose,
    announce_compilation,
    byte_progress,
    emit,
    note,
    setup,
    split_list,
)
from quantkit.errors import QuantkitError


def command(
    source: Annotated[str, typer.Argument(help="GGUF file, checkpoint directory, or hub id ORG/NAME.")],
    types: Annotated[list[str], typer.Option("--type", help="File type; repeat it, or use commas, for several.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; a directory for several types.")
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all tensors: no mixture.")] = False,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Quantize quantized tensors.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and infinity.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint or a GGUF file; the bytes are those that llama-quantize writes.

    Several types are written in one reading of the source. Without -o, files are named after the model and the type
    and written beside a local source, or into the current directory for a checkpoint from the hub.
    """
    setup(verbose, quiet)
    announce_compilation()
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import output_paths
    from quantkit.pipeline.plan import plan_quantize
    from quantkit.pipeline.recipe import Options
    from quantkit.pipeline.source import open_source

    files = [file_type(name) for name in split_list(types)]
    model = open_source(source, revision=revision, pre=pre)
    paths = output_paths(source, model, [file.name for file in files], output)
    plans = [plan_quantize(model, file, Options(pure=pure), allow_requantize=allow_requantize) for file in files]
    if dry_run:
        for plan in plans:
            try:
                plan.check()
            except QuantkitError as problem:
                note(f"warning: {problem}")
        emit("\n\n".join(map(str, plans)), [plan.as_dict() for plan in plans], as_json)
        return
    total = sum(info.nbytes for info in model.tensors.values())
    with byte_progress(total, "quantize") as progress:
        outputs = list(zip(plans, paths, strict=True))
        execute(model, outputs, threads=threads, allow_nonfinite=allow_nonfinite, progress=progress)
    for plan, path in outputs:
        note(f"{path}: {plan.file_size / 1e6:.1f} MB, {plan.bits_per_weight:.2f} bits per weight")
    if as_json:
        emit("", [{**plan.as_dict(), "path": str(path)} for plan, path in outputs], True)
