"""`quantkit lint`: what hubs and engines would reject or misread."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Revision, Verbose, emit, setup


def command(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="GGUF file, or a directory of them.")],
    source: Annotated[
        str | None, typer.Option("--source", metavar="MODEL", help="Original, to compare template and tokens with.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check GGUF files before they are published: names, shards, limits of engines, template and special tokens.

    Exits with 1 when there is an error; warnings and notes are printed.
    """
    setup(verbose, quiet)
    from quantkit.report.lint import ERROR, as_dict, lint
    from quantkit.sources.source import open_model

    findings = lint(path, None if source is None else open_model(source, revision=revision))
    shown = [str(each) for each in findings] or [f"{path}: no problems found"]
    emit("\n".join(shown), as_dict(findings), as_json)
    if any(each.level == ERROR for each in findings):
        raise typer.Exit(1)
