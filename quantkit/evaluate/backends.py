"""What carries out a forward pass: numpy by default, or torch, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from quantkit.architectures.forward import ForwardSpec
from quantkit.errors import QuantkitError
from quantkit.evaluate import transformer
from quantkit.evaluate.inputs import Sums
from quantkit.evaluate.layers import Observer
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.source import TensorSource, open_source

_T = TypeVar("_T")

# Logits of one model that stand in memory together where they come from a device.
_LOGITS = 1 << 27


@runtime_checkable
class Model(Protocol):
    """A model that can be run, whatever runs it. See `Transformer` for what its methods do."""

    source: TensorSource
    spec: ForwardSpec
    backend: str
    precision: str
    memory: int
    observer: Observer | None

    def hidden(self, tokens: np.ndarray, first: int, stop: int) -> np.ndarray:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        ...

    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, n_embd]."""
        ...

    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """A layer as a function that carries activations [n_seq, n_ctx, n_embd] through it in place."""
        ...

    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the output matrix is multiplied with, from the last layer's output `x`: a copy."""
        ...

    def input_sums(self, full: bool, wanted: Container[str] | None = None) -> Sums:
        """Sums over what the matrices are multiplied with from now on: of squares, with `full` of all products."""
        ...

    def logits(self, tokens: np.ndarray, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Logits at positions `first` to `stop` of each sequence: float32 [n_seq, positions, n_vocab]."""
        ...

    def log_likelihoods(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The natural log of the probability of each token after `first`: float64 [n_seq, n_ctx - 1 - first]."""
        ...

    def peak_memory(self) -> int | None:
        """The most memory, in bytes, taken until now: of the GPU where one computes, else of the process, or None."""
        ...

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together."""
        ...

    def pooled(self, task: Callable[[int], _T], items: Iterable[int]) -> Iterator[_T]:
        """The results of `task` on each item, worked out side by side."""
        ...

    def refuse_nan(self, tokens: np.ndarray, result: np.ndarray) -> None:
        """Raise QuantkitError if `result`, which came of `tokens`, holds NaN."""
        ...


# What measurements take as a model: one that is loaded, a source, or the path or hub id of one.
AnyModel = Model | TensorSource | str | os.PathLike[str]


def load(model: AnyModel, compute: Compute | None = None) -> Model:
    """`model`, a source or the path of one, ready to run as `compute` says; a model that is loaded already, as it is.

    Raises QuantkitError where torch or the device is missing, for models that cannot be run, and for a loaded model
    together with `compute`, which would change nothing.
    """
    if isinstance(model, Model):
        if compute is not None:
            raise QuantkitError(f"{model.source.label}: is loaded already and cannot be told again how to compute")
        return model
    source = open_source(model) if isinstance(model, (str, os.PathLike)) else model
    compute = compute or Compute()
    if compute.backend == "torch":
        from quantkit.evaluate.torch_backend import TorchTransformer

        return TorchTransformer(source, compute)
    return Transformer(source, compute)


def visit_logits(
    models: Sequence[Model],
    tokens: np.ndarray,
    first: int,
    stop: int,
    visit: Callable[[int, slice, int, list[np.ndarray]], None],
) -> None:
    """Show the logits of models with one vocabulary, as `transformer.visit_logits` does, whatever runs them.

    Where one of them runs elsewhere than in numpy, a tile is all of a sequence's logits.
    """
    on_cpu = [model for model in models if isinstance(model, Transformer)]
    if len(on_cpu) == len(models):
        transformer.visit_logits(on_cpu, tokens, first, stop, visit)
        return
    rows = slice(0, stop - first)
    step = max(1, _LOGITS // (rows.stop * models[0].spec.n_vocab))
    for at in range(0, len(tokens), step):
        logits = [model.logits(tokens[at : at + step], first, stop) for model in models]

        def show(seq: int, at: int = at, logits: list[np.ndarray] = logits) -> None:
            visit(at + seq, rows, 0, [each[seq] for each in logits])

        for _ in models[0].pooled(show, range(len(logits[0]))):
            pass
