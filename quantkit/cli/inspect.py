"""`quantkit inspect`: what a model holds."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from quantkit.cli.console import Json, Model, Pre, Quiet, Revision, Verbose, emit, setup


def command(
    source: Model,
    full: Annotated[bool, typer.Option("--full", help="Show values and arrays whole.")] = False,
    pre: Pre = None,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show a model's metadata, tensors, types and bits per weight.

    A checkpoint is shown as the GGUF file that it converts to.
    """
    setup(verbose, quiet)
    from quantkit.report.contents import describe
    from quantkit.sources.source import open_model

    contents = describe(open_model(source, revision=revision, pre=pre))
    # Without a terminal, COLUMNS does not say how wide the reader's screen is.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    emit("" if as_json else contents.text(width, full), contents.as_dict(full) if as_json else None, as_json)
