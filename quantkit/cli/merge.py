"""`quantkit merge`: the shards of a split model into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Force, Quiet, Verbose, byte_progress, note, setup
from quantkit.wording import count_text, size_text


def command(
    shard: Annotated[Path, typer.Argument(metavar="SHARD", help="Any shard of a split model.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE|DIR", help="File to write, or directory.")],
    force: Force = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Join the shards of a split GGUF model."""
    setup(verbose, quiet)
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.naming import Destination, full_stem
    from quantkit.pipeline.plan import plan_copy
    from quantkit.sources.source import GGUFSource

    source = GGUFSource(shard)
    plan = plan_copy(source)
    destination = Destination.of(output)
    path = destination.file(f"{full_stem(source)}.gguf")
    with OutputGroup(force=force, directory=destination.directory) as group, byte_progress(plan.nbytes, "merge") as bar:
        execute(source, [(plan, path)], allow_nonfinite=True, progress=bar, group=group)
    note(f"{path}: {size_text(plan.file_size)} from {count_text(len(source.shards), 'shard')}")
