"""Perplexity, by llama-perplexity's method."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels
from quantkit.evaluate.backends import AnyModel, load
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Chunking, Compute, Estimate, Progress
from quantkit.formats.atomic import OutputFile
from quantkit.formats.logits import LogitsWriter, empty_rows, first_scored, parts
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a text under a model.

    `ppl` is e to the mean negative log-likelihood, in nats, of the `n_tokens` scored tokens. `chunk_nll` is each
    chunk's mean, `running` the estimate after each chunk. `seconds` is the time of the forward passes, and
    `tokens_per_second` counts all tokens that went through the model. `batch` chunks went through it together, and
    `memory` is the most that was taken, in bytes: of the GPU where one computed, else of the process, None where it is
    not known.
    """

    ppl: Estimate
    n_tokens: int
    n_chunks: int
    n_ctx: int
    seconds: float
    tokens_per_second: float
    batch: int
    memory: int | None
    backend: str
    precision: str
    blas: str
    chunk_nll: list[float] = field(repr=False)
    running: list[float] = field(repr=False)


def warn_of_context(source: TensorSource, n_ctx: int) -> None:
    """Log a warning when a context of `n_ctx` tokens is longer than the model's own."""
    own = source.metadata.integer(f"{source.metadata.architecture}.context_length", default=n_ctx)
    if n_ctx > own:
        log.warning("%s: a context of %d tokens is longer than the model's, which is %d", source.label, n_ctx, own)


def chunked(tokens: np.ndarray, chunking: Chunking, bos: int | None, label: str, least: int = 2) -> np.ndarray:
    """Cut token ids into int32 [n_chunks, n_ctx] as llama-perplexity does.

    What does not fill a chunk is dropped; each chunk's first token becomes `bos` unless that is None. Raises
    QuantkitError for a text of fewer than `least` chunks.
    """
    n_ctx = chunking.n_ctx
    if len(tokens) < least * n_ctx:
        raise QuantkitError(
            f"{label}: the text has {len(tokens)} tokens, but {least * n_ctx} are needed with a context of "
            f"{n_ctx}: use a longer text or a smaller context"
        )
    n_chunks = len(tokens) // n_ctx
    if chunking.chunks is not None:
        n_chunks = min(n_chunks, chunking.chunks)
    cut = np.array(tokens[: n_chunks * n_ctx], dtype=np.int32).reshape(n_chunks, n_ctx)
    if bos is not None:
        cut[:, 0] = bos
    return cut


def tokenize(vocabulary: Vocabulary, text: str | np.ndarray) -> tuple[np.ndarray, int | None]:
    """The token ids of `text` (or `text` itself if it is token ids), and BOS's id where `vocabulary` adds one."""
    bos = vocabulary.bos if vocabulary.add_bos else None
    if isinstance(text, str):
        return np.asarray(vocabulary.encode(text), dtype=np.int32), bos
    return np.asarray(text, dtype=np.int32), bos


def perplexity(
    model: AnyModel,
    text: str | np.ndarray,
    *,
    chunking: Chunking = Chunking(),  # noqa: B008
    compute: Compute | None = None,
    save_logits: str | os.PathLike[str] | OutputFile | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """The perplexity of `text`, a string or token ids, under `model`: a loaded model, a source, or a path.

    The method is llama-perplexity's: the whole text is tokenized once, special tokens not parsed, and cut into chunks
    as `chunking` says, the first token of each replaced by BOS where the vocabulary adds one; the second half of each
    chunk is scored. `compute` says what computes. `save_logits` names a file to write the log-probabilities of the
    scored positions to, for `divergence` or llama-perplexity to compare with. `progress` is told of chunks
    and of the estimate so far.

    Raises QuantkitError for a text that is too short, and when the model's logits are NaN.
    """
    model = load(model, compute)
    n_ctx = chunking.n_ctx
    ids, bos = tokenize(Vocabulary.from_metadata(model.source.metadata), text)
    warn_of_context(model.source, n_ctx)
    raw = chunked(ids, chunking, None, model.source.label)
    tokens = raw.copy()
    if bos is not None:
        tokens[:, 0] = bos
    first = first_scored(n_ctx)
    n_scored = n_ctx - 1 - first
    step = chunking.batch or model.batch(n_ctx)
    if save_logits is not None:
        # All logits of a batch then stand in memory.
        step = max(1, min(step, model.memory // 4 // (n_scored * model.spec.n_vocab * 6)))
    nll = squares = 0.0
    chunk_nll: list[float] = []
    running: list[float] = []
    began = time.perf_counter()

    def within(share: float) -> None:
        if progress is not None:
            progress(at + share * len(some), len(tokens), running[-1] if running else None)

    with ExitStack() as stack:
        stack.enter_context(model.telling(within))
        writer = None
        if save_logits is not None:
            writer = stack.enter_context(LogitsWriter(save_logits, raw, model.spec.n_vocab))
        for at in range(0, len(tokens), step):
            some = tokens[at : at + step]
            if writer is None:
                losses = -model.log_likelihoods(some, first)
            else:
                losses = np.empty((len(some), n_scored))
                logits = model.logits(some, first, n_ctx - 1)
                for i, (rows, values) in enumerate(pack_chunks(model, logits, some, first)):
                    writer.write(rows)
                    losses[i] = values
            for chunk in losses:
                nll += float(chunk.sum())
                squares += float(np.square(chunk).sum())
                chunk_nll.append(float(chunk.mean()))
                running.append(Estimate(nll / (len(chunk_nll) * n_scored), 0.0).exp().value)
            if progress is not None:
                progress(len(running), len(tokens), running[-1])
    seconds = time.perf_counter() - began
    count = len(tokens) * n_scored
    mean = nll / count
    variance = max(0.0, squares / count - mean * mean)
    return PerplexityResult(
        ppl=Estimate(mean, math.sqrt(variance / max(1, count - 1))).exp(),
        n_tokens=count,
        n_chunks=len(tokens),
        n_ctx=n_ctx,
        seconds=seconds,
        tokens_per_second=tokens.size / seconds,
        batch=min(step, len(tokens)),
        memory=model.peak_memory(),
        backend=model.backend,
        precision=model.precision,
        blas=model.blas,
        chunk_nll=chunk_nll,
        running=running,
    )


def pack_chunks(
    model: Model, logits: np.ndarray, tokens: np.ndarray, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pack logits [n_seq, n_scored, n_vocab] of `tokens` [n_seq, n_ctx] into rows of a logits file.

    Yields each chunk's rows, uint16, and its negative log-likelihoods, float64 [n_scored]. `model`'s threads work.
    """
    n_vocab = logits.shape[2]
    targets = np.ascontiguousarray(tokens[:, first + 1 :])

    def pack(seq: int) -> tuple[np.ndarray, np.ndarray]:
        rows, nll = empty_rows(logits.shape[1], n_vocab), np.empty(logits.shape[1])
        logit_kernels.pack(logits[seq], targets[seq], *parts(rows, n_vocab), nll)
        return rows, nll

    return model.threads.map(pack, range(len(logits)))
