"""`quantkit dequantize`: quantized weights as floats."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Quiet, Threads, Verbose, byte_progress, note, setup


class FloatType(str, Enum):
    """The type of the matrices in the file."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"


def command(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="GGUF file; any shard of a split model.")],
    kind: Annotated[
        FloatType,
        typer.Option("--type", "--types", metavar="TYPE", case_sensitive=False, help="F32, F16 or BF16."),
    ] = FloatType.F32,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = None,
    threads: Threads = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write a GGUF model's weights as F32, F16 or BF16, for tools that cannot read its types."""
    setup(verbose, quiet)
    from quantkit.blocks.types import GGMLType
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.naming import output_paths
    from quantkit.pipeline.plan import plan_dequantize
    from quantkit.sources.source import open_source

    model = open_source(source)
    plan = plan_dequantize(model, GGMLType.parse(kind.value))
    path = output_paths(source, model, [plan.name], output)[0]
    with byte_progress(sum(info.nbytes for info in model.tensors.values()), "dequantize") as progress:
        execute(model, [(plan, path)], threads=threads, progress=progress)
    note(f"{path}: {plan.file_size / 1e6:.1f} MB")
