"""What measurements ask of a model, whatever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from quantkit.architectures import forward_spec
from quantkit.architectures.forward import ForwardSpec
from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels
from quantkit.evaluate.inputs import Balance, Sums
from quantkit.evaluate.logit_kernels import BASE_MAX, BASE_SUM, MAX, N_STATE, SUM, TOP, WEIGHTED
from quantkit.evaluate.parts import ROWS, Observer, aligned, in_groups
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.threads import Threads
from quantkit.machine import available_memory, default_threads, peak_memory
from quantkit.sources.source import TensorSource

# Tokens of the vocabulary whose logits a visitor gets together.
TILE = 2048

# Told of logits: a sequence, which of its visited positions, the first token of the vocabulary, and each model's
# logits, float32 [positions, tokens], its own to change.
Visit = Callable[[int, slice, int, list[np.ndarray]], None]


class Logits(Protocol):
    """The logits of some positions of sequences, computed a part at a time."""

    # Tokens of the vocabulary that can be prepared together.
    step: int

    def prepare(self, start: int, stop: int) -> None:
        """Make ready for the vocabulary's tokens `start` to `stop`."""
        ...

    def compute(self, seqs: slice, rows: slice, start: int, stop: int, out: np.ndarray) -> None:
        """The logits of positions `rows` of some sequences for tokens `start` to `stop`, which are prepared.

        `out`, float32 [sequences, rows, tokens] and contiguous, gets them. Several threads may call this.
        """
        ...


class Model(ABC):
    """A model that can be run: token ids in, logits, log-likelihoods or activations out.

    `source` is what its weights come from, `compute` what was asked for, `spec` describes its forward pass. `backend`,
    `precision` and `blas` (the library that multiplies matrices, and its kernels) say what computes, `threads` on how
    many threads. `memory` bounds, in bytes, what may be taken. `observer`, if set, is told of each matrix product of
    the layers. `gpu` is torch's device where a GPU computes: what can be done there with what it has summed up, should
    be.

    Raises QuantkitError when the architecture is unknown, or the tensors do not fit the metadata.
    """

    backend: str
    precision: str
    blas: str
    observer: Observer | None = None
    gpu: Any = None
    _listener: Callable[[float], None] | None = None
    # The length of the sequences that are computed exactly, if they are.
    _exact: int | None = None

    def __init__(self, source: TensorSource, compute: Compute) -> None:
        self.source, self.compute = source, compute
        self.spec: ForwardSpec = forward_spec(source.metadata, source.tensors)
        self.threads = Threads(compute.threads or default_threads())
        self.memory = available_memory() // 2 if compute.memory is None else compute.memory

    # -- what a backend does

    @abstractmethod
    def hidden(self, tokens: np.ndarray, first: int, stop: int) -> np.ndarray:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""

    @abstractmethod
    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        """What the first layer reads for `tokens` [n_seq, n_ctx]: float32 [n_seq, n_ctx, width]."""

    @abstractmethod
    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """Layer `index` as a function that carries activations [n_seq, n_ctx, width] through it in place.

        Valid until the next call. `embedded`, this for each layer, and `normed` are `hidden` for a caller that takes
        all its text through one layer before the next.
        """

    @abstractmethod
    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the output matrix is multiplied with, from the last layer's output `x`: a copy."""

    @abstractmethod
    def last_gradients(self, x: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Gradients of log-likelihoods by the last layer's output `x` [n_seq, n_ctx, n_embd]: float32 of that shape.

        At each position a token is drawn from what the model predicts there: `draws` [n_seq, n_ctx], from 0 to before
        1, say where in the cumulated probabilities. The mean of g gT is then the curvature of the divergence from this
        model. Raises QuantkitError for models that have no backward pass here.
        """

    @abstractmethod
    def gradient_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray, np.ndarray], None]:
        """Layer `index` as a function that takes gradients back through it.

        It reads what the layer reads, `x` [n_seq, n_ctx, n_embd], and replaces the gradients by what the layer makes,
        of that shape, by those by `x`. The observer is told of gradients by the outputs of each product, instead of
        inputs: by the name of its weights, experts' left out. Valid until the next call.
        """

    @abstractmethod
    def input_sums(self, full: bool, wanted: Container[str] | None = None, balance: Balance | None = None) -> Sums:
        """Sums over what the matrices are multiplied with from now on: of squares, with `full` of all products.

        Rows of products are weighed by `balance`; without it, all count as they are.
        """

    @abstractmethod
    def open_logits(self, tokens: np.ndarray, first: int, stop: int) -> Logits:
        """The logits at positions `first` to `stop` of each sequence of `tokens`, to be computed part by part."""

    @abstractmethod
    def scores(self, hidden: np.ndarray) -> Logits:
        """The logits of `hidden` [n_seq, positions, n_embd], as the method `hidden` or `normed` gave it."""

    @abstractmethod
    def replaced(self, tensors: Mapping[str, np.ndarray]) -> AbstractContextManager[None]:
        """Compute with other values for `tensors`, float32 [n_rows, n_in] by name, within the context.

        What a layer's matrices are is settled by `layer_pass`, and what the output matrix is by `scores`; both must be
        called and used within it.
        """

    @abstractmethod
    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together."""

    @abstractmethod
    def take_turns(self, other: Model) -> None:
        """Decode layers where `other` does: the two never run at the same time, but for their logits."""

    def peak_memory(self) -> int | None:
        """The most memory, in bytes, taken until now: of the GPU where one computes, else of the process, or None."""
        return peak_memory()

    def staging(self, shape: tuple[int, ...]) -> np.ndarray:
        """New memory for activations, float32 of `shape`, that the device reads and writes fast."""
        return np.empty(shape, np.float32)

    @contextmanager
    def exactly(self, n_ctx: int) -> Iterator[None]:
        """Within the context, sequences of `n_ctx` tokens give the same bits whatever the batch and the threads.

        That is true on the CPU through numpy, on one kind of processor, where batches begin at multiples of `aligned`:
        sequences then go through products in the same groups. Elsewhere this changes nothing.
        """
        self._exact = n_ctx
        try:
            yield
        finally:
            self._exact = None

    # -- how far it is

    def pass_through(self, tokens: np.ndarray, sums: Sums | None = None) -> None:
        """Run `tokens` [n_seq, n_ctx] through all layers, for what the observer is told.

        `sums` get what the output matrix is multiplied with. Raises QuantkitError, as `refuse_nan`, for NaN.
        """
        hidden = self.hidden(tokens, 0, tokens.shape[1])
        self.refuse_nan(tokens, hidden.reshape(len(tokens), -1))
        if sums is not None:
            for group in in_groups(*tokens.shape):
                rows = hidden[group].reshape(-1, self.spec.n_embd)
                sums.add((self.spec.output.weight,), rows, group.start * tokens.shape[1])

    @contextmanager
    def telling(self, listener: Callable[[float], None]) -> Iterator[None]:
        """Tell `listener` while this lasts, after every layer of `hidden`, what share of a batch is done."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def _layer_done(self, index: int) -> None:
        if self._listener is not None:
            # The logits are worth about a layer.
            self._listener((index + 1) / (len(self.spec.layers) + 1))

    # -- what follows from that

    def visit_logits(
        self, tokens: np.ndarray, first: int, stop: int, visit: Visit, beside: Sequence[Model] = ()
    ) -> None:
        """Show the logits at positions `first` to `stop` of each sequence, tile by tile, never all of them.

        `tokens` is int32 [n_seq, n_ctx]. `visit(sequence, rows, token, tiles)` gets the logits of some positions
        (`rows` counts from `first`) for the tokens from `token` on: this model's, then those of the models `beside`,
        which have the same vocabulary. It is called on several threads, which share the work by sequence and
        by position; the tiles of a position come in the order of the tokens.
        """
        opened = [model.open_logits(tokens, first, stop) for model in (self, *beside)]
        self.visit_opened(opened, len(tokens), stop - first, visit)

    def visit_opened(self, opened: Sequence[Logits], n_seq: int, n_rows: int, visit: Visit) -> None:
        """Show logits of `n_rows` positions of each of `n_seq` sequences, as `visit_logits` does."""
        n_vocab, step = self.spec.n_vocab, min(each.step for each in opened)
        most = n_seq // self.threads.count if self._exact is None else aligned(self._exact)
        together = max(1, min(ROWS // max(1, n_rows), most))
        n_units = -(-n_seq // together)
        blocks = [slice(row, min(row + ROWS, n_rows)) for row in range(0, n_rows, ROWS)]
        n_parts = n_units * len(blocks)
        with self.threads.share(n_parts) if self._exact is None else self.threads.share_exactly(n_parts) as share:
            for start in range(0, n_vocab, step):
                end = min(start + step, n_vocab)
                for each in opened:
                    each.prepare(start, end)

                def show(part: int, start: int = start, end: int = end) -> None:
                    unit, block = divmod(part, len(blocks))
                    seqs, rows = slice(unit * together, min((unit + 1) * together, n_seq)), blocks[block]
                    n = seqs.stop - seqs.start
                    for at in range(start, end, TILE):
                        to = min(at + TILE, end)
                        tiles = []
                        for i, each in enumerate(opened):
                            out = self.threads.workspace.take(f"tile {i}", n, rows.stop - rows.start, to - at)
                            each.compute(seqs, rows, at, to, out)
                            tiles.append(out)
                        for i in range(n):
                            visit(seqs.start + i, rows, at, [tile[i] for tile in tiles])

                share.outer(show, n_parts)

    def logits(self, tokens: np.ndarray, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Logits at positions `first` to `stop` of each sequence.

        `tokens` is int32 [n_seq, n_ctx]; the result float32 [n_seq, positions, n_vocab].
        """
        stop = tokens.shape[1] if stop is None else stop
        out = np.empty((len(tokens), stop - first, self.spec.n_vocab), np.float32)

        def keep(seq: int, rows: slice, at: int, tiles: list[np.ndarray]) -> None:
            out[seq, rows, at : at + tiles[0].shape[1]] = tiles[0]

        self.visit_logits(tokens, first, stop, keep)
        self.refuse_nan(tokens, out.max(axis=2, initial=-np.inf))
        return out

    def log_likelihoods(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The natural log of the probability of each token from position `first` + 1 on, given those before it.

        `tokens` is int32 [n_seq, n_ctx]; the result float64 [n_seq, n_ctx - 1 - first]. The logits never stand in
        memory all together.
        """
        targets = np.ascontiguousarray(tokens[:, first + 1 :])
        maxima = np.full(targets.shape, -np.inf)
        sums, chosen = np.zeros(targets.shape), np.zeros(targets.shape)

        def score(seq: int, rows: slice, at: int, tiles: list[np.ndarray]) -> None:
            logit_kernels.score_tile(
                tiles[0], at, targets[seq, rows], maxima[seq, rows], sums[seq, rows], chosen[seq, rows]
            )

        self.visit_logits(tokens, first, tokens.shape[1] - 1, score)
        result: np.ndarray = chosen - maxima - np.log(sums)
        self.refuse_nan(tokens, result)
        return result

    def mean_divergences(
        self, base: np.ndarray, others: Sequence[tuple[np.ndarray, np.ndarray | None]]
    ) -> Sequence[float]:
        """The mean divergence, over all positions, of each of `others` from `base`: KL(base || other), in nats.

        `base` is [n_seq, positions, n_embd], as the method `hidden` or `normed` gave it, and so is the first of each
        pair; the second is what takes the place of the output matrix, or None.
        """
        shape = base.shape[0], base.shape[1]
        opened = []
        for hidden, output in others:
            with self.replaced({} if output is None else {self.spec.output.weight: output}):
                opened.append(self.scores(hidden))
        state = np.zeros((len(opened), *shape, N_STATE))
        state[..., MAX] = state[..., BASE_MAX] = -np.inf
        values = np.full((len(opened), *shape, 2, TOP), -np.inf, np.float32)
        ids = np.full((len(opened), *shape, 2, TOP), -1, np.int32)
        nothing = np.zeros(shape, np.int32)

        def compare(seq: int, rows: slice, at: int, tiles: list[np.ndarray]) -> None:
            for i in range(len(opened)):
                logit_kernels.compare_tile(
                    tiles[i + 1], tiles[0], at, nothing[seq, rows], state[i, seq, rows], values[i, seq, rows],
                    ids[i, seq, rows],
                )  # fmt: skip

        self.visit_opened([self.scores(base), *opened], shape[0], shape[1], compare)
        found = []
        for s in state:
            log_sum, log_base = s[..., MAX] + np.log(s[..., SUM]), s[..., BASE_MAX] + np.log(s[..., BASE_SUM])
            found.append(max(0.0, float((s[..., WEIGHTED] / s[..., BASE_SUM] - log_base + log_sum).mean())))
        return found

    def refuse_nan(self, tokens: np.ndarray, result: np.ndarray) -> None:
        """Check `result` [n_seq, any], which came of `tokens` [n_seq, n_ctx].

        Raises QuantkitError, which names the first layer that made a NaN, if it holds one.
        """
        bad = np.flatnonzero(np.isnan(result).any(axis=1))
        if not bad.size:
            return
        label, some = self.source.label, tokens[bad[:1]]
        x = self.embedded(some)
        if np.isnan(x).any():
            raise QuantkitError(f"{label}: the embeddings hold NaN")
        for index in range(len(self.spec.layers)):
            self.layer_pass(index, some.shape[1])(x)
            if np.isnan(x).any():
                raise QuantkitError(
                    f"{label}: layer {index} (blk.{index}) is the first whose output holds NaN; "
                    f"its weights are damaged or out of {self.precision}'s range"
                )
        raise QuantkitError(
            f"{label}: the logits are NaN though no layer's output is: "
            f"{self.spec.output_norm.weight} or {self.spec.output.weight} is damaged"
        )
