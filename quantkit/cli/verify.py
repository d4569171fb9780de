"""`quantkit verify`: whether a GGUF file is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Threads, Verbose, byte_progress, emit, setup


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file; any shard of a split model.")],
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check a GGUF file: its structure, the bytes of every tensor, its vocabulary, the keys of its architecture.

    The exit code is 1 when something is wrong.
    """
    setup(verbose, quiet)
    from quantkit.trust.verify import verify

    total = file.stat().st_size if file.is_file() else 0
    with byte_progress(total, "verify") as progress:
        verdict = verify(file, threads, progress)
    emit(str(verdict), verdict.as_dict(), as_json)
    if not verdict.sound:
        raise typer.Exit(1)
