"""How errors of a matrix's outputs add up: second moments of gradients through the whole model.

The divergence of a model that is slightly off from the model itself is a quadratic form of its errors, whose curvature
is the mean of g gT, g being gradients of the log-likelihood of tokens drawn from what the model predicts (the Fisher
information). YAQA (arXiv 2505.22988) rounds by its Kronecker factors: the moments of a matrix's inputs, and those of
the gradients by its outputs, which say which of its rows may err together.

A token counts in the moments of a matrix's inputs as much as its gradients do: as the square of their length, which is
the first step of the iteration by which YAQA finds the nearest product of two factors.

The text goes up through the layers once, and gradients come down again layer by layer. Memory is one layer's weights
and moments and the activations at about two times the square root of the number of layers, which go to files where
they are large; those between are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.architectures.feed_forward import Experts
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.mixers import Attention
from quantkit.calibration.moments import batches
from quantkit.errors import QuantkitError
from quantkit.evaluate.activations import Activations
from quantkit.evaluate.inputs import all_finite, on_host, squared_lengths
from quantkit.evaluate.model import Model


def coupled(spec: ForwardSpec) -> frozenset[str]:
    """The matrices whose outputs' moments are worth having: attention's, and those that write to the residual stream.

    Those of what a feed-forward block's nonlinearity reads are nearly diagonal. Experts' are left out.
    """
    return frozenset(name for layer in spec.layers for name in _coupled(layer))


def _coupled(layer: Layer) -> list[str]:
    ff = layer.feed_forward
    dense = ff.shared if isinstance(ff, Experts) else ff
    linears = [None if dense is None else dense.down]
    for mixer in layer.mixers:
        linears.append(mixer.out)
        if isinstance(mixer, Attention):
            linears += [mixer.qkv, mixer.q, mixer.k, mixer.v]
    return [linear.weight for linear in linears if linear is not None]


def embeds(spec: ForwardSpec) -> bool:
    """Whether gradients say how errors of the embedding's rows add up: where the first layer reads what is looked up.

    A tied embedding is multiplied with as well, and left out.
    """
    return not spec.tied and spec.embedding_norm is None and spec.width == spec.n_embd


def gradient_moments(
    model: Model,
    tokens: np.ndarray,
    wanted: Collection[str],
    keep: Callable[[str, np.ndarray], None],
    keep_lengths: Callable[[str, np.ndarray], None] | None = None,
    *,
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gather the mean of g gT for the outputs of each matrix in `wanted`, from the last layer to the first.

    `keep(name, moments)` gets them, float32 [n_out, n_out]; for the embedding, [n_embd, n_embd] by what is looked up.
    `keep_lengths(name, lengths)` gets the squared lengths of g for each token of the text, float32 [tokens], of every
    matrix that gradients are taken by: those of experts are left out.
    `tokens` are int32 [n_chunks, n_ctx]. `directory` is for activations too large for memory. `progress(layer,
    tokens)` is called as tokens have gone through a layer, up or down. Raises QuantkitError for models that the backend
    takes no gradients through, and where they are not finite.
    """

    def ignored(first: object, second: object) -> None: ...

    _Pass(model, tokens, wanted, keep, keep_lengths or ignored, directory, progress or ignored).run()


class _Pass:
    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        wanted: Collection[str],
        keep: Callable[[str, np.ndarray], None],
        keep_lengths: Callable[[str, np.ndarray], None],
        directory: Path | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._model, self._tokens, self._wanted, self._keep = model, tokens, wanted, keep
        self._keep_lengths, self._directory, self._progress = keep_lengths, directory, progress
        self._parts = batches(*tokens.shape)
        self._n_layer = len(model.spec.layers)
        self._stride = max(1, math.isqrt(self._n_layer))

    def run(self) -> None:
        """Up and down again."""
        model, tokens = self._model, self._tokens
        starts = range(0, self._n_layer, self._stride)
        model.observer = None
        with ExitStack() as stack:
            read = [self._activations(stack) for _ in range(len(starts) + 1)]
            inside = [read[-1], *(self._activations(stack) for _ in range(self._stride - 1))]
            x = inside[0]
            for part in self._parts:
                x[part] = model.embedded(tokens[part])
            for index in range(self._n_layer):
                if index in starts:
                    read[index // self._stride][:] = x
                self._up(index, x, x)
            draws = np.random.default_rng(0).random(tokens.shape)
            gradients = self._activations(stack)
            for part in self._parts:
                gradients[part] = model.last_gradients(x[part], draws[part])
            for number, start in reversed(list(enumerate(starts))):
                inside[0] = read[number]
                stop = min(start + self._stride, self._n_layer)
                for index in range(start, stop - 1):
                    self._up(index, inside[index - start], inside[index - start + 1])
                for index in reversed(range(start, stop)):
                    self._down(index, inside[index - start], gradients)
            if model.spec.embedding in self._wanted:
                self._gather_embedding(gradients)

    def _activations(self, stack: ExitStack) -> np.ndarray:
        """Space for what stands between two layers."""
        model = self._model
        shape = *self._tokens.shape, model.spec.width
        made = Activations(shape, model.memory // 64, self._directory, model.staging)
        stack.callback(made.close)
        return made.values

    def _up(self, index: int, x: np.ndarray, to: np.ndarray) -> None:
        run = self._model.layer_pass(index, self._tokens.shape[1])
        for part in self._parts:
            rows = np.array(x[part])
            run(rows)
            to[part] = rows
            self._progress(index, rows.shape[0] * rows.shape[1])

    def _down(self, index: int, x: np.ndarray, gradients: np.ndarray) -> None:
        model, n_ctx = self._model, self._tokens.shape[1]
        sums = model.input_sums(full=True, wanted=self._wanted)
        add, lengths, first = model.observer, dict[str, np.ndarray](), 0
        assert add is not None

        def observe(names: tuple[str, ...], rows: Any, at: Any, expert: int | None) -> None:
            start = first + at
            if names[0] not in lengths:  # several threads may find that
                lengths.setdefault(names[0], np.zeros(self._tokens.size, np.float32))
            lengths[names[0]][start : start + len(rows)] = squared_lengths(rows)
            add(names, rows, at, expert)

        model.observer = observe
        try:
            run = model.gradient_pass(index, n_ctx)
            for part in self._parts:
                first = part.start * n_ctx
                rows = np.array(gradients[part])
                run(np.array(x[part]), rows)
                gradients[part] = rows
                sums.settle()
                self._progress(index, 2 * rows.shape[0] * rows.shape[1])
        finally:
            model.observer = None
        for (names, _), (total, n_rows) in sums.take().items():
            self._keep_mean(names[0], total / n_rows)
        for name, own in lengths.items():
            self._require_finite(name, own)
            self._keep_lengths(name, own)

    def _gather_embedding(self, gradients: np.ndarray) -> None:
        sums = self._model.input_sums(full=True)
        self._model.observer = None
        name = self._model.spec.embedding
        for part in self._parts:
            sums.add((name,), np.array(gradients[part]).reshape(-1, gradients.shape[2]))
            sums.settle()
        ((total, n_rows),) = sums.take().values()
        self._keep_mean(name, total / n_rows)

    def _keep_mean(self, name: str, mean: Any) -> None:
        self._require_finite(name, mean)
        self._keep(name, on_host(mean).astype(np.float32))

    def _require_finite(self, name: str, found: Any) -> None:
        if not all_finite(found):
            raise QuantkitError(
                f"{self._model.source.label}: gradients by the outputs of {name} are not finite: its weights, or those "
                "of a layer after it, are damaged or out of range"
            )
