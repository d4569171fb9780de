"""`quantkit embed`: vectors of texts."""

from __future__ import annotations

from typing import Annotated

import typer

from quantkit.cli.console import (
    Backend,
    Device,
    Json,
    Model,
    Pre,
    Precision,
    Quiet,
    Revision,
    Threads,
    Verbose,
    chunk_progress,
    emit,
    read_text,
    setup,
)


def command(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="A text; may be given several times."),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="Texts, one in each line (UTF-8).")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", show_default="the model's", help="mean, cls or last: which tokens' vectors count."
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave vectors as long as they are, instead of length one.")
    ] = False,
    pre: Pre = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Print the vectors of texts, as an embedding model gives them: the numbers of each text in a line."""
    setup(verbose, quiet)
    from quantkit.evaluate.embeddings import embed
    from quantkit.evaluate.settings import Compute
    from quantkit.sources.source import open_model

    texts = list(prompts or ())
    if file is not None:
        texts += [line for line in read_text(file).split("\n") if line]
    if not texts:
        raise typer.BadParameter("there is no text: use --prompt or --file")
    compute = Compute(backend=backend, device=device, precision=precision, threads=threads)
    source = open_model(model, revision=revision, pre=pre)
    with chunk_progress("embed", "text") as bar:
        vectors = embed(
            source,
            texts,
            pooling=pooling,
            normalise=not raw,
            compute=compute,
            progress=lambda done, total: bar(done, total, ""),
        )
    numbers = [[float(f"{number:.7g}") for number in vector] for vector in vectors.tolist()]
    data = {"model": source.label, "texts": texts, "vectors": numbers}
    emit("\n".join(" ".join(map(str, vector)) for vector in numbers), data, as_json)
