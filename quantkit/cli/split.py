"""`quantkit split`: one GGUF file into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Force, Quiet, SplitSize, SplitTensors, Verbose, byte_progress, note, setup
from quantkit.wording import count_text


def command(
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="GGUF file.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|DIR", show_default="MODEL", help="Prefix of the shards, or directory."
        ),
    ] = None,
    force: Force = False,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Cut a GGUF file into shards, as gguf-split does: NAME-00001-of-00003.gguf and so on.

    Without a limit, shards hold at most 128 tensors.
    """
    setup(verbose, quiet)
    from quantkit.cli.parsing import parse_size
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.naming import Destination, full_stem
    from quantkit.pipeline.plan import plan_copy
    from quantkit.sources.source import GGUFSource

    source = GGUFSource(file)
    plan = plan_copy(source)
    if split_max_size is None and split_max_tensors is None:
        split_max_tensors = 128
    plan.split_by(parse_size(split_max_size) if split_max_size else None, split_max_tensors)
    destination = Destination.of(output, file.parent)
    prefix = destination.file(full_stem(source))
    with OutputGroup(force=force, directory=destination.directory) as group, byte_progress(plan.nbytes, "split") as bar:
        paths = execute(source, [(plan, prefix)], allow_nonfinite=True, progress=bar, group=group)
    note(f"{paths[0]}: {count_text(len(paths), 'shard')}")
