"""`quantkit compare`: where two models differ."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.console import Json, Quiet, Revision, Verbose, byte_progress, emit, setup


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="Reference model: GGUF file, checkpoint directory, or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Model to compare with it.")],
    revision: Revision = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show where two models differ: metadata, tensors, and the error of each tensor in B relative to A.

    RMSE is the root mean square difference of the weights; relative RMSE divides it by the root mean square of A's.
    """
    setup(verbose, quiet)
    from quantkit.report.comparison import compare
    from quantkit.sources.source import open_model

    first, second = open_model(a, revision=revision), open_model(b, revision=revision)
    with byte_progress(sum(info.nbytes for info in second.tensors.values()), "compare") as progress:
        result = compare(first, second, progress)
    emit(str(result), result.as_dict(), as_json)
