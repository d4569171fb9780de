"""`quantkit recommend`: the best type for the memory available."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Json, Pre, Quiet, Revision, Verbose, emit, setup


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL|DIR", help="Model to be quantized, or a directory of GGUF files to choose from."),
    ],
    memory: Annotated[str, typer.Option("--memory", "-m", metavar="SIZE", help="Memory to run it in, such as 8GB.")],
    context: Annotated[int, typer.Option("--context", "--ctx-size", "-c", min=1, metavar="N", help="Tokens.")] = 8192,
    kv: Annotated[str, typer.Option("--kv", metavar="TYPE", help="Type of the key-value cache.")] = "f16",
    pre: Pre = None,
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Recommend the largest type that fits into the given memory, and show the next larger and smaller ones.

    Counts the weights, the key-value cache of the context, and llama.cpp's compute buffers. Nothing is quantized.
    """
    setup(verbose, quiet)
    from quantkit.cli.parsing import parse_size
    from quantkit.report.measurements import recommendation_text
    from quantkit.report.memory import gguf_files, recommend, recommend_files
    from quantkit.sources.source import open_model

    limit = parse_size(memory)
    found = gguf_files(Path(source))
    if found:
        result = recommend_files(found, limit, n_ctx=context, kv=kv)
    else:
        result = recommend(open_model(source, revision=revision, pre=pre), limit, n_ctx=context, kv=kv)
    emit(recommendation_text(result), result.as_dict(), as_json)
    if result.best is None:
        raise typer.Exit(1)
