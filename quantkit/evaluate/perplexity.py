"""Perplexity, by llama-perplexity's method."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels
from quantkit.evaluate.backends import AnyModel
from quantkit.evaluate.ensemble import Ensemble
from quantkit.evaluate.model import Logits, Model
from quantkit.evaluate.parts import ROWS
from quantkit.evaluate.refusals import refuse_encoder
from quantkit.evaluate.settings import Chunking, Compute, Estimate, Progress
from quantkit.formats.atomic import OutputFile
from quantkit.formats.logits import LogitsRows, LogitsWriter, empty_rows, first_scored, parts
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

log = logging.getLogger(__name__)

# What a logit takes.
_LOGIT_BYTES = 4
# Rows of log-probabilities that are packed together.
_PACKED = 128


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
    cluster: Cluster | None = None,
) -> PerplexityResult:
    """The perplexity of `text`, a string or token ids, under `model`: a loaded model, a source, or a path.

    The method is llama-perplexity's: the whole text is tokenized once, special tokens not parsed, and cut into chunks
    as `chunking` says, the first token of each replaced by BOS where the vocabulary adds one; the second half of each
    chunk is scored. `compute` says what computes. `save_logits` names a file to write the log-probabilities of the
    scored positions to, for `divergence` or llama-perplexity to compare with. `progress` is told of chunks
    and of the estimate so far. With `cluster`, its workers compute; `model` is a source or a path that they reach.

    Raises QuantkitError for a text that is too short, and when the model's logits are NaN.
    """
    ensemble = Ensemble([model], compute, cluster)
    source, n_vocab, n_ctx = ensemble.sources[0], ensemble.specs[0].n_vocab, chunking.n_ctx
    refuse_encoder(ensemble.specs[0], source.label)
    ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), text)
    warn_of_context(source, n_ctx)
    raw = chunked(ids, chunking, None, source.label)
    tokens = raw.copy()
    if bos is not None:
        tokens[:, 0] = bos
    first = first_scored(n_ctx)
    n_scored = n_ctx - 1 - first
    most = None if save_logits is None else held_chunks(ensemble.memory, n_scored, n_vocab)
    step = ensemble.batch(n_ctx, chunking.batch, most)
    nll = squares = 0.0
    chunk_nll: list[float] = []
    running: list[float] = []
    began = time.perf_counter()

    def so_far() -> float | None:
        return running[-1] if running else None

    with ExitStack() as stack:
        writer = None
        if save_logits is not None:
            writer = stack.enter_context(LogitsWriter(save_logits, raw, n_vocab))
        rows = writer if writer is None or cluster is None else writer.hand_out()
        measure = partial(_losses, first=first, rows=rows)
        for part, losses in ensemble.run(tokens, measure, step, progress=progress, so_far=so_far):
            if writer is not None and cluster is not None:
                writer.written_elsewhere((part.stop - part.start) * n_scored)
            for chunk in losses:
                nll += float(chunk.sum())
                squares += float(np.square(chunk).sum())
                chunk_nll.append(float(chunk.mean()))
                running.append(Estimate(nll / (len(chunk_nll) * n_scored), 0.0).exp().value)
    seconds = time.perf_counter() - began
    count = len(tokens) * n_scored
    mean = nll / count
    ran = ensemble.ran
    variance = max(0.0, squares / count - mean * mean)
    return PerplexityResult(
        ppl=Estimate(mean, math.sqrt(variance / max(1, count - 1))).exp(),
        n_tokens=count,
        n_chunks=len(tokens),
        n_ctx=n_ctx,
        seconds=seconds,
        tokens_per_second=tokens.size / seconds,
        batch=min(step, len(tokens)),
        memory=ran.memory,
        backend=ran.backend,
        precision=ran.precision,
        blas=ran.blas,
        chunk_nll=chunk_nll,
        running=running,
    )


def _losses(models: Sequence[Model], tokens: np.ndarray, at: int, *, first: int, rows: LogitsRows | None) -> np.ndarray:
    """Negative log-likelihoods at the scored positions of `tokens`, chunks from `at` on: float64 [n_seq, n_scored].

    The log-probabilities are written to `rows`.
    """
    (model,) = models
    if rows is None:
        return -model.log_likelihoods(tokens, first)
    losses = np.empty((len(tokens), tokens.shape[1] - 1 - first))
    for some, opened in opened_slices(models, tokens, first):
        # Without a name, so that it does not stand in memory beside the next.
        losses[:, some] = pack_chunks(model, _kept(model, opened, losses[:, some].shape), tokens, first, some, at, rows)
    model.refuse_nan(tokens, losses)
    return losses


def _kept(model: Model, opened: Sequence[Logits], shape: tuple[int, ...]) -> np.ndarray:
    """The opened logits of `shape` [n_seq, positions]: float32 [n_seq, positions, n_vocab]."""
    logits = np.empty((*shape, model.spec.n_vocab), np.float32)

    def keep(seq: int, rows: slice, token: int, tiles: list[np.ndarray]) -> None:
        logits[seq, rows, token : token + tiles[0].shape[1]] = tiles[0]

    model.visit_opened(opened, shape[0], shape[1], keep)
    return logits


def held_chunks(memory: int, n_scored: int, n_vocab: int) -> int:
    """How many chunks may run together whose logits, or those of a slice of their positions, stand in `memory`."""
    return max(1, memory // 4 // (min(n_scored, ROWS) * n_vocab * _LOGIT_BYTES))


def opened_slices(models: Sequence[Model], tokens: np.ndarray, first: int) -> Iterator[tuple[slice, list[Logits]]]:
    """The logits of all models at the scored positions, from `first` on, of chunks `tokens` [n_seq, n_ctx].

    They are cut so that the logits of a slice fit a quarter of the memory: there are `ROWS` positions or more in one,
    those that go through products together. A slice counts from `first`.
    """
    stop, memory = tokens.shape[1] - 1, models[0].memory
    n_vocab = models[0].spec.n_vocab
    step = max(1, memory // 4 // (len(tokens) * ROWS * n_vocab * _LOGIT_BYTES)) * ROWS
    if step >= stop - first:
        yield slice(0, stop - first), [model.open_logits(tokens, first, stop) for model in models]
        return
    hidden = [model.hidden(tokens, first, stop) for model in models]
    for at in range(0, stop - first, step):
        some = slice(at, min(at + step, stop - first))
        yield some, [model.scores(x[:, some]) for model, x in zip(models, hidden, strict=True)]


def pack_chunks(
    model: Model, logits: np.ndarray, tokens: np.ndarray, first: int, some: slice, at: int, to: LogitsRows
) -> np.ndarray:
    """Pack logits [n_seq, positions, n_vocab] of `tokens` [n_seq, n_ctx], chunks from `at` on, into `to`.

    They are those of positions `some`, counted from `first`, the first that is scored. Returns their negative
    log-likelihoods, float64 [n_seq, positions]. `model`'s threads work.
    """
    n_seq, n, n_vocab = logits.shape
    n_scored = tokens.shape[1] - 1 - first
    targets = np.ascontiguousarray(tokens[:, first + 1 :][:, some])
    losses = np.empty((n_seq, n))

    def pack(seq: int) -> None:
        for start in range(0, n, _PACKED):
            part = slice(start, min(start + _PACKED, n))
            rows = empty_rows(part.stop - start, n_vocab)
            logit_kernels.pack(logits[seq, part], targets[seq, part], *parts(rows, n_vocab), losses[seq, part])
            to.write(rows, (at + seq) * n_scored + some.start + start)

    for _ in model.threads.map(pack, range(n_seq)):
        pass
    return losses
