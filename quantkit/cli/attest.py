"""`quantkit attest`: write or check a statement of what a GGUF file was made from."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Force, Json, Pre, Quiet, Revision, Threads, Verbose, emit, note, setup


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file; any shard of a split model.")],
    source: Annotated[
        str,
        typer.Option(metavar="MODEL", help="What it was quantized from: GGUF file, checkpoint directory, or hub id."),
    ],
    imatrix: Annotated[Path | None, typer.Option(metavar="FILE", help="Importance matrix it was made with.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check this statement instead of writing one.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|DIR", show_default="FILE.intoto.json", help="File to write, or directory."
        ),
    ] = None,
    force: Force = False,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Attest how a GGUF file was quantized: reproduce it from its source and, if it is identical, write a statement.

    The in-toto statement identifies the file, its source and the importance matrix by SHA-256. With --check, a
    statement is checked against the files, and the file is reproduced again. Sign it with model-signing or cosign.
    """
    setup(verbose, quiet)
    from quantkit.cli.verify import derived_again
    from quantkit.formats.atomic import OutputGroup, write_whole
    from quantkit.pipeline.naming import Destination
    from quantkit.sources.source import GGUFSource, open_model
    from quantkit.trust.attestation import attestation, check_statement

    model, origin = GGUFSource(file), open_model(source, revision=revision, pre=pre, allow_nonfinite=True)
    if check is not None:
        replay = check_statement(check, model, origin, imatrix)
        replay.derivation = derived_again(file, source, imatrix, False, False, pre, revision, threads)
        emit(str(replay), replay.as_dict(), as_json)
        if not replay.holds:
            raise typer.Exit(1)
        return
    inputs = [*model.files, *origin.files, *([imatrix] if imatrix is not None else [])]
    destination = Destination.of(output, file.parent)
    path = destination.file(file.name + ".intoto.json")
    with OutputGroup(force=force, inputs=inputs, directory=destination.directory) as group:
        target = group.add(path)
        derivation = derived_again(file, source, imatrix, False, False, pre, revision, threads)
        statement = attestation(model, origin, derivation, imatrix, shlex.join(["quantkit", *sys.argv[1:]]))
        write_whole(target, json.dumps(statement, indent=2) + "\n")
    note(f"wrote {path}")
    if as_json:
        emit("", statement, True)
