"""The forward pass on a CPU: numpy's BLAS for the products, numba kernels for the rest.

The work is cut by sequence: a thread takes a sequence (or a few short ones) through a whole layer, its matrix products
on one BLAS thread, so threads meet once a layer and never compete. A weight is decoded once for a whole batch of
sequences. Within a sequence, rows are taken in blocks that keep a layer's activations near the processor; blocks do not
depend on the batch or on the number of threads, and neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from quantkit.architectures.feed_forward import Experts
from quantkit.architectures.mixers import Rope
from quantkit.architectures.products import Norm, NormKind
from quantkit.errors import QuantkitError
from quantkit.evaluate import logit_kernels, norm_kernels
from quantkit.evaluate.activations import Activations, free_disk, let_go
from quantkit.evaluate.backward import Draws, LayerGradients, normalised, unknown_to_backward
from quantkit.evaluate.inputs import Balance, InputSums
from quantkit.evaluate.kv_cache import KVCache
from quantkit.evaluate.layers import Expert, LayerRunner, Routed
from quantkit.evaluate.mixer_runner import Tables
from quantkit.evaluate.model import TILE, Model
from quantkit.evaluate.parts import ROWS, Product
from quantkit.evaluate.refusals import refuse_encoder, refuse_unsupported
from quantkit.evaluate.rotary import rotation_tables
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.streams import merged, widened
from quantkit.evaluate.threads import Each, Share, blas_name, one_by_one
from quantkit.evaluate.weights import Replaced, Weights
from quantkit.sources.source import TensorSource

# The output matrix is decoded in slabs of this many weights when it is not kept.
_SLAB_WEIGHTS = 1 << 26
# Tokens of the vocabulary that generation takes through the output matrix together.
_NEXT_TOKENS = 1 << 15
# Tokens of the vocabulary whose gradients are taken together.
_DRAWN = 1 << 13
_DEFAULT = Compute()


def _in_batches(counts: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Cut sequences of so many tokens into batches of at most `ROWS`: parts as (sequence, start, stop).

    No batch has two parts of one sequence.
    """
    batch: list[tuple[int, int, int]] = []
    room = ROWS
    for i, count in enumerate(counts):
        start = 0
        while start < count:
            stop = min(count, start + room)
            batch.append((i, start, stop))
            room -= stop - start
            if room == 0:
                yield batch
                batch, room = [], ROWS
            start = stop
    if batch:
        yield batch


class Transformer(Model):
    """A model that runs through numpy on the CPU, in float32.

    `source` is a GGUF file or a checkpoint. `compute` bounds the threads and the bytes that decoded weights and
    activations may take; weights that fit into half of these are decoded once and kept, unless `keep` says otherwise.

    Raises QuantkitError when the architecture is unknown, or the tensors do not fit the metadata.
    """

    backend = "numpy"
    precision = "f32"

    def __init__(self, source: TensorSource, compute: Compute = _DEFAULT, keep: bool | None = None) -> None:
        super().__init__(source, compute)
        self.blas = blas_name()
        refuse_unsupported(self.spec, source.label)
        n_weights = sum(info.n_elements for info in source.tensors.values())
        self._keep = n_weights * 4 <= self.memory // 2 if keep is None else keep
        self._weights: Weights = Weights(source, self.threads.run, self._keep)
        self._tables: dict[tuple[Rope, str | None], tuple[np.ndarray, np.ndarray]] = {}

    def take_turns(self, other: Model) -> None:
        """See `Model`."""
        if isinstance(other, Transformer):
            self._weights.scratch = other._weights.scratch

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together: many, so that each weight is decoded seldom.

        Bounded by memory; where weights are kept, only as many as keep all threads busy. Where reading them again for
        each such batch would be twice as much as to read and write activations, these go through files.
        """
        copies = 4 if any(isinstance(layer.feed_forward, Experts) for layer in self.spec.layers) else 2
        bytes_per_sequence = n_ctx * self.spec.width * 4 * copies
        wanted = -(-4096 // n_ctx) if self._keep else -(-32768 // n_ctx)
        at_once = self.threads.count * max(1, ROWS // n_ctx)
        wanted = -(-wanted // at_once) * at_once
        batch = max(1, min(wanted, self.memory // 4 // bytes_per_sequence))
        n_bytes = sum(info.nbytes for info in self.source.tensors.values())
        # Each layer reads and writes what stands between it and the next.
        through_files = n_bytes // max(1, 2 * len(self.spec.layers) * bytes_per_sequence)
        if not self._keep and through_files > 2 * batch:
            batch = max(batch, min(through_files, free_disk() // 2 // bytes_per_sequence))
        return batch

    # -- the forward pass

    def hidden(self, tokens: np.ndarray, first: int, stop: int) -> np.ndarray:
        """See `Model`."""
        n_seq, n_ctx = tokens.shape
        spec = self.spec
        budget = max(self.memory // 4, 4 * ROWS * spec.width)
        in_memory = 4 * n_seq * n_ctx * spec.width <= budget
        x = self.embedded(tokens) if in_memory else Activations((n_seq, n_ctx, spec.width), budget).values
        units = self._units(n_seq, n_ctx, 1 if self._exact else self.threads.count)
        for unit in units if not in_memory else []:
            x[unit] = self.embedded(tokens[unit])
            let_go(x, unit)
        last = Activations((n_seq, stop - first, spec.width), budget).values
        n_blocks = -(-n_ctx // ROWS)
        shared = self.threads.share_exactly(len(units), n_blocks) if self._exact else self.threads.share(len(units))
        with shared as share:
            for i in range(len(spec.layers)):
                runner = self._runner(i, lambda rope: self._rope(rope, n_ctx), share.blocks)
                in_place = i + 1 < len(spec.layers)
                span, to = ((0, n_ctx), x) if in_place else ((first, stop), last)
                self._run_layer(runner, x, units, span, to, share)
                self._layer_done(i)
            if not spec.layers:
                last[:] = x[:, first:stop]
        last = self._merged(last)
        with self.threads.share(len(units)) as share:
            share.outer(lambda u: self._normalise(spec.output_norm, last[units[u]]), len(units))
        return last

    def _merged(self, rows: np.ndarray) -> np.ndarray:
        """What the output norm reads of rows [n_seq, n, width]: [n_seq, n, n_embd]."""
        with self.threads.alone() as each:
            return merged(self.spec, self._weights, rows, each)

    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """See `Model`."""
        runner = self._runner(index, lambda rope: self._rope(rope, n_ctx))

        def advance(x: np.ndarray) -> None:
            units = self._units(len(x), n_ctx)
            # Never several BLAS threads for one product: the last bits could depend on their number.
            with self.threads.share(max(len(units), self.threads.count)) as share:
                self._run_layer(runner, x, units, (0, n_ctx), x, share)

        return advance

    def normed(self, x: np.ndarray) -> np.ndarray:
        """See `Model`."""
        result = np.array(self._merged(x), np.float32, order="C")
        self._normalise(self.spec.output_norm, result)
        return result

    def last_gradients(self, x: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Model`."""
        for what in unknown_to_backward(self.spec):
            raise QuantkitError(f"{self.source.label}: the numpy backend takes no gradients through {what}: use torch")
        spec = self.spec
        hidden, result = self.normed(x), np.zeros(x.shape, np.float32)
        drawn = Draws(draws)
        slabs = [(at, min(at + _DRAWN, spec.n_vocab)) for at in range(0, spec.n_vocab, _DRAWN)]
        with self.threads.alone() as each:
            for start, stop in slabs:
                product = self._output(start, stop)

                def add(seq: int, product: Product = product) -> None:
                    drawn.add(seq, self._new_scores(hidden[seq], product))

                each(add, len(x))
            for start, stop in slabs:
                product = self._output(start, stop)

                def back(seq: int, product: Product = product, last: bool = stop == spec.n_vocab) -> None:
                    scores = self._new_scores(hidden[seq], product)
                    by_scores = drawn.gradients(seq, scores, last)
                    if spec.logit_softcap is not None:
                        by_scores *= 1 - np.square(scores / np.float32(spec.logit_softcap))
                    by_scores *= np.float32(spec.logit_scale)
                    result[seq] += by_scores @ product.matrix

                each(back, len(x))
            weight, bias = self._norm_weights(spec.output_norm)

            def through_norm(seq: int) -> None:
                result[seq] = normalised(x[seq], weight, bias, spec.output_norm)[1](result[seq])

            each(through_norm, len(x))
        return result

    def _new_scores(self, hidden: np.ndarray, product: Product) -> np.ndarray:
        return self._scores(hidden, product, np.empty((len(hidden), len(product.matrix)), np.float32))

    def gradient_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray, np.ndarray], None]:
        """See `Model`."""
        layer, observer = self.spec.layers[index], self.observer

        def tables(rope: Rope | None) -> tuple[np.ndarray, np.ndarray]:
            return self._rope(rope, n_ctx)

        runner = LayerGradients(layer, self.spec, self._weights, tables, self.threads.workspace, observer)

        def back(x: np.ndarray, gradients: np.ndarray) -> None:
            def step(seq: int) -> None:
                gradients[seq] = runner.back(x[seq], gradients[seq], seq * n_ctx)

            with self.threads.alone() as each:
                each(step, len(x))

        return back

    def input_sums(self, full: bool, wanted: Container[str] | None = None, balance: Balance | None = None) -> InputSums:
        """See `Model`."""
        sums = InputSums(full, self.threads, wanted, balance)
        self.observer = sums.observe
        return sums

    @contextmanager
    def replaced(self, tensors: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See `Model`."""
        base = self._weights
        self._weights = Replaced(base, tensors)
        try:
            yield
        finally:
            self._weights = base

    def scores(self, hidden: np.ndarray) -> _Logits:
        """See `Model`."""
        return _Logits(self, hidden)

    @staticmethod
    def _units(n_seq: int, n_ctx: int, n_threads: int = 1) -> list[slice]:
        """The sequences that a thread takes at a time: enough for large products, so few that all threads get some."""
        n_together = max(1, min(ROWS // n_ctx, n_seq // n_threads))
        return [slice(at, min(at + n_together, n_seq)) for at in range(0, n_seq, n_together)]

    def _runner(self, index: int, tables: Tables, each_block: Each = one_by_one) -> LayerRunner:
        """Layer `index`, decoded, ready for rows whose cosines and sines `tables` gives."""
        layer, workspace = self.spec.layers[index], self.threads.workspace
        return LayerRunner(layer, self.spec, self._weights, tables, workspace, self.observer, each_block)

    def next_logits(self, continued: Sequence[tuple[Sequence[int], KVCache]]) -> np.ndarray:
        """Logits, float32 [sequences, n_vocab], of what comes after each sequence, given as tokens and a cache.

        The tokens follow those that the cache holds, and afterwards it holds them too. All sequences go through the
        weights together. Raises QuantkitError for no tokens, for more than a cache has room for, and for logits that
        are NaN.
        """
        label = self.source.label
        refuse_encoder(self.spec, label)
        for tokens, cache in continued:
            if len(tokens) == 0:
                raise QuantkitError(f"{label}: nothing to continue: the prompt has no tokens")
            if len(cache.tokens) + len(tokens) > cache.n_ctx:
                raise QuantkitError(f"{label}: more than {cache.n_ctx} tokens")
        last = np.empty((len(continued), self.spec.n_embd), np.float32)
        for batch in _in_batches([len(tokens) for tokens, _ in continued]):
            parts = [(np.array(continued[i][0][start:stop], np.int32), continued[i][1]) for i, start, stop in batch]
            x = self._extended(parts)
            ends = np.cumsum([stop - start for _, start, stop in batch])
            for (i, _, _), end in zip(batch, ends, strict=True):
                last[i] = self._merged(x[None, end - 1 : end])[0, 0]
        self._normalise(self.spec.output_norm, last[None])
        n_vocab = self.spec.n_vocab
        out = np.empty((len(last), n_vocab), np.float32)
        with self.threads.share(1):
            for start in range(0, n_vocab, _NEXT_TOKENS):
                product = self._output(start, min(start + _NEXT_TOKENS, n_vocab))
                out[:, start : start + _NEXT_TOKENS] = self._scores(
                    last, product, np.empty((len(last), len(product.matrix)), np.float32)
                )
        for (_, cache), logits in zip(continued, out, strict=True):
            self.refuse_nan(np.array([cache.tokens], np.int32), logits[None])
        return out

    def _extended(self, parts: Sequence[tuple[np.ndarray, KVCache]]) -> np.ndarray:
        """The last layer's output for `parts`, one after another: [rows, width].

        A part is the next tokens [n] of a sequence, which follow those of its cache and are put into it.
        """
        spans, n = [], 0  # each part's rows, and the positions in its sequence
        for tokens, cache in parts:
            past = len(cache.tokens)
            spans.append((slice(n, n + len(tokens)), slice(past, past + len(tokens))))
            n += len(tokens)
        positions = np.concatenate([np.arange(where.start, where.stop) for _, where in spans])
        x = self.embedded(np.concatenate([tokens for tokens, _ in parts])[None], positions)

        def tables(rope: Rope | None) -> tuple[np.ndarray, np.ndarray]:
            """Of all rows: the cosines and sines at their positions."""
            of = [self._rope(rope, cache.n_ctx) for _, cache in parts]
            cosines, sines = (
                np.concatenate([table[kind][where] for table, (_, where) in zip(of, spans, strict=True)])
                for kind in (0, 1)
            )
            return cosines, sines

        # A row times a matrix is over before BLAS's threads have met: one of them does it ten times faster.
        with self.threads.share(1 if n > 1 else self.threads.count) as share:
            for i, layer in enumerate(self.spec.layers):
                runner = self._runner(i, tables)
                memories = [cache.memories[i] for _, cache in parts]
                active = x
                if runner.around is not None:
                    active = np.empty((1, n, self.spec.n_embd), np.float32)
                    runner.around.enter(x[0], active[0])
                mixed = runner.mix(
                    active,
                    (0, n),
                    share.inner,
                    continued=list(zip(spans, memories, strict=True)),
                    rows=None if runner.around is None else x,
                )
                routed = Routed.of(layer, n, self.spec.n_embd)
                runner.finish(mixed, active[0], routed)
                if routed is not None:
                    for expert in runner.experts():
                        runner.expert(expert, routed)
                    runner.close(active[0], routed)
                if runner.around is not None:
                    runner.around.leave(active[0], x[0], 0)
        for tokens, cache in parts:
            cache.tokens += tokens.tolist()
        last: np.ndarray = x[0]
        return last

    def embedded(self, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """What the first layer reads for `tokens` [n_seq, n]: float32 [n_seq, n, width].

        They stand at `positions` [n] of their sequences, from 0 on if it is None.
        """
        spec = self.spec
        positions = np.arange(tokens.shape[1]) if positions is None else positions
        stop = int(positions.max(initial=-1)) + 1
        x = self._weights.lookup(spec.embedding, tokens, spec.n_embd)
        if spec.embedding_scale != 1.0:
            x *= np.float32(spec.embedding_scale)
        if spec.position_embedding is not None:
            learned = self.source.tensors.get(spec.position_embedding)
            if learned is not None and stop > learned.n_rows:
                raise QuantkitError(
                    f"{self.source.label}: sequences of {stop} tokens are too long for a model that has learned "
                    f"{learned.n_rows} positions: use a smaller context"
                )
            x += self._weights.lookup(spec.position_embedding, positions, spec.n_embd)
        if spec.segment_embedding is not None:
            x += self._weights.lookup(spec.segment_embedding, np.zeros(1, np.int64), spec.n_embd)
        if spec.embedding_norm is not None:
            self._normalise(spec.embedding_norm, x)
        with self.threads.alone() as each:
            return widened(spec, self._weights, tokens, x, each)

    def _run_layer(
        self,
        runner: LayerRunner,
        x: np.ndarray,
        units: list[slice],
        span: tuple[int, int],
        to: np.ndarray,
        share: Share,
    ) -> None:
        """Carry `x` [n_seq, n_ctx, width] through a layer into `to`, which is `x` or holds the positions of `span`."""
        n_embd, n_positions, around = self.spec.n_embd, span[1] - span[0], runner.around
        budget = max(self.memory // 4, 4 * ROWS * n_embd)
        routed = Routed.of(runner.layer, to.shape[0] * n_positions, n_embd, budget)
        cuts = [(unit.start * n_positions, unit.stop * n_positions) for unit in units]
        shares = [] if routed is None else [routed.part(*cut) for cut in cuts]
        wide = to.reshape(-1, to.shape[2])
        # What the layer works on, and at the positions of `span` what it makes of it.
        active = x if around is None else Activations((*x.shape[:2], n_embd), budget).values
        made = to if around is None else active if to is x else Activations((*to.shape[:2], n_embd), budget).values
        rows = made.reshape(-1, n_embd)

        def step(u: int) -> None:
            unit, cut = units[u], slice(*cuts[u])
            if around is not None:
                around.enter(x[unit].reshape(-1, x.shape[2]), active[unit].reshape(-1, n_embd))
            mixed = runner.mix(
                active[unit], span, share.inner, unit.start * x.shape[1], rows=None if around is None else x[unit]
            )
            if to is not x:
                to[unit] = x[unit, span[0] : span[1]]
                made[unit] = active[unit, span[0] : span[1]]
            runner.finish(mixed, rows[cut], shares[u] if shares else None, cut.start)
            if around is not None and not shares:
                around.leave(rows[cut], wide[cut], cut.start)
            let_go(x, unit)
            let_go(to, unit)

        def close(u: int) -> None:
            cut = slice(*cuts[u])
            runner.close(rows[cut], shares[u], cut.start)
            if around is not None:
                around.leave(rows[cut], wide[cut], cut.start)

        share.outer(step, len(units))
        if shares:
            for expert in runner.experts():

                def run_expert(u: int, expert: Expert = expert) -> None:
                    runner.expert(expert, shares[u], cuts[u][0])

                share.outer(run_expert, len(units))
            share.outer(close, len(units))

    def _output(self, start: int, stop: int, weights: Weights | None = None) -> Product:
        """The output product of tokens `start` to `stop`, from `weights` if given."""
        spec, weights = self.spec, weights or self._weights
        bias = None if spec.output.bias is None else weights.vector(spec.output.bias, spec.n_vocab)[start:stop]
        slab = weights.slab(f"output of {id(self)}", spec.output.weight, spec.n_vocab, spec.n_embd, start, stop)
        return Product(slab, bias, (spec.output.weight,))

    def open_logits(self, tokens: np.ndarray, first: int, stop: int) -> _Logits:
        """See `Model`."""
        refuse_encoder(self.spec, self.source.label)
        return _Logits(self, self.hidden(tokens, first, stop))

    def _scores(self, x: np.ndarray, product: Product, out: np.ndarray) -> np.ndarray:
        """Logits of rows of normalised `x` for the tokens of `product`, a part of `_output`, in `out`."""
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            norm_kernels.add_bias(out, product.bias)
        if self.spec.logit_scale != 1.0:
            out *= np.float32(self.spec.logit_scale)
        if self.spec.logit_softcap is not None:
            logit_kernels.soft_cap(out, np.float32(self.spec.logit_softcap))
        return out

    # -- small things

    def _norm_weights(self, norm: Norm) -> tuple[np.ndarray, np.ndarray | None]:
        n_embd = self.spec.n_embd
        return (
            np.ones(n_embd, np.float32) if norm.weight is None else self._weights.vector(norm.weight, n_embd),
            None if norm.bias is None else self._weights.vector(norm.bias, n_embd),
        )

    def _normalise(self, norm: Norm, x: np.ndarray) -> None:
        """Normalise `x` [any, any, n_embd] in place."""
        rows = x.reshape(-1, self.spec.n_embd)
        weight, bias = self._norm_weights(norm)
        if norm.kind is NormKind.RMS:
            norm_kernels.rms_norm(rows, weight, norm.eps, rows)
        else:
            bias = np.zeros_like(weight) if bias is None else bias
            norm_kernels.layer_norm(rows, weight, bias, norm.eps, rows)

    def _rope(self, rope: Rope | None, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines for `n_ctx` positions, without columns where there is no rotation."""
        if rope is None:
            return np.empty((n_ctx, 0), np.float32), np.empty((n_ctx, 0), np.float32)
        name = rope.factors_for(n_ctx)
        key = rope, name
        if key not in self._tables or len(self._tables[key][0]) < n_ctx:
            factors = None if name is None else self._weights.vector(name, rope.n_dims // 2)
            self._tables[key] = rotation_tables(rope, n_ctx, factors)
        return self._tables[key]


class _Logits:
    """The logits of the last layer's output `hidden` [n_seq, positions, n_embd]: see `model.Logits`."""

    def __init__(self, model: Transformer, hidden: np.ndarray) -> None:
        self._model, self._hidden, self._weights = model, hidden, model._weights
        # As float32 a slab takes no more than an eighth of the memory, and it is cut where tiles are.
        slab = min(_SLAB_WEIGHTS, model.memory // 32)
        self.step = model.spec.n_vocab if model._keep else max(1, slab // model.spec.n_embd // TILE) * TILE

    def prepare(self, start: int, stop: int) -> None:
        """See `model.Logits`."""
        self._start, self._product = start, self._model._output(start, stop, self._weights)

    def compute(self, seqs: slice, rows: slice, start: int, stop: int, out: np.ndarray) -> None:
        """See `model.Logits`."""
        matrix, bias, names = self._product
        part = slice(start - self._start, stop - self._start)
        product = Product(matrix[part], None if bias is None else bias[part], names)
        x = self._hidden[seqs, rows].reshape(-1, self._hidden.shape[2])
        self._model._scores(x, product, out.reshape(len(x), -1))
