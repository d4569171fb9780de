"""`quantkit merge`: the shards of a split model into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Quiet, Verbose, byte_progress, note, setup


def command(
    shard: Annotated[Path, typer.Argument(metavar="SHARD", help="Any shard of a split model.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Join the shards of a split GGUF model."""
    setup(verbose, quiet)
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.plan import plan_copy
    from quantkit.sources.source import GGUFSource

    source = GGUFSource(shard)
    plan = plan_copy(source)
    with byte_progress(plan.nbytes, "merge") as progress:
        execute(source, [(plan, output)], allow_nonfinite=True, progress=progress)
    note(f"{output}: {plan.file_size / 1e6:.1f} MB from {len(source.files)} shards")
