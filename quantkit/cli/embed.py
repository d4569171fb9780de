"""`quantkit embed`: vectors of texts, or scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    import numpy as np


def command(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="A text; may be given several times."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Texts, one in each line (UTF-8). A reranker takes a query and a document with a tab between them.",
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            show_default="the model's",
            help="mean, cls or last: which tokens' vectors count; rank: scores by the model's classifier.",
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
    """Print the vectors of texts, as an embedding model gives them: the numbers of each text in a line.

    Rerankers and other classifiers give scores: of texts, or of queries and documents.
    """
    setup(verbose, quiet)
    from quantkit.evaluate.backends import load
    from quantkit.evaluate.embeddings import embed
    from quantkit.evaluate.ranking import labels, pair, rank, ranks
    from quantkit.evaluate.settings import Compute
    from quantkit.sources.source import open_model

    texts = list(prompts or ())
    if file is not None:
        texts += [line for line in read_text(file).split("\n") if line]
    if not texts:
        raise typer.BadParameter("there is no text: use --prompt or --file")
    compute = Compute(backend=backend, device=device, precision=precision, threads=threads)
    loaded = load(open_model(model, revision=revision, pre=pre), compute)
    data: dict[str, Any] = {"model": loaded.source.label, "texts": texts}
    with chunk_progress("embed", "text") as bar:

        def progress(done: int, total: int) -> None:
            bar(done, total, "")

        if ranks(loaded, pooling):
            scores = _rounded(rank(loaded, [pair(text) for text in texts], progress=progress))
            names = labels(loaded.source.metadata, len(scores[0]))
            data |= {"labels": names, "scores": scores}
            lines = ["  ".join(f"{name} {x}" for name, x in zip(names, row, strict=True)) for row in scores]
        else:
            vectors = embed(loaded, texts, pooling=pooling, normalise=not raw, progress=progress)
            data["vectors"] = _rounded(vectors)
            lines = [" ".join(map(str, vector)) for vector in data["vectors"]]
    emit("\n".join(lines), data, as_json)


def _rounded(numbers: np.ndarray) -> list[list[float]]:
    return [[float(f"{number:.7g}") for number in row] for row in numbers.tolist()]
