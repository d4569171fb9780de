"""`quantkit perplexity`: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantkit.cli.console import (
    Chunks,
    Context,
    Json,
    Pre,
    Quiet,
    Revision,
    Text,
    Threads,
    Verbose,
    announce_compilation,
    chunk_progress,
    emit,
    read_text,
    setup,
)


def command(
    source: Annotated[str, typer.Argument(help="GGUF file, checkpoint directory, or hub id ORG/NAME.")],
    text: Text,
    n_ctx: Context = 512,
    chunks: Chunks = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Chunks to run together.  [default: by memory]")] = None,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure the perplexity of a model on a text, by llama-perplexity's method.

    The text is cut into chunks of --n-ctx tokens; the second half of each is scored.
    """
    setup(verbose, quiet)
    words = read_text(text)
    announce_compilation()
    from quantkit.evaluate.perplexity import perplexity
    from quantkit.pipeline.source import open_source

    model = open_source(source, revision=revision, pre=pre)
    with chunk_progress("perplexity") as bar:
        result = perplexity(
            model, words, n_ctx, chunks, threads, batch, lambda done, total, ppl: bar(done, total, f"PPL = {ppl:.4f}")
        )
    lines = (
        f"PPL = {result.ppl:.4f} ± {result.error:.5f}\n"
        f"{result.n_chunks} chunks of {n_ctx} tokens, {result.n_tokens} tokens scored, {result.seconds:.1f} s, "
        f"{result.tokens_per_second:.0f} tokens/s ({result.backend}, {result.precision})"
    )
    emit(lines, {"model": model.label, "text": text, **asdict(result)}, as_json)
