"""Second moments of what each matrix is multiplied with, gathered in one pass over the layers.

All of the text goes through one layer before the next: then a layer's weights are decoded once, and its moments are
handed on and dropped before those of the next are gathered. Memory is one layer's weights and moments and the
activations, which go to a file where they are larger than their share of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.inputs import Balance, InputSum, Key, all_finite
from quantkit.evaluate.model import Model
from quantkit.evaluate.parts import ROWS

# Tokens that go through a layer together. Their sums are added as one, so this does not depend on memory or threads.
_BATCH = 8192


class Moments(NamedTuple):
    """Second moments of the input of one matrix: their mean x xT, float64 [n_in, n_in], over `n_rows` rows.

    Rows count as `evaluate.inputs.Balance` weighs them. Where a GPU computes the mean is torch's, on it.
    """

    mean: Any
    n_rows: int


@dataclass(frozen=True)
class SharedInput:
    """Tensors that are multiplied with the same rows. `moments` has an entry for each of their matrices.

    That is one, or one for each expert; None for an expert that saw no token.
    """

    names: tuple[str, ...]
    moments: list[Moments | None]


@dataclass(frozen=True)
class LayerMoments:
    """The moments of a layer; `index` is the number of layers for those of the output matrix."""

    index: int
    inputs: list[SharedInput] = field(repr=False)


def batches(n_chunks: int, n_ctx: int) -> list[slice]:
    """The chunks that go through a layer together: cut alike whatever the memory and the number of threads."""
    together = max(1, ROWS // n_ctx)
    step = max(1, _BATCH // (together * n_ctx)) * together
    return [slice(at, min(at + step, n_chunks)) for at in range(0, n_chunks, step)]


class MomentsPass:
    """One pass of `tokens` [n_chunks, n_ctx] through the layers of `model`, which need not keep decoded weights.

    Moments are gathered of the inputs of those tensors that are `wanted`. `x` are the activations to work in; `start`
    is the first layer to run, for a pass that goes on where another stopped: `x` holds what that layer reads then.
    `next` is the layer that comes next. `progress(tokens)` is called as tokens have gone through a layer. `gradients`
    say what each token counts for a tensor, where they are known: see `evaluate.inputs.Balance`.
    """

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        wanted: Container[str],
        x: np.ndarray,
        start: int = 0,
        progress: Callable[[int], None] | None = None,
        gradients: Callable[[str], np.ndarray | None] | None = None,
    ) -> None:
        self._model, self._tokens, self._wanted, self._x = model, tokens, wanted, x
        self._progress, self._gradients = progress, gradients
        self.next = start
        if start == 0:
            for part in batches(*tokens.shape):
                x[part] = model.embedded(tokens[part])

    def skip(self) -> None:
        """Run the next layer without gathering its moments."""
        self._model.observer = None
        self._advance(None)

    def gather(self) -> LayerMoments:
        """Run the next layer, or the last norm after all layers, and gather its moments.

        Raises QuantkitError when they are not finite.
        """
        model, index = self._model, self.next
        balance = Balance(self._tokens.shape[1], self._gradients)
        sums = model.input_sums(full=True, wanted=self._wanted, balance=balance)

        def next_batch(first: int) -> None:
            sums.settle()
            balance.first_token = first

        if index < len(model.spec.layers):
            self._advance(next_batch)
        else:
            self.next += 1
            output = (model.spec.output.weight,)
            for part in batches(*self._tokens.shape):
                rows = model.normed(self._x[part])
                if output[0] in self._wanted:
                    sums.add(output, rows.reshape(-1, rows.shape[-1]))
                    sums.settle()
        model.observer = None
        taken = sums.take()
        for (names, _), (total, _) in taken.items():
            if not all_finite(total):
                raise QuantkitError(
                    f"{model.source.label}: the inputs of {names[0]} are not finite, or out of range: its weights, or "
                    "those of a layer before it, are damaged"
                )
        return LayerMoments(index, _shared_inputs(model, taken))

    def _advance(self, next_batch: Callable[[int], None] | None) -> None:
        """Run the next layer; `next_batch` is told after each batch which token the one after it begins with."""
        n_ctx = self._tokens.shape[1]
        run = self._model.layer_pass(self.next, n_ctx)
        for part in batches(*self._tokens.shape):
            run(self._x[part])
            if next_batch is not None:
                next_batch(part.stop * n_ctx)
            if self._progress is not None:
                self._progress((part.stop - part.start) * n_ctx)
        self.next += 1


def _shared_inputs(model: Model, taken: dict[Key, InputSum]) -> list[SharedInput]:
    """The sums of a layer as means, those of experts with few tokens shrunk towards those of all of them."""
    by_names: dict[tuple[str, ...], dict[int | None, InputSum]] = {}
    for (names, expert), entry in taken.items():
        by_names.setdefault(names, {})[expert] = entry
    shared = []
    for names, entries in sorted(by_names.items()):
        if None in entries:
            total, n_rows = entries[None]
            total /= n_rows
            shared.append(SharedInput(names, [Moments(total, n_rows)]))
            continue
        # The order in which experts were first seen is the threads'.
        of = [entries.get(e) for e in range(model.source.tensors[names[0]].shape[2])]
        seen = [entry for entry in of if entry is not None]
        pooled = 0 * seen[0].total
        for entry in seen:
            pooled += entry.total
        pooled /= sum(entry.n_rows for entry in seen)
        shared.append(SharedInput(names, [None if entry is None else shrunk(entry, pooled) for entry in of]))
    return shared


def shrunk(entry: InputSum, pooled: Any) -> Moments:
    """The mean of `entry`, an expert's sums, drawn towards the mean of all experts where it saw few tokens.

    n tokens do not settle moments of n columns: the pooled ones, scaled to the expert's own size, count as that many
    tokens more.
    """
    mean = entry.total
    mean /= entry.n_rows
    size, pooled_size = float(mean.trace()), float(pooled.trace())
    if size > 0.0 and pooled_size > 0.0:
        own = entry.n_rows / (entry.n_rows + len(mean))
        mean *= own
        mean += pooled * ((1.0 - own) * size / pooled_size)
    return Moments(mean, entry.n_rows)
