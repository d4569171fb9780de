"""The forward pass on a CPU: numpy's BLAS for the products, numba kernels for the rest.

The work is cut by sequence: a thread takes a sequence (or a few short ones) through a whole layer, its matrix products
on one BLAS thread, so threads meet once a layer and never compete. A weight is decoded once for a whole batch of
sequences. Within a sequence, rows are taken in blocks that keep a layer's activations near the processor; blocks do not
depend on the batch or on the number of threads, and neither do the results.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from quantkit.architectures import forward_spec
from quantkit.architectures.forward import (
    Activation,
    Attention,
    FeedForward,
    ForwardSpec,
    Layer,
    Linear,
    Norm,
    NormKind,
    Rope,
    RopeStyle,
)
from quantkit.errors import QuantkitError
from quantkit.evaluate import kernels
from quantkit.evaluate.weights import Weights, available_memory
from quantkit.pipeline.source import TensorSource

# Rows that go through a product together, queries of all heads of a group that meet the keys together, and tokens of
# the vocabulary whose logits stand in memory together. Measured on two cores with 512 KB of second-level cache each.
_ROWS = 512
_SCORE_ROWS = 128
_TILE = 2048
# The output matrix is decoded in slabs of this many weights when it is not kept.
_SLAB_WEIGHTS = 1 << 26


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


def usable_threads() -> int:
    """How many threads this process may run at once."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class _Workspace(threading.local):
    """Arrays that a thread uses again and again, by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A contiguous float32 array of this shape; what it held before is lost."""
        size = math.prod(shape)
        array = self.arrays.get(name)
        if array is None or array.size < size:
            array = self.arrays[name] = np.empty(size, np.float32)
        return array[:size].reshape(shape)


class _Product(NamedTuple):
    """A matrix [n_out, n_in] to multiply with, what is added after, and the tensors that its rows come from."""

    matrix: np.ndarray
    bias: np.ndarray | None
    names: tuple[str, ...]


# Told the names of tensors, and the rows (float32 [rows, n_in]) that they are about to be multiplied with.
Observer = Callable[[tuple[str, ...], np.ndarray], None]


class _LayerWeights:
    """One layer's weights, decoded."""

    def __init__(self, weights: Weights, layer: Layer, n_embd: int) -> None:
        attention, ff = layer.attention, layer.feed_forward
        assert isinstance(ff, FeedForward)
        n_q, n_k = attention.n_head * attention.head_k, attention.n_head_kv * attention.head_k
        n_v = attention.n_head_kv * attention.head_v

        def product(role: str, parts: list[tuple[Linear | None, int]], n_in: int) -> _Product:
            present = [(part, n) for part, n in parts if part is not None]
            matrix = weights.matrix(role, [(part.weight, n) for part, n in present], n_in)
            names = tuple(part.weight for part, _ in present)
            if all(part.bias is None for part, _ in present):
                return _Product(matrix, None, names)
            biases = [
                weights.vector(part.bias, n) if part.bias is not None else np.zeros(n, np.float32)
                for part, n in present
            ]
            return _Product(matrix, np.concatenate(biases), names)

        self.qkv = product(
            "qkv",
            [(attention.qkv, n_q + n_k + n_v), (attention.q, n_q), (attention.k, n_k), (attention.v, n_v)],
            n_embd,
        )
        self.out = product("out", [(attention.out, n_embd)], attention.n_head * attention.head_v)
        self.gate_up = product("gate_up", [(ff.gate_up, 2 * ff.n_ff), (ff.gate, ff.n_ff), (ff.up, ff.n_ff)], n_embd)
        self.down = product("down", [(ff.down, n_embd)], ff.n_ff)


class Transformer:
    """A model that can be run: token ids in, logits or log-likelihoods out, in float32.

    `source` is a GGUF file or a checkpoint. `n_threads` is the number of threads for everything, all usable ones by
    default. `memory` bounds the bytes that decoded weights and activations may take, half of what is available by
    default; weights that fit into half of that are decoded once and kept.

    Raises QuantkitError when the architecture is unknown, or the tensors do not fit the metadata.
    """

    backend = "numpy"
    precision = "float32"
    # Called before each matrix product of the layers, from several threads at once.
    observer: Observer | None = None

    def __init__(self, source: TensorSource, n_threads: int | None = None, memory: int | None = None) -> None:
        self.source = source
        self.spec: ForwardSpec = forward_spec(source.metadata, source.tensors)
        self.n_threads = max(1, usable_threads() if n_threads is None else n_threads)
        self.memory = available_memory() // 2 if memory is None else memory
        self._refuse_unsupported()
        n_weights = sum(info.n_elements for info in source.tensors.values())
        self._keep = n_weights * 4 <= self.memory // 2
        self._weights = Weights(source, self._run, self._keep)
        self._workspace = _Workspace()
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="quantkit-evaluate")
        self._tables: dict[Rope, tuple[np.ndarray, np.ndarray]] = {}

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
            kernels.score_tile(tiles[0], at, targets[seq, rows], maxima[seq, rows], sums[seq, rows], chosen[seq, rows])

        visit_logits([self], tokens, first, tokens.shape[1] - 1, score)
        result: np.ndarray = chosen - maxima - np.log(sums)
        self.refuse_nan(tokens, result)
        return result

    def batch(self, n_ctx: int) -> int:
        """How many sequences of `n_ctx` tokens to run together: many, so that each weight is decoded seldom.

        Bounded by memory; where weights are kept, only as many as keep all threads busy.
        """
        bytes_per_sequence = n_ctx * self.spec.n_embd * 8
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

    def _each(self, task: Callable[[int], None], count: int) -> None:
        """`task(0)` to `task(count - 1)`, side by side where there are enough to fill the threads."""
        if self._side_by_side:
            for _ in self._pool.map(task, range(count)):
                pass
        else:
            for i in range(count):
                task(i)

    # -- the forward pass

    def hidden(self, tokens: np.ndarray, first: int, stop: int, nan_check: bool = False) -> np.ndarray:
        """The last layer's output, normalised, at positions `first` to `stop`: float32 [n_seq, positions, n_embd]."""
        n_seq, n_ctx = tokens.shape
        spec = self.spec
        x = self._weights.lookup(spec.embedding, tokens, spec.n_embd)
        if spec.embedding_scale != 1.0:
            x *= np.float32(spec.embedding_scale)
        if nan_check and np.isnan(x).any():
            raise QuantkitError(f"{self.source.label}: the token embeddings hold NaN")
        n_together = max(1, _ROWS // n_ctx)
        units = [slice(at, min(at + n_together, n_seq)) for at in range(0, n_seq, n_together)]
        last = np.empty((n_seq, stop - first, spec.n_embd), np.float32)
        with self._blas(len(units)):
            for i, layer in enumerate(spec.layers):
                weights = _LayerWeights(self._weights, layer, spec.n_embd)
                norms = self._norm(layer.attention_norm), self._norm(layer.feed_forward_norm)
                tables = self._rope(layer.attention, n_ctx)
                in_place = i + 1 < len(spec.layers)
                span, to = ((0, n_ctx), x) if in_place else ((first, stop), last)

                def step(
                    u: int,
                    layer: Layer = layer,
                    weights: _LayerWeights = weights,
                    norms: tuple[np.ndarray, np.ndarray] = norms,
                    tables: tuple[np.ndarray, np.ndarray] = tables,
                    span: tuple[int, int] = span,
                    to: np.ndarray = to,
                ) -> None:
                    before, after = x[units[u]], to[units[u]]
                    mixed = self._attend(layer, weights, norms[0], tables, before, span)
                    if to is not x:
                        after[:] = before[:, span[0] : span[1]]
                    self._feed_forward(layer, weights, norms[1], mixed, after.reshape(-1, spec.n_embd))

                self._each(step, len(units))
                if nan_check and np.isnan(to).any():
                    raise QuantkitError(
                        f"{self.source.label}: layer {i} (blk.{i}) is the first whose output holds NaN; "
                        "its weights are damaged or out of float32's range"
                    )
            if not spec.layers:
                last[:] = x[:, first:stop]
            norm = self._norm(spec.output_norm)

            def finish(u: int) -> None:
                rows = last[units[u]].reshape(-1, spec.n_embd)
                kernels.rms_norm(rows, norm, spec.output_norm.eps, rows)

            self._each(finish, len(units))
        return last

    def _feed_forward(
        self, layer: Layer, weights: _LayerWeights, norm: np.ndarray, mixed: np.ndarray, x: np.ndarray
    ) -> None:
        """Add both branches of a layer to `x` [rows, n_embd]; `mixed` is the attention's part, before its product."""
        ff = layer.feed_forward
        assert isinstance(ff, FeedForward) and layer.feed_forward_norm is not None
        n_embd = x.shape[1]
        take = self._workspace.take
        for start in range(0, len(x), _ROWS):
            block = x[start : start + _ROWS]
            n = len(block)
            branch, normed = take("branch", n, n_embd), take("normed", n, n_embd)
            self._multiply(mixed[start : start + n], weights.out, branch)
            kernels.add_rms_norm(block, branch, norm, layer.feed_forward_norm.eps, normed)
            gate_up = self._multiply(normed, weights.gate_up, take("gate_up", n, 2 * ff.n_ff))
            active = take("active", n, ff.n_ff)
            kernels.silu_gate(gate_up, active)
            self._multiply(active, weights.down, branch)
            kernels.add(block, branch)

    def _attend(
        self,
        layer: Layer,
        weights: _LayerWeights,
        norm: np.ndarray,
        tables: tuple[np.ndarray, np.ndarray],
        x: np.ndarray,
        span: tuple[int, int],
    ) -> np.ndarray:
        """Attention of each sequence of `x`, before its output product: [n_seq * positions, heads * head size]."""
        attention = layer.attention
        assert layer.attention_norm is not None
        n_seq, n_ctx, n_embd = x.shape
        groups, head_k, head_v = attention.n_head_kv, attention.head_k, attention.head_v
        heads = attention.n_head // groups
        n_q, n_k = attention.n_head * head_k, groups * head_k
        neighbours = attention.rope is not None and attention.rope.style is RopeStyle.NORMAL
        still, one = np.ascontiguousarray(tables[0][:, :0]), np.float32(1.0)
        take = self._workspace.take
        q, k = take("q", n_seq, groups, n_ctx, heads, head_k), take("k", n_seq, groups, n_ctx, 1, head_k)
        v = take("v", n_seq, groups, n_ctx, 1, head_v)
        rows = x.reshape(-1, n_embd)
        step = _ROWS if n_ctx >= _ROWS else len(rows)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            normed = take("normed", len(block), n_embd)
            kernels.rms_norm(block, norm, layer.attention_norm.eps, normed)
            qkv = self._multiply(normed, weights.qkv, take("qkv", len(block), len(weights.qkv.matrix)))
            done = 0
            while done < len(block):
                seq, position = divmod(start + done, n_ctx)
                n = min(len(block) - done, n_ctx - position)
                part = qkv[done : done + n]
                kernels.split_heads(part, 0, *tables, position, neighbours, np.float32(attention.scale), q[seq])
                kernels.split_heads(part, n_q, *tables, position, neighbours, one, k[seq])
                kernels.split_heads(part, n_q + n_k, still, still, position, neighbours, one, v[seq])
                done += n
        first, stop = span
        window = n_ctx if attention.window is None else attention.window
        n_queries = max(1, _SCORE_ROWS // heads)
        mixed = take("mixed", n_seq, stop - first, attention.n_head * head_v)
        for seq in range(n_seq):
            for group in range(groups):
                for start in range(first, stop, n_queries):
                    end = min(start + n_queries, stop)
                    key = max(0, start - window + 1)
                    n_rows = (end - start) * heads
                    scores, sums = take("scores", n_rows, end - key), take("sums", n_rows)
                    np.matmul(q[seq, group, start:end].reshape(n_rows, head_k), k[seq, group, key:end, 0].T, out=scores)
                    kernels.causal_softmax(scores, heads, start, key, window, sums)
                    values = take("values", n_rows, head_v)
                    np.matmul(scores, v[seq, group, key:end, 0], out=values)
                    kernels.merge_heads(values, sums, mixed[seq, start - first : end - first], group * heads * head_v)
        return mixed.reshape(-1, attention.n_head * head_v)

    def _multiply(self, x: np.ndarray, product: _Product, out: np.ndarray) -> np.ndarray:
        """`out = x @ matrix.T + bias`."""
        if self.observer is not None:
            self.observer(product.names, x)
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            kernels.add_bias(out, product.bias)
        return out

    def _output(self, start: int, stop: int) -> _Product:
        """The output product of tokens `start` to `stop`."""
        spec = self.spec
        bias = None if spec.output.bias is None else self._weights.vector(spec.output.bias, spec.n_vocab)[start:stop]
        slab = self._weights.slab(spec.output.weight, spec.n_vocab, spec.n_embd, start, stop)
        return _Product(slab, bias, (spec.output.weight,))

    def _logits(self, x: np.ndarray, product: _Product, out: np.ndarray) -> np.ndarray:
        """Logits of rows of normalised `x` for the tokens of `product`, a part of `_output`."""
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            kernels.add_bias(out, product.bias)
        if self.spec.logit_scale != 1.0:
            out *= np.float32(self.spec.logit_scale)
        return out

    # -- small things

    def _norm(self, norm: Norm | None) -> np.ndarray:
        assert norm is not None
        return self._weights.vector(norm.weight, self.spec.n_embd)

    def _rope(self, attention: Attention, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines for `n_ctx` positions, without columns when the layer does not rotate."""
        rope = attention.rope
        if rope is None:
            return np.empty((n_ctx, 0), np.float32), np.empty((n_ctx, 0), np.float32)
        if rope not in self._tables or len(self._tables[rope][0]) < n_ctx:
            factors = None if rope.factors is None else self._weights.vector(rope.factors, rope.n_dims // 2)
            self._tables[rope] = rope_tables(rope, n_ctx, factors)
        return self._tables[rope]

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

    def _refuse_unsupported(self) -> None:
        """Raise QuantkitError for what this backend does not compute yet, and for sizes that cannot be."""
        spec, label = self.spec, self.source.label
        missing = []
        if spec.position_embedding is not None:
            missing.append("learned positions")
        if spec.logit_softcap is not None:
            missing.append("soft-capped logits")
        for layer in spec.layers:
            attention, ff = layer.attention, layer.feed_forward
            norms = (layer.attention_norm, layer.feed_forward_norm, spec.output_norm)
            checks = {
                "experts": not isinstance(ff, FeedForward),
                "a feed-forward block without a gate": isinstance(ff, FeedForward) and not (ff.gate or ff.gate_up),
                "an activation other than SiLU": ff.activation is not Activation.SILU,
                "soft-capped scores": attention.softcap is not None,
                "norms of queries and keys": bool(attention.q_norm or attention.k_norm),
                "norms after a branch": bool(layer.post_attention_norm or layer.post_feed_forward_norm),
                "norms other than RMS": any(
                    norm is None or norm.bias or norm.kind is not NormKind.RMS for norm in norms
                ),
                "parallel branches": layer.parallel,
                "scaled branches": layer.branch_scale != 1.0,
            }
            missing += [what for what, present in checks.items() if present and what not in missing]
            sizes = attention.n_head, attention.n_head_kv, attention.head_k, attention.head_v, ff.n_ff
            if min(sizes) < 1 or attention.n_head % attention.n_head_kv:
                raise QuantkitError(
                    f"{label}: impossible sizes: {attention.n_head} heads of {attention.head_k}, "
                    f"{attention.n_head_kv} for keys and values of {attention.head_v}, {ff.n_ff} in the feed-forward "
                    "block"
                )
            if attention.rope is not None and not 0 <= attention.rope.n_dims <= attention.head_k:
                raise QuantkitError(
                    f"{label}: {attention.rope.n_dims} rotated dimensions in heads of {attention.head_k}"
                )
        if missing:
            raise QuantkitError(f"{label}: the forward pass does not know {', '.join(missing)} yet")


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

            def compute(seq: int, start: int = start, slabs: list[_Product] = slabs) -> None:
                for row in range(0, n_rows, _ROWS):
                    rows = slice(row, min(row + _ROWS, n_rows))
                    for at in range(0, len(slabs[0].matrix), _TILE):
                        tiles = []
                        for i, (model, slab) in enumerate(zip(models, slabs, strict=True)):
                            bias = None if slab.bias is None else slab.bias[at : at + _TILE]
                            part = _Product(slab.matrix[at : at + _TILE], bias, slab.names)
                            out = take(f"tile {i}", rows.stop - row, len(part.matrix))
                            tiles.append(model._logits(hidden[i][seq, rows], part, out))
                        visit(seq, rows, start + at, tiles)

            lead._each(compute, n_seq)
