"""The forward pass on a CPU: numpy's BLAS for the products, numba kernels for the rest.

The work is cut by sequence: a thread takes a sequence (or a few short ones) through a whole layer, its matrix products
on one BLAS thread, so threads meet once a layer and never compete. A weight is decoded once for a whole batch of
sequences. Within a sequence, rows are taken in blocks that keep a layer's activations near the processor; blocks do not
depend on the batch or on the number of threads, and neither do the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from quantkit.architectures import forward_spec
from quantkit.architectures.forward import Attention, Experts, ForwardSpec, Layer, Norm, NormKind, Rope
from quantkit.errors import QuantkitError
from quantkit.evaluate import forward_kernels
from quantkit.evaluate.inputs import InputSums
from quantkit.evaluate.layers import ROWS, Expert, LayerRunner, Observer, Product, Routed, Workspace, unsupported
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.weights import Weights
from quantkit.machine import available_memory, default_threads, peak_memory
from quantkit.sources.source import TensorSource

_T = TypeVar("_T")

# Tokens of the vocabulary whose logits stand in memory together.
_TILE = 2048
# Heads are not larger than this, which bounds the tables of rotary embeddings.
_LARGEST_HEAD = 1 << 16
# The output matrix is decoded in slabs of this many weights when it is not kept.
_SLAB_WEIGHTS = 1 << 26
_DEFAULT = Compute()


def rope_tables(rope: Rope, n_positions: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of a rotary embedding, times its magnitude: float32 [n_positions, n_dims / 2] each."""
    pair = np.arange(rope.n_dims // 2)
    frequency = rope.freq_base ** (-2.0 * pair / rope.n_dims)
    if factors is not None:
        frequency = frequency / factors
    slow = frequency * rope.freq_scale
    if rope.yarn is not None:
        yarn = rope.yarn

        def dimension(turns: float) -> float:
            """The pair, counted in dimensions, that makes this many turns over the original context."""
            return rope.n_dims * math.log(rope.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(rope.freq_base))

        low = max(0.0, math.floor(dimension(yarn.beta_fast)))
        high = min(rope.n_dims - 1.0, math.ceil(dimension(yarn.beta_slow)))
        ramp = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
        slow = slow + (frequency - slow) * ramp * yarn.ext_factor
    angle = np.arange(n_positions)[:, None] * slow
    return (np.cos(angle) * rope.magnitude).astype(np.float32), (np.sin(angle) * rope.magnitude).astype(np.float32)


def refuse_unsupported(spec: ForwardSpec, label: str) -> None:
    """Raise QuantkitError for what no backend computes, and for sizes that cannot be."""
    for layer in spec.layers:
        attention, ff = layer.attention, layer.feed_forward
        sizes = attention.n_head, attention.n_head_kv, attention.head_k, attention.head_v, ff.n_ff
        if (
            min(sizes) < 1
            or attention.n_head % attention.n_head_kv
            or max(attention.head_k, attention.head_v) > _LARGEST_HEAD
        ):
            raise QuantkitError(
                f"{label}: impossible sizes: {attention.n_head} heads of {attention.head_k}, "
                f"{attention.n_head_kv} for keys and values of {attention.head_v}, {ff.n_ff} in the feed-forward "
                "block"
            )
        rope = attention.rope
        if rope is not None and not (0 <= rope.n_dims <= attention.head_k and rope.n_dims % 2 == 0):
            raise QuantkitError(f"{label}: {rope.n_dims} rotated dimensions in heads of {attention.head_k}")
        if rope is not None and not rope.freq_base > 0:
            raise QuantkitError(f"{label}: a rotary base of {rope.freq_base}")
        yarn = None if rope is None else rope.yarn
        if (
            rope is not None
            and yarn is not None
            and not (rope.freq_base > 1 and min(yarn.beta_fast, yarn.beta_slow) > 0)
        ):
            raise QuantkitError(
                f"{label}: YaRN with a rotary base of {rope.freq_base}, from {yarn.beta_slow} to {yarn.beta_fast} turns"
            )
        for what in unsupported(layer):
            raise QuantkitError(f"{label}: the forward pass does not know {what}")
    if spec.logit_softcap is not None and not spec.logit_softcap > 0:
        raise QuantkitError(f"{label}: logits capped at {spec.logit_softcap}")


class Transformer:
    """A model that can be run: token ids in, logits or log-likelihoods out, in float32.

    `source` is a GGUF file or a checkpoint. `compute` bounds the threads and the bytes that decoded weights and
    activations may take; weights that fit into half of these are decoded once and kept, unless `keep` says otherwise.
    `observer` is told of each matrix product of the layers.

    Raises QuantkitError when the architecture is unknown, or the tensors do not fit the metadata.
    """

    backend = "numpy"
    precision = "float32"
    observer: Observer | None = None

    def __init__(self, source: TensorSource, compute: Compute = _DEFAULT, keep: bool | None = None) -> None:
        self.source = source
        self.spec: ForwardSpec = forward_spec(source.metadata, source.tensors)
        self.n_threads = compute.threads or default_threads()
        self.memory = available_memory() // 2 if compute.memory is None else compute.memory
        refuse_unsupported(self.spec, source.label)
        n_weights = sum(info.n_elements for info in source.tensors.values())
        self._keep = n_weights * 4 <= self.memory // 2 if keep is None else keep
        self._weights = Weights(source, self._run, self._keep)
        self._workspace = Workspace()
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="quantkit-evaluate")
        self._tables: dict[tuple[Rope, str | None], tuple[np.ndarray, np.ndarray]] = {}

    # -- what callers ask for

    def logits(self, tokens: np.ndarray, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Logits at positions `first` to `stop` of each sequence.

        `tokens` is int32 [n_seq, n_ctx]; the result float32 [n_seq, positions, n_vocab].
        """
        stop = tokens.shape[1] if stop is None else stop
        out = np.empty((len(tokens), stop - first, self.spec.n_vocab), np.float32)

        def keep(seq: int, rows: slice, at: int, tiles: list[np.ndarray]) -> None:
            out[seq, rows, at : at + tiles[0].shape[1]] = tiles[0]

        visit_logits([self], tokens, first, stop, keep)
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
            forward_kernels.score_tile(
                tiles[0], at, targets[seq, rows], maxima[seq, rows], sums[seq, rows], chosen[seq, rows]
            )

        visit_logits([self], tokens, first, tokens.shape[1] - 1, score)
        result: np.ndarray = chosen - maxima - np.log(sums)
        self.refuse_nan(tokens, result)
        return result

    def peak_memory(self) -> int | None:
        """The most memory, in bytes, that this process has taken until now, or None."""
        return peak_memory()

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together: many, so that each weight is decoded seldom.

        Bounded by memory; where weights are kept, only as many as keep all threads busy.
        """
        copies = 4 if any(isinstance(layer.feed_forward, Experts) for layer in self.spec.layers) else 2
        bytes_per_sequence = n_ctx * self.spec.n_embd * 4 * copies
        wanted = -(-4096 // n_ctx) if self._keep else -(-32768 // n_ctx)
        wanted = -(-wanted // self.n_threads) * self.n_threads
        return max(1, min(wanted, self.memory // 4 // bytes_per_sequence))

    # -- threads

    @cached_property
    def _controller(self) -> ThreadpoolController:
        return ThreadpoolController()

    def _blas(self, n_tasks: int) -> AbstractContextManager[Any]:
        """BLAS's share of the threads while `n_tasks` tasks run: one each if these fill the threads, else all."""
        self._side_by_side = n_tasks >= self.n_threads > 1
        limits: AbstractContextManager[Any] = self._controller.limit(
            limits=1 if self._side_by_side else self.n_threads, user_api="blas"
        )
        return limits

    def _run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Carry out tasks on the pool and wait for all; the first exception is raised here."""
        for future in [self._pool.submit(task) for task in tasks]:
            future.result()

    def pooled(self, task: Callable[[int], _T], items: Iterable[int]) -> Iterator[_T]:
        """The results of `task` on each item, worked out side by side on the threads."""
        return self._pool.map(task, items)

    def _each(self, task: Callable[[int], None], count: int) -> None:
        """`task(0)` to `task(count - 1)`, side by side where there are enough to fill the threads."""
        (self._together if self._side_by_side else self._one_by_one)(task, count)

    def _within(self, task: Callable[[int], None], count: int) -> None:
        """The same for tasks within one of the tasks of `_each`: side by side where that leaves threads idle."""
        (self._one_by_one if self._side_by_side or self.n_threads == 1 else self._together)(task, count)

    def _alone(self, task: Callable[[int], None], count: int) -> None:
        """`task(0)` to `task(count - 1)` side by side, each with one BLAS thread: the same however many threads."""
        with self._controller.limit(limits=1, user_api="blas"):
            self._together(task, count)

    def _together(self, task: Callable[[int], None], count: int) -> None:
        for _ in self._pool.map(task, range(count)):
            pass

    def _one_by_one(self, task: Callable[[int], None], count: int) -> None:
        for i in range(count):
            task(i)

    # -- the forward pass

    def hidden(self, tokens: np.ndarray, first: int, stop: int, nan_check: bool = False) -> np.ndarray:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        n_seq, n_ctx = tokens.shape
        spec = self.spec
        x = self.embedded(tokens)
        if nan_check and np.isnan(x).any():
            raise QuantkitError(f"{self.source.label}: the embeddings hold NaN")
        units = self._units(n_seq, n_ctx)
        last = np.empty((n_seq, stop - first, spec.n_embd), np.float32)
        with self._blas(len(units)):
            for i, layer in enumerate(spec.layers):
                tables = self._rope(layer.attention, n_ctx)
                runner = self.runner(layer, tables)
                in_place = i + 1 < len(spec.layers)
                span, to = ((0, n_ctx), x) if in_place else ((first, stop), last)
                self._run_layer(runner, x, units, span, to)
                if nan_check and np.isnan(to).any():
                    raise QuantkitError(
                        f"{self.source.label}: layer {i} (blk.{i}) is the first whose output holds NaN; "
                        "its weights are damaged or out of float32's range"
                    )
            if not spec.layers:
                last[:] = x[:, first:stop]
            self._each(lambda u: self._normalise(spec.output_norm, last[units[u]]), len(units))
        return last

    def layer_pass(self, index: int, n_ctx: int) -> Callable[[np.ndarray], None]:
        """Layer `index`, decoded, as a function that carries activations [n_seq, n_ctx, n_embd] through it in place.

        Valid until the next call. `embedded`, this for each layer, and `normed` are `hidden` for a caller that takes
        all its text through one layer before the next.
        """
        layer = self.spec.layers[index]
        runner = self.runner(layer, self._rope(layer.attention, n_ctx))

        def advance(x: np.ndarray) -> None:
            units = self._units(len(x), n_ctx)
            # Never several BLAS threads for one product: the last bits could depend on their number.
            with self._blas(max(len(units), self.n_threads)):
                self._run_layer(runner, x, units, (0, n_ctx), x)

        return advance

    def normed(self, x: np.ndarray) -> np.ndarray:
        """What the output matrix is multiplied with, from the last layer's output `x` [any, n_ctx, n_embd]: a copy."""
        result = np.array(x, np.float32, order="C")
        self._normalise(self.spec.output_norm, result)
        return result

    def input_sums(self, full: bool, wanted: Container[str] | None = None) -> InputSums:
        """Sums over what the matrices are multiplied with from now on, see `InputSums`."""
        sums = InputSums(full, self._alone, wanted)
        self.observer = sums.observe
        return sums

    @staticmethod
    def _units(n_seq: int, n_ctx: int) -> list[slice]:
        """The sequences that a thread takes at a time."""
        n_together = max(1, ROWS // n_ctx)
        return [slice(at, min(at + n_together, n_seq)) for at in range(0, n_seq, n_together)]

    def runner(self, layer: Layer, tables: tuple[np.ndarray, np.ndarray]) -> LayerRunner:
        """`layer`, ready to run with these cosines and sines."""
        return LayerRunner(layer, self.spec.n_embd, self._weights, tables, self._workspace, self.observer, self._within)

    def embedded(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """What the first layer reads for `tokens` [n_seq, n], at positions from `start`: float32 [n_seq, n, n_embd]."""
        spec, stop = self.spec, start + tokens.shape[1]
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
            x += self._weights.lookup(spec.position_embedding, np.arange(start, stop), spec.n_embd)
        return x

    def _run_layer(
        self, runner: LayerRunner, x: np.ndarray, units: list[slice], span: tuple[int, int], to: np.ndarray
    ) -> None:
        """Carry `x` [n_seq, n_ctx, n_embd] through a layer into `to`, which is `x` or holds the positions of `span`."""
        n_embd, n_positions = x.shape[2], span[1] - span[0]
        routed = Routed.of(runner.layer, to.shape[0] * n_positions, n_embd)
        cuts = [(unit.start * n_positions, unit.stop * n_positions) for unit in units]
        shares = [] if routed is None else [routed.part(*cut) for cut in cuts]
        rows = to.reshape(-1, n_embd)

        def step(u: int) -> None:
            mixed = runner.attend(x[units[u]], span, units[u].start * x.shape[1])
            if to is not x:
                to[units[u]] = x[units[u], span[0] : span[1]]
            runner.finish(mixed, rows[slice(*cuts[u])], shares[u] if shares else None, cuts[u][0])

        self._each(step, len(units))
        if shares:
            for expert in runner.experts():

                def run_expert(u: int, expert: Expert = expert) -> None:
                    runner.expert(expert, shares[u], cuts[u][0])

                self._each(run_expert, len(units))
            self._each(lambda u: runner.close(rows[slice(*cuts[u])], shares[u]), len(units))

    def _output(self, start: int, stop: int) -> Product:
        """The output product of tokens `start` to `stop`."""
        spec = self.spec
        bias = None if spec.output.bias is None else self._weights.vector(spec.output.bias, spec.n_vocab)[start:stop]
        slab = self._weights.slab("output", spec.output.weight, spec.n_vocab, spec.n_embd, start, stop)
        return Product(slab, bias, (spec.output.weight,))

    def _logits(self, x: np.ndarray, product: Product, out: np.ndarray) -> np.ndarray:
        """Logits of rows of normalised `x` for the tokens of `product`, a part of `_output`."""
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            forward_kernels.add_bias(out, product.bias)
        if self.spec.logit_scale != 1.0:
            out *= np.float32(self.spec.logit_scale)
        if self.spec.logit_softcap is not None:
            forward_kernels.soft_cap(out, np.float32(self.spec.logit_softcap))
        return out

    # -- small things

    def _normalise(self, norm: Norm, x: np.ndarray) -> None:
        """Normalise `x` [any, any, n_embd] in place."""
        rows = x.reshape(-1, self.spec.n_embd)
        weight = self._weights.vector(norm.weight, self.spec.n_embd)
        if norm.kind is NormKind.RMS:
            forward_kernels.rms_norm(rows, weight, norm.eps, rows)
        else:
            bias = np.zeros_like(weight) if norm.bias is None else self._weights.vector(norm.bias, self.spec.n_embd)
            forward_kernels.layer_norm(rows, weight, bias, norm.eps, rows)

    def _rope(self, attention: Attention, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines for `n_ctx` positions, without columns when the layer does not rotate."""
        rope = attention.rope
        if rope is None:
            return np.empty((n_ctx, 0), np.float32), np.empty((n_ctx, 0), np.float32)
        name = rope.long_factors if n_ctx > rope.n_ctx_orig else rope.factors
        name = rope.factors if rope.long_factors is None else name
        key = rope, name
        if key not in self._tables or len(self._tables[key][0]) < n_ctx:
            factors = None if name is None else self._weights.vector(name, rope.n_dims // 2)
            self._tables[key] = rope_tables(rope, n_ctx, factors)
        return self._tables[key]

    def refuse_nan(self, tokens: np.ndarray, result: np.ndarray) -> None:
        """Check `result` [n_seq, any], which came of `tokens` [n_seq, n_ctx].

        Raises QuantkitError, which names the first layer that made a NaN, if it holds one.
        """
        bad = np.flatnonzero(np.isnan(result).any(axis=1))
        if bad.size:
            self.hidden(tokens[bad[:1]], 0, tokens.shape[1], nan_check=True)
            raise QuantkitError(
                f"{self.source.label}: the logits are NaN though no layer's output is: "
                f"{self.spec.output_norm.weight} or {self.spec.output.weight} is damaged"
            )


def visit_logits(
    models: Sequence[Transformer],
    tokens: np.ndarray,
    first: int,
    stop: int,
    visit: Callable[[int, slice, int, list[np.ndarray]], None],
) -> None:
    """Show the logits at positions `first` to `stop` of each sequence, of models with one vocabulary, tile by tile.

    `tokens` is int32 [n_seq, n_ctx]. `visit(sequence, rows, token, tiles)` gets each model's logits of some positions
    (`rows` counts from `first`) for the tokens from `token` on: float32 [rows, tokens], its own to change. It is called
    on several threads, which share the work by sequence; the tiles of a position come in the order of the tokens.
    """
    lead = models[0]
    hidden = [model.hidden(tokens, first, stop) for model in models]
    n_seq, n_rows, n_vocab = len(tokens), stop - first, lead.spec.n_vocab
    step = min(n_vocab if model._keep else max(1, _SLAB_WEIGHTS // model.spec.n_embd) for model in models)
    take = lead._workspace.take
    with lead._blas(n_seq):
        for start in range(0, n_vocab, step):
            slabs = [model._output(start, min(start + step, n_vocab)) for model in models]

            def compute(seq: int, start: int = start, slabs: list[Product] = slabs) -> None:
                for row in range(0, n_rows, ROWS):
                    rows = slice(row, min(row + ROWS, n_rows))
                    for at in range(0, len(slabs[0].matrix), _TILE):
                        tiles = []
                        for i, (model, slab) in enumerate(zip(models, slabs, strict=True)):
                            bias = None if slab.bias is None else slab.bias[at : at + _TILE]
                            part = Product(slab.matrix[at : at + _TILE], bias, slab.names)
                            out = take(f"tile {i}", rows.stop - row, len(part.matrix))
                            tiles.append(model._logits(hidden[i][seq, rows], part, out))
                        visit(seq, rows, start + at, tiles)

            lead._each(compute, n_seq)
