"""One layer of a transformer as its description asks for it: attention, and a dense block or experts.

A layer is run by several threads, each on its own sequences. The rows of a sequence are taken in blocks that keep
activations near the processor; blocks do not depend on the batch or on the number of threads, and neither do the
results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from quantkit.architectures.forward import (
    XIELU,
    Activation,
    Attention,
    Experts,
    FeedForward,
    Gating,
    Layer,
    Linear,
    Norm,
    NormKind,
    RopeStyle,
    Temperature,
)
from quantkit.evaluate import forward_kernels
from quantkit.evaluate.threads import Each, Workspace
from quantkit.evaluate.weights import Weights

# Rows that go through a product together. BLAS rearranges the whole matrix for every product, which is worth it from
# so many rows on: products of 512 rows take 3 to 6% longer.
ROWS = 1024
# The widest product of that many rows may take this many numbers (64 MB); of wider ones fewer rows go together.
_WIDEST = 1 << 24

# What activations exist, with a gate and without: kernels from [rows, n_ff or twice that] to [rows, n_ff].
_GATED = {
    Activation.SILU: forward_kernels.silu_gate,
    Activation.GELU: forward_kernels.gelu_gate,
    Activation.CLAMPED_SILU: forward_kernels.clamped_silu_gate,
}
_PLAIN = {Activation.GELU: forward_kernels.gelu, Activation.RELU_SQUARED: forward_kernels.relu_squared}
_GATING = {
    Gating.SOFTMAX: forward_kernels.SOFTMAX,
    Gating.SIGMOID: forward_kernels.SIGMOID,
    Gating.CHOSEN: forward_kernels.CHOSEN,
}
_NO_BIAS = np.empty(0, np.float32)
_NO_DISTANCES = np.empty((0, 0), np.float32)


class Product(NamedTuple):
    """A matrix [n_out, n_in] to multiply with, what is added after, and the tensors that its rows come from."""

    matrix: np.ndarray
    bias: np.ndarray | None
    names: tuple[str, ...]


# Told of what is multiplied, from several threads at once: the names of tensors that share an input, some rows of it
# (float32 [rows, n_in], valid during the call; of the backend's own kind), which row of the batch the first of them
# is, and the expert that multiplies them, None for tensors without experts. Rows come in the same parts whatever the
# number of threads, but in any order: `evaluate.inputs` sums them up by their place.
Observer = Callable[[tuple[str, ...], Any, int, "int | None"], None]


def temperatures(temperature: Temperature, positions: np.ndarray) -> np.ndarray:
    """What queries at these positions are multiplied with: float32 [positions, 1]."""
    grown = 1.0 + temperature.scale * np.log((positions + temperature.offset) // temperature.step + 1.0)
    return grown.astype(np.float32)[:, None]


@lru_cache(maxsize=2)
def _falling(steepest: float, n_head: int, n_positions: int) -> np.ndarray:
    """What ALiBi adds to scores by the distance from query to key: float32 [n_head, 2 * n_positions - 1]."""
    whole = 1 << (n_head.bit_length() - 1)
    powers = [steepest * (h + 1) / whole if h < whole else steepest / 2 * (2 * (h - whole) + 1) / whole
              for h in range(n_head)]  # fmt: skip
    distance = np.abs(np.arange(1 - n_positions, n_positions))
    falling: np.ndarray = -np.exp2(-np.array(powers))[:, None] * distance
    return falling.astype(np.float32)


Activate = Callable[[np.ndarray, np.ndarray], None]


def _activate(block: FeedForward | Experts) -> Activate | None:
    """What `block` does between its products: from [rows, n_ff or twice that] to [rows, n_ff]; None if not known."""
    if isinstance(block.activation, XIELU):
        return None if _gated(block) else _xielu(block.activation)
    return (_GATED if _gated(block) else _PLAIN).get(block.activation)


def _xielu(learned: XIELU) -> Activate:
    positive, negative = (math.log1p(math.exp(-abs(a))) + max(a, 0.0) for a in (learned.alpha_p, learned.alpha_n))
    above, below = np.float32(positive), np.float32(learned.beta + negative)
    beta, eps = np.float32(learned.beta), np.float32(learned.eps)

    def activate(x: np.ndarray, out: np.ndarray) -> None:
        forward_kernels.xielu(x, above, below, beta, eps, out)

    return activate


def _gated(block: FeedForward | Experts) -> bool:
    return bool(block.gate or (isinstance(block, FeedForward) and block.gate_up))


def unsupported(layer: Layer) -> Iterable[str]:
    """What of `layer` cannot be computed, each in a few words."""
    attention, ff = layer.attention, layer.feed_forward
    for block in (ff, ff.shared) if isinstance(ff, Experts) else (ff,):
        if block is None:
            continue
        if _activate(block) is None:
            name = "xIELU" if isinstance(block.activation, XIELU) else block.activation.name
            yield f"{name} {'with' if _gated(block) else 'without'} a gate"
        if isinstance(block, FeedForward) and block.gate is not None and block.up is None:
            yield "a gate alone"
    if isinstance(ff, Experts) and (
        ff.n_groups < 1 or ff.n_expert % ff.n_groups or not 0 < ff.n_groups_used <= ff.n_groups
        or ff.n_used > ff.n_expert // ff.n_groups * ff.n_groups_used
    ):  # fmt: skip
        yield f"{ff.n_used} experts from {ff.n_groups_used} of {ff.n_groups} groups of {ff.n_expert} experts"
    if attention.window is not None and attention.window < 1:
        yield f"a window of {attention.window} positions"
    if attention.temperature is not None and not 0 < attention.temperature.step < 1 << 62:
        yield f"queries that grow every {attention.temperature.step} positions"
    if attention.softcap is not None and not attention.softcap > 0:
        yield f"scores capped at {attention.softcap}"
    kinds = (attention.q_norm, attention.k_norm)
    if any(norm is not None and norm.kind is not NormKind.RMS for norm in kinds):
        yield "LayerNorms of queries and keys"
    if attention.norm_rotated and attention.norm_whole:
        yield "norms of whole queries and keys after rotation"
    if attention.chunk is not None and attention.chunk < 1:
        yield f"chunks of {attention.chunk} positions"
    if attention.chunk is not None and not attention.causal:
        yield "chunks of positions where attention is not causal"
    if attention.clamp is not None and not attention.clamp > 0:
        yield f"queries, keys and values clamped at {attention.clamp}"


def _rows_together(widest: int) -> int:
    """How many rows go through a layer's products together, of which the widest has this many columns."""
    rows = ROWS
    while rows > 1 and rows * widest > _WIDEST:
        rows //= 2
    return rows


class Expert(NamedTuple):
    """One expert of a layer: its number and its products."""

    number: int
    gate: Product | None
    up: Product
    down: Product


class Routed(NamedTuple):
    """Rows on their way through experts, each [rows, any].

    `normed` is what the experts read, `branch` the sum of what they make of it, `chosen` (int32) the experts of each
    row and `shares` their weights.
    """

    normed: np.ndarray
    branch: np.ndarray
    chosen: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, layer: Layer, n_rows: int, n_embd: int) -> Routed | None:
        """Space for `n_rows` rows, or None where `layer` has no experts."""
        ff = layer.feed_forward
        if not isinstance(ff, Experts):
            return None
        return cls(
            np.empty((n_rows, n_embd), np.float32),
            np.zeros((n_rows, n_embd), np.float32),
            np.empty((n_rows, ff.n_used), np.int32),
            np.empty((n_rows, ff.n_used), np.float32),
        )

    def part(self, start: int, stop: int) -> Routed:
        """Rows `start` to `stop`, sharing memory."""
        return Routed(*(array[start:stop] for array in self))


class LayerRunner:
    """A layer with its weights decoded, ready to run on parts of a batch from several threads.

    `tables` are the cosines and sines of its rotary embedding for the rows of a sequence, [rows, pairs] each, without
    columns where it has none. `observer` is told of each matrix product.

    The order: `attend`, then `finish` for each part; where the layer has experts, all parts meet then, and `expert`
    runs for each part and each of `experts`, then `close` for each part.
    """

    def __init__(
        self,
        layer: Layer,
        n_embd: int,
        weights: Weights,
        tables: tuple[np.ndarray, np.ndarray],
        workspace: Workspace,
        observer: Observer | None,
    ) -> None:
        """Decode the layer's weights, but those of its experts."""
        self.layer, self.n_embd = layer, n_embd
        self._weights, self._tables, self._take = weights, tables, workspace.take
        self._observer = observer
        attention, ff = layer.attention, layer.feed_forward
        n_q, n_k = attention.n_head * attention.head_k, attention.n_head_kv * attention.head_k
        n_v = attention.n_head_kv * attention.head_v
        self._rows = _rows_together(max(n_q + n_k + n_v, 2 * ff.n_ff))
        self._norms = {
            norm: (
                np.ones(size, np.float32) if norm.weight is None else weights.vector(norm.weight, size),
                None if norm.bias is None else weights.vector(norm.bias, size),
            )
            for norm, size in self._sizes(layer, n_q, n_k)
        }
        self._qkv = self._product(
            "qkv",
            [(attention.qkv, n_q + n_k + n_v), (attention.q, n_q), (attention.k, n_k), (attention.v, n_v)],
            n_embd,
        )
        self._out = self._product("out", [(attention.out, n_embd)], attention.n_head * attention.head_v)
        self._sinks = _NO_BIAS if attention.sinks is None else weights.vector(attention.sinks, attention.n_head)
        dense = ff if isinstance(ff, FeedForward) else ff.shared
        if dense is not None:
            n_ff = dense.n_ff
            self._up = self._product("up", [(dense.gate_up, 2 * n_ff), (dense.gate, n_ff), (dense.up, n_ff)], n_embd)
            self._down = self._product("down", [(dense.down, n_embd)], n_ff)
            self._activate = _activate(dense)
        if isinstance(ff, Experts):
            self._router = self._product("router", [(ff.router, ff.n_expert)], n_embd)
            self._activate_expert = _activate(ff)
            self._selection_bias = (
                _NO_BIAS if ff.selection_bias is None else weights.vector(ff.selection_bias, ff.n_expert)
            )
            if ff.shared_gate is not None:
                self._shared_gate = self._product("shared gate", [(ff.shared_gate, 1)], n_embd)

    def _sizes(self, layer: Layer, n_q: int, n_k: int) -> Iterable[tuple[Norm, int]]:
        attention = layer.attention
        for norm in (
            layer.attention_norm, layer.feed_forward_norm, layer.post_attention_norm, layer.post_feed_forward_norm,
            layer.out_attention_norm, layer.out_feed_forward_norm,
        ):  # fmt: skip
            if norm is not None:
                yield norm, self.n_embd
        for norm, whole in ((attention.q_norm, n_q), (attention.k_norm, n_k)):
            if norm is not None:
                yield norm, whole if attention.norm_whole else attention.head_k

    def _product(self, role: str, parts: list[tuple[Linear | None, int]], n_in: int) -> Product:
        present = [(part, n) for part, n in parts if part is not None]
        matrix = self._weights.matrix(role, [(part.weight, n) for part, n in present], n_in)
        names = tuple(part.weight for part, _ in present)
        if all(part.bias is None for part, _ in present):
            return Product(matrix, None, names)
        biases = [
            self._weights.vector(part.bias, n) if part.bias is not None else np.zeros(n, np.float32)
            for part, n in present
        ]
        return Product(matrix, np.concatenate(biases), names)

    def _observe(self, names: tuple[str, ...], x: np.ndarray, at: int, expert: int | None = None) -> None:
        if self._observer is not None:
            self._observer(names, x, at, expert)

    def _multiply(self, x: np.ndarray, product: Product, out: np.ndarray, at: int) -> np.ndarray:
        """`out = x @ matrix.T + bias`; the first row of `x` is row `at` of the batch."""
        self._observe(product.names, x, at)
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            forward_kernels.add_bias(out, product.bias)
        return out

    def _normed(self, norm: Norm | None, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The rows of `x` normalised into `out`, which may be `x`; `x` itself where there is no norm."""
        if norm is None:
            return x
        weight, bias = self._norms[norm]
        if norm.kind is NormKind.RMS:
            forward_kernels.rms_norm(x, weight, norm.eps, out)
        else:
            forward_kernels.layer_norm(x, weight, np.zeros_like(weight) if bias is None else bias, norm.eps, out)
        return out

    # Attention

    def attend(self, x: np.ndarray, span: tuple[int, int], each: Each, at: int = 0) -> np.ndarray:
        """Attention of each sequence of `x` [n_seq, n_ctx, n_embd] at positions span[0] to span[1].

        Before its output product: [n_seq * positions, heads * head size]. `each` runs the groups of heads. The first
        row of `x` is row `at` of the batch.
        """
        attention = self.layer.attention
        q, k, v = self.queries_keys_values(x, at=at)
        first, stop = span
        mixed = self._take("mixed", len(x), stop - first, attention.n_head * attention.head_v)
        for seq in range(len(x)):
            self.mix(q[seq], k[seq], v[seq], first, 0, mixed[seq], each)
        return mixed.reshape(-1, attention.n_head * attention.head_v)

    def mix(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, past: int, out: np.ndarray, each: Each
    ) -> None:
        """What the queries from `first` on of one sequence see: into `out` [queries, heads * head size].

        `q` is [groups, queries, heads of a group, head size], its first query at position `past`; `k` and `v` are
        [groups, positions, head size], from position 0 on. `each` runs the groups.
        """
        attention = self.layer.attention
        (_, _, heads, head_k), head_v, stop = q.shape, attention.head_v, past + first + len(out)
        if attention.causal:
            reach = min(stop, attention.window or stop), 0, attention.chunk or 0
        else:
            stop = k.shape[1]
            half = stop if attention.window is None else attention.window // 2
            reach = half + 1, half, 0
        cap, sinks = np.float32(attention.softcap or 0.0), self._sinks
        distances = None if attention.alibi is None else _falling(attention.alibi, attention.n_head, k.shape[1])

        def mix_group(group: int) -> None:
            scratch = self._take("attention", forward_kernels.attention_scratch(stop, head_k, head_v))
            column = group * heads * head_v
            mine = slice(group * heads, (group + 1) * heads)
            far = _NO_DISTANCES if distances is None else distances[mine]
            forward_kernels.attention(
                q[group], k[group], v[group], first, past, reach, cap, sinks[mine], far, scratch, out, column
            )

        each(mix_group, len(q))

    def queries_keys_values(
        self, x: np.ndarray, positions: np.ndarray | None = None, at: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The heads of `x` [n_seq, n_ctx, n_embd], normalised and rotated.

        Queries are [n_seq, groups, n_ctx, heads of a group, head size], keys and values [n_seq, groups, n_ctx, head
        size]. Rows stand at `positions` [n_ctx] of their sequences, from 0 on if it is None, and the layer's tables
        are those of the rows; the first row of `x` is row `at` of the batch.
        """
        attention: Attention = self.layer.attention
        n_seq, n_ctx, n_embd = x.shape
        groups, head_k, head_v = attention.n_head_kv, attention.head_k, attention.head_v
        heads = attention.n_head // groups
        n_q, n_k = attention.n_head * head_k, groups * head_k
        neighbours = attention.rope is not None and attention.rope.style is RopeStyle.NORMAL
        tables, one, scale = self._tables, np.float32(1.0), np.float32(attention.scale)
        still = np.ascontiguousarray(tables[0][:, :0])
        take = self._take
        q, k = take("q", n_seq, groups, n_ctx, heads, head_k), take("k", n_seq, groups, n_ctx, 1, head_k)
        v = take("v", n_seq, groups, n_ctx, 1, head_v)
        rows = x.reshape(-1, n_embd)
        for start in range(0, len(rows), self._rows):
            block = rows[start : start + self._rows]
            normed = self._normed(self.layer.attention_norm, block, take("normed", len(block), n_embd))
            qkv = self._multiply(normed, self._qkv, take("qkv", len(block), len(self._qkv.matrix)), at + start)
            if attention.clamp is not None:
                np.clip(qkv, -np.float32(attention.clamp), np.float32(attention.clamp), out=qkv)
            for norm, first, n in ((attention.q_norm, 0, n_q), (attention.k_norm, n_q, n_k)):
                if norm is not None and not attention.norm_rotated:
                    weight, _ = self._norms[norm]
                    forward_kernels.rms_norm_columns(qkv, first, n // weight.size, weight, norm.eps)
            if attention.temperature is not None:
                at_row = np.arange(start, start + len(block)) % n_ctx
                qkv[:, :n_q] *= temperatures(attention.temperature, at_row if positions is None else positions[at_row])
            done = 0
            while done < len(block):
                seq, position = divmod(start + done, n_ctx)
                n = min(len(block) - done, n_ctx - position)
                part = qkv[done : done + n]
                factor = one if attention.norm_rotated and attention.q_norm else scale
                forward_kernels.split_heads(part, 0, *tables, position, neighbours, factor, q[seq])
                forward_kernels.split_heads(part, n_q, *tables, position, neighbours, one, k[seq])
                forward_kernels.split_heads(part, n_q + n_k, still, still, position, neighbours, one, v[seq])
                done += n
        if attention.norm_rotated:
            for norm, heads_of, factor in ((attention.q_norm, q, scale), (attention.k_norm, k, one)):
                if norm is not None:
                    head_rows, weight = heads_of.reshape(-1, head_k), self._norms[norm][0]
                    forward_kernels.rms_norm(head_rows, weight * factor, norm.eps, head_rows)
        return q, k[..., 0, :], v[..., 0, :]

    # What comes after it

    def finish(self, mixed: np.ndarray, x: np.ndarray, routed: Routed | None, at: int = 0) -> None:
        """Add the attention that `attend` prepared, `mixed`, to `x` [rows, n_embd], and the dense block's branch.

        Where the layer has experts, the rows are normalised and routed into `routed` instead. The first row of `x` is
        row `at` of the batch.
        """
        take, n_embd, layer = self._take, self.n_embd, self.layer
        for start in range(0, len(x), self._rows):
            block = x[start : start + self._rows]
            n = len(block)
            branch = self._multiply(mixed[start : start + n], self._out, take("branch", n, n_embd), at + start)
            self._prepare(branch, layer.post_attention_norm)
            if routed is not None:
                to = routed.part(start, start + n)
                normed = self._add_and_norm(block, branch, to.normed)
                if normed is not to.normed:
                    to.normed[:] = normed
                self._route(to, branch, at + start)
                continue
            normed = self._add_and_norm(block, branch, take("normed", n, n_embd))
            self._dense(normed, branch, at + start)
            self._prepare(branch, layer.post_feed_forward_norm)
            forward_kernels.add(block, branch)
            self._normed(layer.out_feed_forward_norm, block, block)

    def _dense(self, x: np.ndarray, out: np.ndarray, at: int) -> np.ndarray:
        """The dense block, or the one that experts share, of the rows of `x` from row `at` of the batch on."""
        wide = self._multiply(x, self._up, self._take("wide", len(x), len(self._up.matrix)), at)
        active = self._take("active", len(x), self._down.matrix.shape[1])
        assert self._activate is not None
        self._activate(wide, active)
        return self._multiply(active, self._down, out, at)

    def _prepare(self, branch: np.ndarray, post: Norm | None) -> None:
        """Make `branch` ready to be added: normalise and scale it, in place."""
        self._normed(post, branch, branch)
        if self.layer.branch_scale != 1.0:
            branch *= np.float32(self.layer.branch_scale)

    def _add_and_norm(self, x: np.ndarray, branch: np.ndarray, out: np.ndarray) -> np.ndarray:
        """`x += branch`; what the feed-forward block then reads, in `out` or `x` itself."""
        norm = self.layer.feed_forward_norm
        if self.layer.parallel:
            if self._normed(norm, x, out) is x:
                out[:] = x
            forward_kernels.add(x, branch)
            return out
        if norm is not None and norm.kind is NormKind.RMS and self.layer.out_attention_norm is None:
            forward_kernels.add_rms_norm(x, branch, self._norms[norm][0], norm.eps, out)
            return out
        forward_kernels.add(x, branch)
        self._normed(self.layer.out_attention_norm, x, x)
        return self._normed(norm, x, out)

    # Experts

    def _route(self, routed: Routed, scratch: np.ndarray, at: int) -> None:
        """Choose the experts of the rows of `routed`, and begin its branch with what they share."""
        ff, take, n = self.layer.feed_forward, self._take, len(routed.normed)
        assert isinstance(ff, Experts)
        scores = self._multiply(routed.normed, self._router, take("router", n, len(self._router.matrix)), at)
        forward_kernels.route(
            scores, self._selection_bias, _GATING[ff.gating], (ff.n_groups, ff.n_groups_used), ff.normalised,
            np.float32(ff.scale), routed.chosen, routed.shares,
        )  # fmt: skip
        if ff.shared is None:
            return
        if ff.shared_gate is None:
            self._dense(routed.normed, routed.branch, at)
            return
        share = self._multiply(routed.normed, self._shared_gate, take("shared gate", n, 1), at)
        forward_kernels.add_gated(self._dense(routed.normed, scratch, at), share, routed.branch)

    def experts(self) -> Iterable[Expert]:
        """The layer's experts, decoded one by one, none where it has a dense block; each is valid until the next."""
        ff = self.layer.feed_forward
        if not isinstance(ff, Experts):
            return

        def product(role: str, name: str, biases: str | None, e: int, n_out: int, n_in: int) -> Product:
            matrix = self._weights.slab(role, name, ff.n_expert * n_out, n_in, e * n_out, (e + 1) * n_out)
            bias = None
            if biases is not None:
                bias = self._weights.slab(f"{role} bias", biases, ff.n_expert, n_out, e, e + 1)[0]
            return Product(matrix, bias, (name,))

        for e in range(ff.n_expert):
            yield Expert(
                e,
                None if ff.gate is None else product("expert gate", ff.gate, ff.gate_bias, e, ff.n_ff, self.n_embd),
                product("expert up", ff.up, ff.up_bias, e, ff.n_ff, self.n_embd),
                product("expert down", ff.down, ff.down_bias, e, self.n_embd, ff.n_ff),
            )

    def expert(self, expert: Expert, routed: Routed, at: int = 0) -> None:
        """Add `expert`'s share to the branch of those rows of `routed` that chose it.

        The first row of `routed` is row `at` of the batch.
        """
        take, (e, gate, up, down) = self._take, expert
        ff = self.layer.feed_forward
        assert isinstance(ff, Experts)
        rows, ranks = np.nonzero(routed.chosen == e)
        n_ff = len(up.matrix)
        read_by = (gate.names if gate else ()) + up.names
        for start in range(0, len(rows), self._rows):
            some = rows[start : start + self._rows]
            n = len(some)
            shares = routed.shares[some, ranks[start : start + self._rows]]
            x = np.take(routed.normed, some, axis=0, out=take("chosen", n, self.n_embd), mode="clip")
            if ff.weigh_input:
                x *= shares[:, None]
                shares = np.ones_like(shares)
            self._observe(read_by, x, at + start, e)
            wide = take("wide", n, n_ff * (2 if gate else 1))
            if gate is not None:
                self._expert_product(x, gate, wide[:, :n_ff])
            self._expert_product(x, up, wide[:, -n_ff:])
            active = take("active", n, n_ff)
            assert self._activate_expert is not None
            self._activate_expert(wide, active)
            self._observe(down.names, active, at + start, e)
            branch = self._expert_product(active, down, take("branch", n, self.n_embd))
            forward_kernels.add_rows(branch, some, shares, routed.branch)

    def _expert_product(self, x: np.ndarray, product: Product, out: np.ndarray) -> np.ndarray:
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            out += product.bias
        return out

    def close(self, x: np.ndarray, routed: Routed) -> None:
        """Add the experts' branch to `x` [rows, n_embd]."""
        self._prepare(routed.branch, self.layer.post_feed_forward_norm)
        forward_kernels.add(x, routed.branch)
        self._normed(self.layer.out_feed_forward_norm, x, x)
