"""Importance matrices: what a model's weights are multiplied with over a calibration text, as llama-imatrix sums it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import AnyModel
from quantkit.evaluate.ensemble import Ensemble
from quantkit.evaluate.inputs import InputSum, Key
from quantkit.evaluate.model import Model
from quantkit.evaluate.parts import aligned
from quantkit.evaluate.perplexity import chunked, tokenize, warn_of_context
from quantkit.evaluate.settings import Chunking, Compute, Progress
from quantkit.evaluate.texts import text_sha256
from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"blk\.(\d+)\.")
# A mean square up to this counts as no activity.
_INACTIVE = 1e-5


class _Entries:
    """Sums of squares of the inputs of `source`'s tensors, batch after batch, as importance matrices hold them."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._of: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, sums: dict[Key, InputSum]) -> None:
        """Add what a batch brought."""
        for (names, expert), (squares, n_rows) in sums.items():
            n_matrices = 1 if expert is None else self._source.tensors[names[0]].shape[2]
            for name in names:
                if name not in self._of:
                    self._of[name] = np.zeros((n_matrices, squares.size)), np.zeros(n_matrices, np.int64)
                totals, counts = self._of[name]
                totals[expert or 0] += squares
                counts[expert or 0] += n_rows

    def entries(self) -> dict[str, Importance]:
        """What was summed until now, by tensor name in order. Raises QuantkitError where it is not finite."""
        each = {name: Importance(sums.astype(np.float32), counts.copy()) for name, (sums, counts) in self._of.items()}
        for name, entry in each.items():
            if not np.isfinite(entry.sums).all():
                raise QuantkitError(f"{self._source.label}: the inputs of {name} are not finite, or out of range")
        return dict(sorted(each.items(), key=lambda item: item[0].encode("utf-8", "surrogateescape")))


def importance_matrix(
    model: AnyModel,
    text: str | np.ndarray,
    *,
    chunking: Chunking = Chunking(),  # noqa: B008
    compute: Compute | None = None,
    process_output: bool = False,
    from_chunk: int = 0,
    dataset: str | None = None,
    resume: ImportanceMatrix | None = None,
    snapshot: Callable[[ImportanceMatrix], None] | None = None,
    snapshot_every: int = 0,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> ImportanceMatrix:
    """The importance matrix of `model` over `text`, a string or token ids, by llama-imatrix's method.

    `model` is a loaded model, a source, or a path; `compute` says what computes. The text is cut as `chunking` says,
    the first token of each chunk replaced by BOS where the vocabulary adds one, and every position counts. For each
    matrix of the layers (each expert apart), and for output.weight with `process_output`, the squares of what it is
    multiplied with are summed by column. `from_chunk` leaves out the first chunks of the text; `dataset` is the text's
    name, for the record. `resume` is what an earlier run over the same text, which was stopped, came to: its chunks are
    not computed again, and count among `chunking.chunks`. Every `snapshot_every` chunks, `snapshot` gets the matrix so
    far. `progress` is told of chunks; there is no result so far. With `cluster`, its workers compute; `model` is a
    source or a path that they reach.

    Sums are kept in float64 and returned in float32; llama-imatrix adds in float32, so its sums differ by its rounding.
    Raises QuantkitError for a text that is too short or not the resumed run's, and for activations that are not finite.
    """
    if from_chunk < 0:
        raise QuantkitError(f"cannot begin at chunk {from_chunk}: use 0 or more")
    ensemble = Ensemble([model], compute, cluster)
    source, spec, n_ctx = ensemble.sources[0], ensemble.specs[0], chunking.n_ctx
    ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), text)
    digest, before = text_sha256(text), ImportanceMatrix()
    skipped = from_chunk
    if resume is not None:
        before = resume.counted_in_tokens(n_ctx)
        _check_resumed(before, digest, dataset, from_chunk, n_ctx)
        skipped += before.chunk_count
        left = len(ids) // n_ctx - skipped
        if chunking.chunks is not None:
            left = min(left, chunking.chunks - before.chunk_count)
        if left <= 0:
            return before
        chunking = replace(chunking, chunks=left)
    warn_of_context(source, n_ctx)
    tokens = chunked(ids[skipped * n_ctx :], chunking, bos, source.label, least=1 if resume is not None else 2)
    step = ensemble.batch(n_ctx, chunking.batch)
    so_far = _Entries(source)

    def matrix(n_chunks: int) -> ImportanceMatrix:
        new = ImportanceMatrix(so_far.entries(), [] if dataset is None else [dataset], n_chunks, n_ctx)
        both = ImportanceMatrix()
        for part in (before, new):
            both.merge(part)
        both.text_sha256, both.first_chunk = digest, from_chunk
        return both

    every = snapshot_every if snapshot is not None and snapshot_every > 0 else None
    measure = partial(_input_sums, output=process_output and not spec.tied)
    for part, groups in ensemble.run(tokens, measure, step, stops=every, progress=progress):
        for sums in groups:
            so_far.add(sums)
        if snapshot is not None and every is not None and part.stop % every == 0 and part.stop < len(tokens):
            snapshot(matrix(part.stop))
    return matrix(len(tokens))


def _input_sums(models: Sequence[Model], tokens: np.ndarray, at: int, *, output: bool) -> list[dict[Key, InputSum]]:
    """Sums of squares over `tokens` [n_seq, n_ctx], of each group of chunks that go through products together."""
    (model,), n_ctx = models, tokens.shape[1]
    sums = model.input_sums(full=False)
    try:
        model.pass_through(tokens, sums if output else None)
    finally:
        model.observer = None
    return sums.take_groups(aligned(n_ctx) * n_ctx)


def _check_resumed(matrix: ImportanceMatrix, digest: str, dataset: str | None, from_chunk: int, n_ctx: int) -> None:
    """Raise QuantkitError when `matrix` was not made from this text, cut in this way."""
    if matrix.chunk_size != n_ctx:
        raise QuantkitError(
            f"the importance matrix to go on from was made with a context of {matrix.chunk_size}, not {n_ctx}"
        )
    if not matrix.text_sha256:
        if dataset is not None and matrix.datasets and matrix.datasets[-1] != dataset:
            raise QuantkitError(
                f"the importance matrix to go on from was made from {matrix.datasets[-1]!r}, not {dataset!r}"
            )
        log.warning("the importance matrix to go on from does not say what text it was made from")
    elif matrix.text_sha256 != digest:
        raise QuantkitError("the importance matrix to go on from was made from another text")
    elif matrix.first_chunk != from_chunk:
        raise QuantkitError(
            f"the importance matrix to go on from begins at chunk {matrix.first_chunk}, not at {from_chunk}"
        )


@dataclass(frozen=True)
class TensorStatistics:
    """What an importance matrix says of one tensor, as llama-imatrix's --show-statistics does.

    Of the mean squares of its input's columns (of all its experts): their sum `total`, smallest, largest, mean and
    standard deviation, the share that is more than 1e-5, the entropy of their distribution in bits, and the share that
    lies more than a standard deviation above the mean (`zd`). `cosine` is the similarity of the sums with those of
    the same tensor one layer before, 0 for the first. `block` is the layer, None outside of layers.
    """

    name: str
    block: int | None
    n: int
    total: float
    minimum: float
    maximum: float
    mean: float
    deviation: float
    active: float
    entropy: float
    zd: float
    cosine: float

    @property
    def normalised_entropy(self) -> float:
        """The entropy as a share of the largest possible."""
        return self.entropy / math.log2(self.n) if self.n > 1 else 0.0

    @property
    def kind(self) -> str:
        """The tensor's name without its layer: attn_q, ffn_down, ..."""
        return _BLOCK.sub("", self.name).removesuffix(".weight")


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the tensors of one layer, weighted by their number of columns: of `total`, `zd` and `cosine`."""

    block: int
    total: float
    zd: float
    cosine: float


def statistics(matrix: ImportanceMatrix) -> list[TensorStatistics]:
    """Statistics of every tensor that saw a token, by kind, the largest total first within a kind."""
    rows = []
    for name, entry in matrix.entries.items():
        seen = entry.counts > 0
        if not seen.any():
            continue
        squares = (entry.sums[seen].astype(np.float64) / entry.counts[seen, None]).reshape(-1)
        total, mean, deviation = float(squares.sum()), float(squares.mean()), float(squares.std())
        p = squares[squares > 0] / total if total > 0 else np.empty(0)
        match = _BLOCK.search(name)
        before = None if match is None else _BLOCK.sub(f"blk.{int(match[1]) - 1}.", name, count=1)
        rows.append(
            TensorStatistics(
                name=name,
                block=None if match is None else int(match[1]),
                n=squares.size,
                total=total,
                minimum=float(squares.min()),
                maximum=float(squares.max()),
                mean=mean,
                deviation=deviation,
                active=float((squares > _INACTIVE).mean()),
                entropy=float(-(p * np.log2(p)).sum()),
                zd=float((squares > mean + deviation).mean()) if deviation > 0 else 0.0,
                cosine=_cosine(entry, matrix.entries.get(before) if before else None),
            )
        )
    return sorted(rows, key=lambda row: (row.kind, -row.total))


def layer_statistics(rows: list[TensorStatistics]) -> list[LayerStatistics]:
    """The statistics of each layer, in order."""
    layers = []
    for block in sorted({row.block for row in rows if row.block is not None}):
        own = [row for row in rows if row.block == block]
        weights = [row.n for row in own]
        total, zd, cosine = (
            float(np.average(values, weights=weights))
            for values in ([r.total for r in own], [r.zd for r in own], [r.cosine for r in own])
        )
        layers.append(LayerStatistics(block, total, zd, cosine))
    return layers


def _cosine(a: Importance, b: Importance | None) -> float:
    if b is None or a.sums.size != b.sums.size:
        return 0.0
    x, y = a.sums.astype(np.float64).reshape(-1), b.sums.astype(np.float64).reshape(-1)
    lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / lengths if lengths > 0 else 0.0
