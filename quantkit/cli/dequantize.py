"""`quantkit dequantize`: quantized weights as floats."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from quantkit.cli.console import Force, Quiet, Threads, Verbose, byte_progress, note, setup
from quantkit.wording import size_text


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
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE|DIR", help="File to write, or directory.")
    ] = None,
    force: Force = False,
    threads: Threads = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write a GGUF model's weights as F32, F16 or BF16, for tools that cannot read its types."""
    setup(verbose, quiet)
    from quantkit.blocks.types import GGMLType
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.naming import Destination, full_stem, home_of
    from quantkit.pipeline.plan import plan_dequantize
    from quantkit.sources.source import GGUFSource

    model = GGUFSource(source)
    plan = plan_dequantize(model, GGMLType.parse(kind.value))
    destination = Destination.of(output, home_of(source))
    # The name keeps the type that the weights had: MODEL-F16.gguf is the original.
    path = destination.file(f"{full_stem(model)}-{plan.name}.gguf")
    total = sum(info.nbytes for info in model.tensors.values())
    with (
        OutputGroup(force=force, directory=destination.directory) as group,
        byte_progress(total, "dequantize") as progress,
    ):
        execute(model, [(plan, path)], threads=threads, progress=progress, group=group)
    note(f"{path}: {size_text(plan.file_size)}")
