"""`quantkit perplexity`: how well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.console import (
    Backend,
    Batch,
    Chunks,
    Context,
    Device,
    Force,
    Json,
    Memory,
    Model,
    Pre,
    Precision,
    Quiet,
    Revision,
    Text,
    Threads,
    Verbose,
    Workers,
    emit,
    given,
    joined,
    measure_progress,
    measured_ahead,
    note,
    read_text,
    setup,
)
from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import DEFAULT


def command(
    context: typer.Context,
    source: Model,
    text: Text = DEFAULT,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Model to compare with.")] = None,
    base_logits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Log-probabilities of a base model to compare with.")
    ] = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write log-probabilities, of the base or else the model, for --base-logits."),
    ] = None,
    force: Force = False,
    n_ctx: Context = 512,
    chunks: Chunks = None,
    batch: Batch = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    memory: Memory = None,
    pre: Pre = None,
    revision: Revision = None,
    cluster: Workers = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure the perplexity of a model on a text, by llama-perplexity's method.

    The text is cut into chunks of --n-ctx tokens; the second half of each is scored. With --base, or with --base-logits
    from an earlier run or from llama-perplexity (which brings its own text), the divergence from that base too.
    """
    setup(verbose, quiet)
    if base_logits is not None and (base is not None or save_logits is not None):
        raise QuantkitError("--base-logits is the base: leave out --base and --save-logits")
    from quantkit.cli.parsing import parse_memory
    from quantkit.evaluate.settings import Chunking, Compute

    compute = Compute(backend=backend, device=device, precision=precision, threads=threads, memory=parse_memory(memory))
    chunking = Chunking(n_ctx=n_ctx, chunks=chunks, batch=batch)
    # A file of log-probabilities brings its own text: one that is named beside it must be the same.
    words = read_text(text) if base_logits is None or given(context, "text") else None
    from quantkit.formats.atomic import OutputGroup
    from quantkit.formats.logits import LogitsFile
    from quantkit.sources.source import open_model

    model = open_model(source, revision=revision, pre=pre)
    group = OutputGroup(force=force, inputs=[*model.files, text])
    against: Any = None
    if base is not None:
        against = open_model(base, pre=pre)
        group.protect(against.files)
    elif base_logits is not None:
        against = LogitsFile(base_logits)
        if given(context, "n_ctx") and n_ctx != against.n_ctx:
            raise QuantkitError(f"{base_logits}: its text is cut into chunks of {against.n_ctx} tokens, not {n_ctx}")
    logits = None if save_logits is None else group.add(save_logits)
    comparing = base is not None or base_logits is not None
    ahead = nullcontext() if cluster else measured_ahead(model, threads, backend, comparing)
    if base is None and base_logits is None:
        from quantkit.evaluate.perplexity import perplexity
        from quantkit.report.measurements import perplexity_text

        assert words is not None
        with group, ahead, joined(cluster) as workers, measure_progress("perplexity", "PPL = {:.4f}") as progress:
            result = perplexity(
                model,
                words,
                chunking=chunking,
                compute=compute,
                save_logits=logits,
                progress=progress,
                cluster=workers,
            )
        lines = perplexity_text(result)
        data = {"model": model.label, "text": text, **asdict(result)}
    else:
        from quantkit.evaluate.divergence import divergence
        from quantkit.report.measurements import divergence_text

        with group, ahead, joined(cluster) as workers, measure_progress("divergence", "KLD = {:.6f}") as progress:
            compared = divergence(
                model,
                against,
                words,
                chunking=chunking,
                compute=compute,
                save_logits=logits,
                progress=progress,
                cluster=workers,
            )
        lines = divergence_text(compared)
        data = {"model": model.label, "text": text if words is not None else None, **asdict(compared)}
    emit(lines, data, as_json)
    if save_logits is not None:
        note(f"wrote {save_logits}")
