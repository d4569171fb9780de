"""`quantkit types`: the file types, and what each is for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Revision, Verbose, emit, setup


def command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model to show the sizes for: GGUF file, directory, or hub id."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """List the file types that quantize writes, with bits per weight, size, and what each is for.

    Without a model, bits and sizes are those of Llama 3 8B.
    """
    setup(verbose, quiet)
    from quantkit.report.type_guide import type_guide
    from quantkit.sources.source import open_model

    guide = type_guide(None if source is None else open_model(source, revision=revision))
    emit(str(guide), asdict(guide), as_json)
