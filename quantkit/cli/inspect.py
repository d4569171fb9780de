"""`quantkit inspect`: what a GGUF file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Verbose, emit, setup


def command(
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="GGUF file; any shard of a split model.")],
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show a GGUF file's metadata, tensors, types and bits per weight."""
    setup(verbose, quiet)
    from quantkit.report.contents import describe
    from quantkit.sources.source import GGUFSource

    contents = describe(GGUFSource(file))
    emit(str(contents), contents.as_dict(), as_json)
