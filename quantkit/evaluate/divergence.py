"""How far a model's predictions are from another's: the statistics of llama-perplexity's --kl-divergence, and more."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels
from quantkit.evaluate.backends import AnyModel
from quantkit.evaluate.ensemble import Ensemble
from quantkit.evaluate.logit_kernels import BASE_CHOSEN, BASE_MAX, BASE_SUM, CHOSEN, MAX, N_STATE, SUM, TOP, WEIGHTED
from quantkit.evaluate.model import Logits, Model
from quantkit.evaluate.perplexity import chunked, held_chunks, opened_slices, pack_chunks, tokenize, warn_of_context
from quantkit.evaluate.refusals import refuse_encoder
from quantkit.evaluate.settings import Chunking, Compute, Estimate, Progress
from quantkit.evaluate.token_classes import CLASSES, token_classes
from quantkit.formats.atomic import OutputFile
from quantkit.formats.logits import LogitsFile, LogitsRows, LogitsWriter, first_scored, is_logits_file
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

KLD_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DELTA_P_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)
# The bins of Δp's histogram: two and a half points wide.
DELTA_P_EDGES = tuple((np.arange(-40, 41) / 40).tolist())
_BANDS = 8


@dataclass(frozen=True)
class PositionBand:
    """The scored positions `first` to `last` of all chunks: their mean divergence and top-1 disagreement.

    That is the share of tokens for which the model's likeliest token is not the base's.
    """

    first: int
    last: int
    mean_kld: float
    top_disagreement: float


@dataclass(frozen=True)
class TokenClass:
    """The scored tokens of one kind of text: their number, mean divergence and top-1 disagreement."""

    name: str
    n_tokens: int
    mean_kld: float
    top_disagreement: float


@dataclass(frozen=True)
class DivergenceResult:
    """A model compared with a base, over the `n_tokens` scored tokens of a text.

    `ppl` and `ppl_base` are their perplexities, `ln_ratio` the logarithm of `ratio` = ppl / ppl_base, `difference` the
    first less the second; `correlation` is that of the tokens' log-likelihoods. `kld` is the mean over tokens of
    Kullback and Leibler's divergence of the model's predictions from the base's, in nats. Δp is the probability that
    the model gives the token of the text, less the base's: `delta_p` its mean, `delta_p_rms` its root mean square.
    `same_top` is the share of tokens whose likeliest prediction is the same, `same_top5` that of tokens whose five
    likeliest predictions are the same five. Percentiles have the per cent as key, 0 for the minimum and 100 for the
    maximum. `delta_p_histogram` are the shares of tokens whose Δp is between the DELTA_P_EDGES. `chunk_kld` is each
    chunk's mean; `by_position` and `by_class` are the same tokens by their place in a chunk and by what kind of text
    they stand for. `seconds` is the time of the forward passes of both models, and `tokens_per_second` counts all
    tokens that went through the model, `batch` chunks together; `memory` is the most that was taken, in bytes: of the
    GPU where one computed, else of the process, None where it is not known.
    """

    base: str
    ppl: Estimate
    ppl_base: Estimate
    ln_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    correlation: float
    kld: Estimate
    kld_percentiles: dict[float, float]
    delta_p: Estimate
    delta_p_percentiles: dict[float, float]
    delta_p_rms: Estimate
    same_top: Estimate
    same_top5: Estimate
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
    delta_p_histogram: list[float] = field(repr=False)
    by_position: list[PositionBand] = field(repr=False)
    by_class: list[TokenClass] = field(repr=False)
    chunk_kld: list[float] = field(repr=False)


# A base to compare with: a model, or its log-probabilities that were stored.
Base = AnyModel | LogitsFile


def divergence(
    model: AnyModel,
    base: Base,
    text: str | np.ndarray | None = None,
    *,
    chunking: Chunking = Chunking(),  # noqa: B008
    compute: Compute | None = None,
    save_logits: str | os.PathLike[str] | OutputFile | None = None,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> DivergenceResult:
    """Compare `model`'s predictions over `text` with those of `base`: another model, or a logits file.

    Models are loaded models, sources, or paths; the path of a logits file is told from a model's by what it holds.
    With a model as base both run side by side over the text, cut as `perplexity` cuts it, and compare in float32;
    `save_logits` then writes the base's log-probabilities to a file that this function and llama-perplexity read.
    With a file as base, the text and its context are the file's (a given text must be the same), and the base's
    log-probabilities are those of 16 bits that it holds: none is further than 16 below the largest, which shows in
    `ppl_base` of a model that is sure of itself. `compute` says what computes. `progress` is told of chunks
    and of the mean divergence so far. With `cluster`, its workers compute; models and files are where they reach them.
    The statistics are llama-perplexity's, from the same scored tokens.

    Raises QuantkitError when the vocabularies differ, for a text that is too short or is not the file's, and when
    logits are NaN.
    """
    return divergences(
        [model],
        base,
        text,
        chunking=chunking,
        compute=compute,
        save_logits=save_logits,
        progress=progress,
        cluster=cluster,
    )[0]


def divergences(
    models: Sequence[AnyModel],
    base: Base,
    text: str | np.ndarray | None = None,
    *,
    chunking: Chunking = Chunking(),  # noqa: B008
    compute: Compute | None = None,
    save_logits: str | os.PathLike[str] | OutputFile | None = None,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> list[DivergenceResult]:
    """`divergence` of several models from one base, in one pass: the base runs once, and all models share the memory.

    The progress is told of the first model's divergence; `seconds` of each result is the time of all models together.
    Through torch, which holds whole models on its device, each model takes a pass of its own beside the base.
    """
    if compute is not None and compute.backend == "torch" and len(models) > 1:
        return [
            divergence(
                model,
                base,
                text,
                chunking=chunking,
                compute=compute,
                save_logits=None if i else save_logits,
                progress=progress,
                cluster=cluster,
            )
            for i, model in enumerate(models)
        ]
    if isinstance(base, (str, os.PathLike)) and is_logits_file(base):
        base = LogitsFile(base)
    stored = base if isinstance(base, LogitsFile) else None
    running = [*models, base] if not isinstance(base, LogitsFile) else list(models)
    ensemble = Ensemble(running, compute, cluster)
    for source, spec in zip(ensemble.sources, ensemble.specs, strict=True):
        refuse_encoder(spec, source.label)
    leads = ensemble.sources[: len(models)]
    label, vocabulary = leads[0].label, Vocabulary.from_metadata(leads[0].metadata)
    if stored is not None:
        base_label = str(stored.path)
        if save_logits is not None:
            raise QuantkitError(f"{base_label}: the base's log-probabilities are in this file already: copy it instead")
        raw, bos = _stored_tokens(label, vocabulary, stored, text, chunking.chunks)
        n_ctx, n_vocab = stored.n_ctx, stored.n_vocab
    else:
        if text is None:
            raise QuantkitError(f"{label}: a text to compare over is missing")
        base_label, n_ctx, n_vocab = ensemble.sources[-1].label, chunking.n_ctx, ensemble.specs[-1].n_vocab
        for lead in leads:
            _same_vocabulary(lead, ensemble.sources[-1])
        ids, bos = tokenize(vocabulary, text)
        raw = chunked(ids, chunking, None, label)
    for lead, spec in zip(leads, ensemble.specs, strict=False):
        if spec.n_vocab != n_vocab:
            raise QuantkitError(
                f"{lead.label}: a vocabulary of {spec.n_vocab} tokens, but the base {base_label} has "
                f"{n_vocab}: compare models of one vocabulary"
            )
    warn_of_context(leads[0], n_ctx)
    tokens = raw.copy()
    if bos is not None:
        tokens[:, 0] = bos
    first = first_scored(n_ctx)
    shape = len(tokens), n_ctx - 1 - first
    most = None if stored is None and save_logits is None else held_chunks(ensemble.memory, shape[1], n_vocab)
    step = ensemble.batch(n_ctx, chunking.batch, most)
    kld, nll, nll_base = (np.empty((len(leads), *shape)) for _ in range(3))
    same = np.empty((len(leads), *shape, 2), bool)
    began = time.perf_counter()
    done = 0

    def so_far() -> float | None:
        return float(kld[0, :done].mean()) if done else None

    with ExitStack() as stack:
        writer = None if save_logits is None else stack.enter_context(LogitsWriter(save_logits, raw, n_vocab))
        rows = writer if writer is None or cluster is None else writer.hand_out()
        measure = partial(_compare, n_leads=len(leads), first=first, stored=stored, rows=rows)
        for part, found in ensemble.run(tokens, measure, step, progress=progress, so_far=so_far):
            kld[:, part], nll[:, part], nll_base[:, part], same[:, part] = found
            done = part.stop
            if writer is not None and cluster is not None:
                writer.written_elsewhere((part.stop - part.start) * shape[1])
    seconds = time.perf_counter() - began
    classes = token_classes(vocabulary, tokens[:, first + 1 :])
    cost = _Cost(seconds, min(step, len(tokens)))
    return [
        _result(base_label, ensemble, kld[i], nll[i], nll_base[i], same[i], classes, n_ctx, cost)
        for i in range(len(leads))
    ]


class _Cost(NamedTuple):
    """What a measurement took: seconds, and chunks run together."""

    seconds: float
    batch: int


def _compare(
    models: Sequence[Model],
    tokens: np.ndarray,
    at: int,
    *,
    n_leads: int,
    first: int,
    stored: LogitsFile | None,
    rows: LogitsRows | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compare the first `n_leads` models with the last, or with `stored`, at the scored positions of `tokens`.

    These are chunks [n_seq, n_ctx] from `at` on. Returns divergences, negative log-likelihoods of the models and of the
    base, float64 [n_leads, n_seq, n_scored]; and whether the likeliest and the likeliest five are the same, bool
    [n_leads, n_seq, n_scored, 2]. The base's log-probabilities are written to `rows`.
    """
    n_scored = tokens.shape[1] - 1 - first
    comparison = _Comparison(models, n_leads, tokens, first, stored is not None)
    if stored is None and rows is None:
        opened = [model.open_logits(tokens, first, first + n_scored) for model in models]
        comparison.add(slice(0, n_scored), opened)
    else:
        # Nothing of a slice has a name here: it would stand in memory beside the next.
        for some, opened in opened_slices(models, tokens, first):
            if stored is not None:
                part = some.start, some.stop
                comparison.add(some, opened, [stored.chunk(at + seq, *part) for seq in range(len(tokens))])
            elif rows is not None:
                pack_chunks(models[-1], comparison.add(some, opened, keep=True), tokens, first, some, at, rows)
    return comparison.results()


class _Comparison:
    """Some chunks `tokens` [n_seq, n_ctx] through all models, beside the base or its stored log-probabilities."""

    def __init__(self, models: Sequence[Model], n_leads: int, tokens: np.ndarray, first: int, is_stored: bool) -> None:
        self._leads, self._other, self._tokens = models[:n_leads], None if is_stored else models[-1], tokens
        shape = len(tokens), tokens.shape[1] - 1 - first
        self._targets = np.ascontiguousarray(tokens[:, first + 1 :])
        self._state = np.zeros((n_leads, *shape, N_STATE))
        self._state[..., MAX] = -np.inf
        # The file's log-probabilities are taken as they are: nothing is divided by their sum.
        self._state[..., BASE_MAX] = 0.0 if is_stored else -np.inf
        self._values = np.full((n_leads, *shape, 2, TOP), -np.inf, np.float32)
        self._top = np.full((n_leads, *shape, 2, TOP), -1, np.int32)
        self._base_nll = np.empty(shape)

    def add(
        self,
        some: slice,
        opened: Sequence[Logits],
        loaded: Sequence[tuple[np.ndarray, np.ndarray]] = (),
        keep: bool = False,
    ) -> np.ndarray:
        """Compare at the positions `some`, whose logits are `opened`, and what is stored of them `loaded`.

        With `keep`, returns the base's logits, float32 [n_seq, positions, n_vocab].
        """
        leads, n_seq, n = self._leads, len(self._tokens), some.stop - some.start
        logits = np.empty((n_seq, n, leads[0].spec.n_vocab) if keep else (0, 0, 0), np.float32)

        def compare(seq: int, rows: slice, token: int, tiles: list[np.ndarray]) -> None:
            end = token + tiles[0].shape[1]
            if loaded:
                affine, codes = loaded[seq]
                base = np.empty_like(tiles[0])
                logit_kernels.unpack(affine[rows], codes[rows, token:end], base)
            else:
                base = tiles[-1]
            if keep:
                logits[seq, rows, token:end] = base
            at = slice(some.start + rows.start, some.start + rows.stop)
            for i in range(len(leads)):
                logit_kernels.compare_tile(
                    tiles[i],
                    base,
                    token,
                    self._targets[seq, at],
                    self._state[i, seq, at],
                    self._values[i, seq, at],
                    self._top[i, seq, at],
                )

        leads[0].visit_opened(opened, n_seq, n, compare)
        for seq, (affine, codes) in enumerate(loaded):
            code = codes[np.arange(n), self._targets[seq, some]].astype(np.float32)
            self._base_nll[seq, some] = -(affine[:, 0] * code + affine[:, 1])
        return logits

    def results(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See `_compare`."""
        s = self._state
        log_sum = s[..., MAX] + np.log(s[..., SUM])
        nll = log_sum - s[..., CHOSEN]
        for lead, own in zip(self._leads, nll, strict=True):
            lead.refuse_nan(self._tokens, own)
        if self._other is None:
            nll_base = np.broadcast_to(self._base_nll, nll.shape)
            kld = s[..., WEIGHTED] + s[..., BASE_SUM] * log_sum
        else:
            log_base_sum = s[..., BASE_MAX] + np.log(s[..., BASE_SUM])
            nll_base = log_base_sum - s[..., BASE_CHOSEN]
            self._other.refuse_nan(self._tokens, nll_base[0])
            kld = s[..., WEIGHTED] / s[..., BASE_SUM] - log_base_sum + log_sum
        top, base_top = self._top[..., 0, :], self._top[..., 1, :]
        same = np.stack([top[..., 0] == base_top[..., 0], (np.sort(top) == np.sort(base_top)).all(axis=-1)], axis=-1)
        return kld, nll, nll_base, same


def _stored_tokens(
    label: str, vocabulary: Vocabulary, stored: LogitsFile, text: str | np.ndarray | None, chunks: int | None
) -> tuple[np.ndarray, int | None]:
    """The tokens of a logits file, as far as `chunks` asks for them, and BOS's id where the vocabulary adds one."""
    if chunks is not None and chunks < 1:
        raise QuantkitError(f"cannot measure over {chunks} chunks: use 1 or more")
    tokens = stored.tokens[:chunks]
    if text is None:
        return tokens, vocabulary.bos if vocabulary.add_bos else None
    ids, bos = tokenize(vocabulary, text)
    n = min(tokens.size, len(ids) // stored.n_ctx * stored.n_ctx)
    # Chunks may have been stored with BOS in their first place.
    same = tokens.reshape(-1)[:n] == ids[:n]
    same[:: stored.n_ctx] = True
    if n < tokens.size or not same.all():
        raise QuantkitError(
            f"{stored.path}: was made from another text, or with another vocabulary, than {label}'s: "
            "leave the text out, or make the file again"
        )
    return tokens, bos


def _same_vocabulary(model: TensorSource, base: TensorSource) -> None:
    key = "tokenizer.ggml.tokens"
    if key not in model.metadata or key not in base.metadata or model.metadata[key] == base.metadata[key]:
        return
    mine, theirs = model.metadata.strings(key), base.metadata.strings(key)
    if len(mine) != len(theirs):
        different = f"{len(mine)} tokens against {len(theirs)}"
    else:
        index = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        different = f"token {index} is {mine[index]!r} against {theirs[index]!r}"
    raise QuantkitError(f"{model.label}: its vocabulary is not that of the base {base.label}: {different}")


def _percentiles(x: np.ndarray, wanted: tuple[float, ...]) -> dict[float, float]:
    return dict(zip(wanted, np.percentile(x, wanted).tolist(), strict=True))


def _result(
    base: str,
    ensemble: Ensemble,
    kld: np.ndarray,
    nll: np.ndarray,
    nll_base: np.ndarray,
    same: np.ndarray,
    classes: np.ndarray,
    n_ctx: int,
    cost: _Cost,
) -> DivergenceResult:
    """Every statistic of the positions' values, all [n_chunks, n_scored], `same` [..., 2]."""
    n_chunks, n_scored = kld.shape
    ran = ensemble.ran
    n = kld.size
    ln, ln_base = Estimate.mean(nll), Estimate.mean(nll_base)
    covariance = float((nll * nll_base).mean() - ln.value * ln_base.value) / (n - 1) if n >= 10 else 0.0
    spread = ln.stderr * ln_base.stderr
    ln_ratio = Estimate(
        ln.value - ln_base.value, math.sqrt(max(0.0, ln.stderr**2 + ln_base.stderr**2 - 2 * covariance))
    )
    ppl, ppl_base = ln.exp(), ln_base.exp()
    variance = ppl.stderr**2 + ppl_base.stderr**2 - 2 * ppl.value * ppl_base.value * covariance
    delta = np.exp(-nll) - np.exp(-nll_base)
    square = Estimate.mean(np.square(delta))
    rms = math.sqrt(square.value)
    first = first_scored(n_ctx)
    edges = np.linspace(0, n_scored, min(_BANDS, n_scored) + 1).astype(int)
    return DivergenceResult(
        base=base,
        ppl=ppl,
        ppl_base=ppl_base,
        ln_ratio=ln_ratio,
        ratio=ln_ratio.exp(),
        difference=Estimate(ppl.value - ppl_base.value, math.sqrt(max(0.0, variance))),
        correlation=covariance / spread if spread > 0 else 1.0,
        kld=Estimate.mean(kld),
        kld_percentiles=_percentiles(kld, KLD_PERCENTILES),
        delta_p=Estimate.mean(delta),
        delta_p_percentiles=_percentiles(delta, DELTA_P_PERCENTILES),
        delta_p_rms=Estimate(rms, 0.5 / rms * square.stderr if rms > 0 else 0.0),
        same_top=Estimate.share(int(same[..., 0].sum()), n),
        same_top5=Estimate.share(int(same[..., 1].sum()), n),
        n_tokens=n,
        n_chunks=n_chunks,
        n_ctx=n_ctx,
        seconds=cost.seconds,
        tokens_per_second=n_chunks * n_ctx / cost.seconds,
        batch=cost.batch,
        memory=ran.memory,
        backend=ran.backend,
        precision=ran.precision,
        blas=ran.blas,
        delta_p_histogram=(np.histogram(delta, DELTA_P_EDGES)[0] / n).tolist(),
        by_position=[
            PositionBand(
                first + start,
                first + stop - 1,
                float(kld[:, start:stop].mean()),
                1.0 - float(same[:, start:stop, 0].mean()),
            )
            for start, stop in itertools.pairwise(edges.tolist())
        ],
        by_class=[
            TokenClass(name, int(own.sum()), float(kld[own].mean()), 1.0 - float(same[own, 0].mean()))
            for name, own in ((name, classes == i) for i, name in enumerate(CLASSES))
            if own.any()
        ],
        chunk_kld=kld.mean(axis=1).tolist(),
    )
