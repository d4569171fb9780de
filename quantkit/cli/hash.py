"""`quantkit hash`: digests of a model's tensors."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.console import Json, Model, Quiet, Revision, Threads, Verbose, byte_progress, emit, setup


def command(
    model: Model,
    whole: Annotated[bool, typer.Option("--model-only", help="Print only the digest of the whole model.")] = False,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Print SHA-256 digests of a model: of each tensor's bytes, and of all tensors together.

    They do not depend on metadata, the order of tensors or shards: equal digests mean equal weights.
    """
    setup(verbose, quiet)
    from quantkit.sources.source import open_model
    from quantkit.trust.digest import model_digests

    source = open_model(model, revision=revision)
    with byte_progress(sum(info.nbytes for info in source.tensors.values()), "hash") as progress:
        digests = model_digests(source, threads, progress)
    emit(f"{digests.model}  {digests.label}" if whole else str(digests), digests.as_dict(), as_json)
