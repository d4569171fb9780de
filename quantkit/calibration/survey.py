"""What each type would cost each tensor: bytes, and divergence of the model's predictions.

Divergence is nearly additive over tensors, and of one tensor nearly proportional to the mean squared error of its
output (HIGGS, arXiv 2411.17525, uses both). So each tensor is perturbed alone, by its rounding to one probe type, and
the divergence measured through the model; other types count by their errors, with feedback where that will be used.

All happens in one pass over the layers. The perturbed copies of some chunks of the text travel with the text itself:
each layer's weights are decoded once, and a perturbation costs the layers after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import DAMPING, Curvature
from quantkit.calibration.feedback import SUPPORTED, round_with_feedback
from quantkit.calibration.moments import Moments, MomentsPass, SharedInput, batches
from quantkit.calibration.progress import Step
from quantkit.calibration.rounder import rounder
from quantkit.calibration.text import CalibrationText
from quantkit.evaluate.activations import Activations
from quantkit.evaluate.model import Model
from quantkit.evaluate.parts import aligned
from quantkit.evaluate.refusals import require_predictions

# Chunks of the text that perturbed copies are made of, and copies compared with the base together.
_CHUNKS = 4
_TOGETHER = 6
# Rows of a tensor that stand for all of them where types are tried.
_ROWS = 128
# Types that a tensor is perturbed by: the first that its rows can have.
_PROBES = (GGMLType.Q3_K, GGMLType.IQ4_NL, GGMLType.Q8_0)


@dataclass(frozen=True)
class TensorCosts:
    """What one tensor costs as each type it may become: `nbytes` and `divergence`, in nats, by type.

    `sensitivity` is the divergence for a loss of one, the mean squared error of the tensor's output in all rows.
    """

    sensitivity: float
    losses: dict[GGMLType, float]
    nbytes: dict[GGMLType, int]

    @property
    def divergence(self) -> dict[GGMLType, float]:
        """The predicted divergence of each type."""
        return {kind: self.sensitivity * loss for kind, loss in self.losses.items()}


@dataclass
class _Perturbed:
    """A tensor on its way: its losses by type, and the loss of the probe whose divergence is being measured."""

    name: str
    losses: dict[GGMLType, float]
    probe_loss: float
    at: int | None = None  # which copy of the chunks; None for those whose copies are the base's
    output: np.ndarray | None = field(default=None, repr=False)  # the output matrix that takes its place


def survey(
    model: Model,
    text: CalibrationText,
    candidates: Mapping[str, Sequence[GGMLType]],
    *,
    feedback: bool = True,
    damping: float = DAMPING,
    chunks: int = _CHUNKS,
    directory: Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, TensorCosts]:
    """What each tensor of `candidates` costs as each of its types.

    With `feedback` losses are those of rounding with error feedback, else to the nearest with the importance of the
    columns. Divergence is measured on `chunks` chunks of the text, or on some more. Activations that are larger than
    their share of memory go to a file in `directory`. What is said of a tensor does not depend on the others.
    """
    require_predictions(model.spec, model.source.label, "choosing types")
    return _Survey(model, text, candidates, feedback, damping, chunks, directory, progress).run()


class _Survey:
    def __init__(
        self,
        model: Model,
        text: CalibrationText,
        candidates: Mapping[str, Sequence[GGMLType]],
        feedback: bool,
        damping: float,
        chunks: int,
        directory: Path | None,
        progress: Callable[[Step], None] | None,
    ) -> None:
        self._model, self._candidates = model, candidates
        self._feedback, self._damping, self._rounder = feedback, damping, rounder(model)
        self._progress, self._directory = progress, directory
        self._text = text
        # Whole groups of chunks, of those that go through products together, so that neighbours change nothing.
        n = min(-(-chunks // aligned(text.n_ctx)) * aligned(text.n_ctx), text.n_chunks)
        self._some = np.unique(np.linspace(0, text.n_chunks - 1, n).round().astype(int))
        self._tokens = text.tokens[self._some]
        self._infos = model.source.tensors
        self._perturbed: list[_Perturbed] = []
        self._n_copies = 0

    def run(self) -> dict[str, TensorCosts]:
        """The whole pass."""
        model, spec = self._model, self._model.spec
        self._text.require(max((self._infos[n].n_per_row for n in self._candidates if n in spec.matrices), default=0))
        n_seq, n_ctx = self._tokens.shape
        most = 1 + sum(name not in (spec.output.weight,) or spec.tied for name in self._candidates)
        x, copies = (
            Activations(shape, model.memory // 8, self._directory, model.staging)
            for shape in ((*self._text.tokens.shape, spec.width), (most * n_seq, n_ctx, spec.width))
        )
        try:
            self._copies = copies.values.reshape(most, n_seq, n_ctx, spec.width)
            # A tied embedding has no moments: it is looked up, too, and rounded to the nearest.
            calibrated = spec.matrices & self._candidates.keys()
            layers = MomentsPass(model, self._text.tokens, calibrated, x.values)
            self._embedding()
            while layers.next <= len(spec.layers):
                index = layers.next
                self._tell(index, "")
                before = np.array(x.values[self._some])
                found = layers.gather()
                if index < len(spec.layers):
                    advance = model.layer_pass(index, n_ctx)
                    for travelling in self._travelling():
                        for part in batches(*travelling.shape[:2]):
                            advance(travelling[part])
                for shared in found.inputs:
                    self._try(index, shared, before)
            with model.exactly(n_ctx):
                return self._measure(model.normed(x.values[self._some]))
        finally:
            x.close()
            copies.close()

    def _travelling(self) -> list[np.ndarray]:
        """The perturbed copies on their way: together, or each alone where they are no whole groups of chunks."""
        copies = self._copies[: self._n_copies]
        n_seq, n_ctx, width = copies.shape[1:]
        return list(copies) if n_seq % aligned(n_ctx) else [copies.reshape(-1, n_ctx, width)]

    # -- perturbing

    def _embedding(self) -> None:
        """Perturb the embedding, which is looked up, and where it is tied multiplied with too."""
        spec, name = self._model.spec, self._model.spec.embedding
        kinds = self._candidates.get(name)
        if not kinds:
            return
        self._tell(0, name)
        used, counts = np.unique(self._text.tokens, return_counts=True)
        rows = self._rows(name, 0, self._infos[name].n_rows)
        perturbed = self._nearest(rows, self._probe(name), None)
        weight = (counts / counts.sum())[:, None]
        probe_loss = float((np.square(rows[used] - perturbed[used]) * weight).sum())
        likely = used[np.argsort(-counts, kind="stable")[: 8 * _ROWS]]
        losses, reference = {}, 0.0
        for kind in dict.fromkeys([self._probe(name), *kinds]):
            error = float(np.square(rows[likely] - self._nearest(rows[likely], kind, None)).sum())
            reference = reference or error
            losses[kind] = probe_loss * error / reference if reference else 0.0
        entry = _Perturbed(name, {kind: losses[kind] for kind in kinds}, probe_loss, self._n_copies)
        with self._model.replaced({name: perturbed}):
            self._copies[self._n_copies] = self._model.embedded(self._tokens)
        if spec.tied:
            entry.output = perturbed
        self._n_copies += 1
        self._perturbed.append(entry)

    def _try(self, index: int, shared: SharedInput, before: np.ndarray) -> None:
        """Try the types of tensors that share an input, and perturb each."""
        model, n_ctx = self._model, self._tokens.shape[1]
        curvatures = [None if m is None else self._rounder.curvature(m.mean, self._damping) for m in shared.moments]
        for name in shared.names:
            kinds = self._candidates.get(name)
            if not kinds:
                continue
            self._tell(index, name)
            entry, perturbed = self._losses(name, kinds, shared.moments, curvatures)
            self._perturbed.append(entry)
            if name == model.spec.output.weight:
                entry.output = perturbed
                continue
            entry.at = self._n_copies
            self._copies[entry.at] = before
            with model.replaced({name: perturbed}):
                advance = model.layer_pass(index, n_ctx)
                for part in batches(*self._tokens.shape):
                    advance(self._copies[entry.at][part])
            self._n_copies += 1

    def _losses(
        self,
        name: str,
        kinds: Sequence[GGMLType],
        moments: Sequence[Moments | None],
        curvatures: Sequence[Any],
    ) -> tuple[_Perturbed, np.ndarray]:
        """The losses of tensor `name` as each of `kinds`, and its rounding to the probe type."""
        info, probe = self._infos[name], self._probe(name)
        per_matrix = info.n_rows // len(moments)
        whole = np.empty((info.n_rows, info.n_per_row), np.float32)
        seen = sum(m.n_rows for m in moments if m is not None)
        probe_loss, losses = 0.0, dict.fromkeys(kinds, 0.0)
        for e, (own, curvature) in enumerate(zip(moments, curvatures, strict=True)):
            at = e * per_matrix
            rows = self._rows(name, at, at + per_matrix)
            if own is None or curvature is None:
                whole[at : at + per_matrix] = rows
                continue
            share = own.n_rows / seen
            rounded = self._nearest(rows, probe, curvature.importance)
            whole[at : at + per_matrix] = rounded
            row_losses = self._rounder.losses(rows - rounded, curvature)
            total = float(row_losses.sum())
            probe_loss += share * total
            some = np.unique(np.linspace(0, per_matrix - 1, min(per_matrix, _ROWS)).round().astype(int))
            sample, reference = rows[some], float(row_losses[some].sum())
            for kind, tried in zip(kinds, self._sampled(sample, curvature.host(), kinds), strict=True):
                losses[kind] += share * (total * tried / reference if reference > 0 else 0.0)
        self._model.source.release(name)
        return _Perturbed(name, losses, probe_loss), whole

    def _sampled(self, rows: np.ndarray, curvature: Curvature, kinds: Sequence[GGMLType]) -> list[float]:
        """The loss of some rows as each of `kinds`; these are few, so kinds are tried side by side."""
        losses = [0.0] * len(kinds)

        def try_kind(at: int) -> None:
            kind = kinds[at]
            if self._feedback and kind in SUPPORTED:
                found = round_with_feedback(rows, curvature, kind, threads=1).loss
            else:
                importance = curvature.importance if kind.is_quantized else None
                found = curvature.loss(rows - blocks.decode(blocks.encode(rows, kind, importance), kind))
            losses[at] = float(found.sum())

        with self._model.threads.alone() as side_by_side:
            side_by_side(try_kind, len(kinds))
        return losses

    def _probe(self, name: str) -> GGMLType:
        n = self._infos[name].n_per_row
        return next(kind for kind in _PROBES if n % kind.block_size == 0)

    def _nearest(self, rows: np.ndarray, kind: GGMLType, importance: np.ndarray | None) -> np.ndarray:
        """`rows` rounded to the nearest of `kind`, decoded."""
        out = np.empty_like(rows)
        step = 64

        def round_rows(start: int) -> None:
            part = slice(start, start + step)
            out[part] = blocks.decode(blocks.encode(rows[part], kind, importance), kind)

        for _ in self._model.threads.map(round_rows, range(0, len(rows), step)):
            pass
        return out

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return blocks.decode(self._model.source.read(name, start, stop), self._infos[name].type)

    # -- measuring

    def _measure(self, hidden: np.ndarray) -> dict[str, TensorCosts]:
        """The divergence of each perturbed copy from the base, whose normalised output is `hidden`."""
        costs = {}
        for at in range(0, len(self._perturbed), _TOGETHER):
            some = self._perturbed[at : at + _TOGETHER]
            self._tell(len(self._model.spec.layers), "")
            others = [
                (hidden if entry.at is None else self._model.normed(self._copies[entry.at]), entry.output)
                for entry in some
            ]
            for entry, divergence in zip(some, self._model.mean_divergences(hidden, others), strict=True):
                sensitivity = divergence / entry.probe_loss if entry.probe_loss > 0 else 0.0
                info = self._infos[entry.name]
                nbytes = {kind: kind.nbytes(info.shape) for kind in entry.losses}
                costs[entry.name] = TensorCosts(sensitivity, entry.losses, nbytes)
        return costs

    def _tell(self, layer: int, tensor: str) -> None:
        if self._progress is not None:
            n_layer = len(self._model.spec.layers)
            self._progress(Step("choose types", layer, n_layer, tensor, layer, n_layer + 1))
