"""`quantkit verify`: whether a GGUF file is sound, and exactly what a source gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import Json, Pre, Quiet, Revision, Threads, Verbose, byte_progress, emit, setup
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.trust.derivation import Derivation

DERIVING = "Reproducing the file"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file; any shard of a split model.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=DERIVING,
            help="What it was quantized from: GGUF file, checkpoint directory, or hub id ORG/NAME.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=DERIVING, help="Importance matrix it was made with.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", rich_help_panel=DERIVING, help="Continue after the first tensor that differs.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", rich_help_panel=DERIVING, help="Compare a random sample of the rows.")
    ] = False,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check a GGUF file: its structure, the bytes of every tensor, its vocabulary, the keys of its architecture.

    With --source, that is quantized again and compared byte for byte. Exits with 1 when something is wrong.
    """
    setup(verbose, quiet)
    if source is None and (imatrix is not None or everything or quick):
        raise QuantkitError("an importance matrix, --all and --quick apply to a comparison: name the --source")
    from quantkit.trust.verify import verify

    total = file.stat().st_size if file.is_file() else 0
    with byte_progress(total, "verify") as progress:
        verdict = verify(file, threads, progress)
    text, data, fine = str(verdict), verdict.as_dict(), verdict.sound
    if source is not None and verdict.readable:
        derivation = derived_again(file, source, imatrix, everything, quick, pre, revision, threads)
        text, fine = f"{text}\n{derivation}", fine and derivation.exact
        data = {**data, "derivation": derivation.as_dict()}
    emit(text, data, as_json)
    if not fine:
        raise typer.Exit(1)


def derived_again(
    file: Path,
    source: str,
    imatrix: Path | None,
    everything: bool,
    quick: bool,
    pre: str | None,
    revision: str | None,
    threads: int | None,
) -> Derivation:
    """Derive `file` from `source` again, with a bar."""
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.formats.imatrix import ImportanceMatrix
    from quantkit.machine import default_threads
    from quantkit.pipeline.execute import quantizing_kernels
    from quantkit.sources.source import GGUFSource, open_model
    from quantkit.trust.derivation import derive, derived_plan

    model, origin = GGUFSource(file), open_model(source, revision=revision, pre=pre, allow_nonfinite=True)
    matrix = None if imatrix is None else ImportanceMatrix.load(imatrix)
    plan = derived_plan(model, origin, None if matrix is None else matrix.weights(), [])
    total = sum(info.nbytes for info in origin.tensors.values())
    ahead = compiled_ahead(quantizing_kernels([plan]), threads or default_threads())
    with ahead, byte_progress(total, "derive") as progress:
        return derive(
            model,
            origin,
            matrix,
            imatrix_name=None if imatrix is None else str(imatrix),
            everything=everything,
            quick=quick,
            threads=threads,
            progress=progress,
        )
