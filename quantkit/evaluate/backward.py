"""The backward pass of a layer and of the logits, in numpy: gradients by what each matrix product makes.

Each sequence is a task of its own, on one BLAS thread, so the results do not depend on the number of threads. What the
layer has computed is computed again from what it read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields

import numpy as np

from quantkit.architectures.feed_forward import XIELU, Activation, FeedForward
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.mixers import Attention, RopeStyle
from quantkit.architectures.products import Norm, NormKind
from quantkit.evaluate.attention import AttentionRunner, temperatures
from quantkit.evaluate.layers import LayerRunner
from quantkit.evaluate.parts import Product
from quantkit.evaluate.rotary import rotate

# The fields of the description that this backward pass knows.
_KNOWN: dict[type, str] = {
    Layer: "mixers feed_forward attention_norm feed_forward_norm post_attention_norm post_feed_forward_norm "
    "parallel branch_scale",
    Attention: "n_head n_head_kv head_k head_v scale out q k v qkv rope window softcap q_norm k_norm norm_whole "
    "temperature norm_rotated clamp chunk sinks",
    FeedForward: "n_ff down activation up gate gate_up",
    Norm: "weight eps kind bias",
}

# A function from gradients by what something makes to those by what it reads.
Backward = Callable[[np.ndarray], np.ndarray]


def unknown_to_backward(spec: ForwardSpec) -> Iterator[str]:
    """What of a model has no backward pass here, each in a few words."""
    for layer in spec.layers:
        if not isinstance(layer.feed_forward, FeedForward):
            yield "experts" if layer.feed_forward is not None else "layers without a feed-forward block"
            continue
        attentions = [mixer for mixer in layer.mixers if isinstance(mixer, Attention)]
        if len(attentions) != 1 or len(layer.mixers) != 1:
            yield f"layers of {' and '.join(type(mixer).__name__ for mixer in layer.mixers) or 'no mixer'}"
            continue
        for part in (layer, *attentions, layer.feed_forward, layer.attention_norm):
            if part is None:
                continue
            for field in fields(part):
                own = getattr(part, field.name)
                known = field.name in _KNOWN[type(part)].split()
                if not known and (field.default is MISSING or own != field.default):
                    yield f"{type(part).__name__}.{field.name}"


class LayerGradients(LayerRunner):
    """A layer that takes gradients back: its observer is told of those by its products' outputs, not of inputs."""

    @property
    def _attending(self) -> AttentionRunner:
        """The layer's only mixer."""
        (runner,) = self._mixers
        assert isinstance(runner, AttentionRunner)
        return runner

    def back(self, x: np.ndarray, gradient: np.ndarray, at: int) -> np.ndarray:
        """From gradients by what the layer makes of a sequence `x` to those by `x`: float32 [n_ctx, n_embd] each.

        The sequence's first row is row `at` of the batch.
        """
        layer, ff = self.layer, self.layer.feed_forward
        assert isinstance(ff, FeedForward)
        scale = np.float32(layer.branch_scale)
        normed, through_norm = self._norm(layer.attention_norm, x)
        mixed, through_attention = self._attention(normed, at)
        branch, through_post = self._norm(layer.post_attention_norm, self._times(mixed, self._attending.out))
        after = x + branch * scale
        normed, through_ff_norm = self._norm(layer.feed_forward_norm, x if layer.parallel else after)
        active, through_activation = _activation(ff, self._times(normed, self._up))
        _, through_ff_post = self._norm(layer.post_feed_forward_norm, self._times(active, self._down))

        by_down = through_ff_post(gradient * scale)
        by_up = through_activation(self._back_through(self._down, by_down, at))
        by_read = through_ff_norm(self._back_through(self._up, by_up, at))
        by_after = gradient if layer.parallel else gradient + by_read
        by_out = through_post(by_after * scale)
        by_normed = through_attention(self._back_through(self._attending.out, by_out, at))
        result = by_after + through_norm(by_normed)
        return result + by_read if layer.parallel else result

    @staticmethod
    def _times(x: np.ndarray, product: Product) -> np.ndarray:
        made: np.ndarray = x @ product.matrix.T
        return made if product.bias is None else made + product.bias

    def _back_through(self, product: Product, gradient: np.ndarray, at: int) -> np.ndarray:
        """Gradients by what a product reads from those by what it makes; tells of these, matrix by matrix."""
        if self._parts.observer is not None:
            start = 0
            for name, n_rows in zip(product.names, self._n_rows(product), strict=True):
                self._parts.observer((name,), gradient[:, start : start + n_rows], at, None)
                start += n_rows
        by_read: np.ndarray = gradient @ product.matrix
        return by_read

    def _n_rows(self, product: Product) -> list[int]:
        """How many of the rows of a product come from each of its tensors."""
        a = self._attending.mixer
        if len(product.names) == 3:
            return [a.n_head * a.head_k, a.n_head_kv * a.head_k, a.n_head_kv * a.head_v]
        return [len(product.matrix) // len(product.names)] * len(product.names)

    def _norm(self, norm: Norm | None, x: np.ndarray) -> tuple[np.ndarray, Backward]:
        """`x` normalised over its last axis, and the way back."""
        if norm is None:
            return x, lambda gradient: gradient
        weight, bias = self._parts.norm(norm, x.shape[-1])
        return normalised(x, weight, bias, norm)

    # -- attention

    def _attention(self, normed: np.ndarray, at: int) -> tuple[np.ndarray, Backward]:
        a, n_ctx = self._attending.mixer, len(normed)
        n_q, n_k = a.n_head * a.head_k, a.n_head_kv * a.head_k
        qkv = self._times(normed, self._attending.qkv)
        inside = None if a.clamp is None else np.abs(qkv) <= np.float32(a.clamp)
        if a.clamp is not None:
            qkv = np.clip(qkv, -np.float32(a.clamp), np.float32(a.clamp))
        growth = np.float32(1.0)
        if a.temperature is not None:
            growth = temperatures(a.temperature, np.arange(n_ctx))
        q, q_back = self._heads(qkv[:, :n_q], a.n_head, a.q_norm, growth * np.float32(a.scale))
        k, k_back = self._heads(qkv[:, n_q : n_q + n_k], a.n_head_kv, a.k_norm, np.float32(1.0))
        v = qkv[:, n_q + n_k :].reshape(n_ctx, a.n_head_kv, a.head_v)
        hidden = _hidden_keys(a, n_ctx)
        mixed = np.empty((n_ctx, a.n_head, a.head_v), np.float32)
        group = a.n_head // a.n_head_kv
        for h in range(a.n_head):
            shares, _ = self._shares(q[:, h], k[:, h // group], hidden, h)
            mixed[:, h] = shares @ v[:, h // group]

        def back(gradient: np.ndarray) -> np.ndarray:
            by_mixed = gradient.reshape(mixed.shape)
            by_q, by_k, by_v = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
            for h in range(a.n_head):
                g, own = h // group, by_mixed[:, h]
                shares, slope = self._shares(q[:, h], k[:, g], hidden, h)
                by_v[:, g] += shares.T @ own
                by_scores = own @ v[:, g].T
                by_scores -= (own * mixed[:, h]).sum(1, keepdims=True)
                by_scores *= shares
                if slope is not None:
                    by_scores *= slope
                by_q[:, h] = by_scores @ k[:, g]
                by_k[:, g] += by_scores.T @ q[:, h]
            by_qkv = np.concatenate([q_back(by_q), k_back(by_k), by_v.reshape(n_ctx, -1)], 1)
            if inside is not None:
                by_qkv *= inside
            return self._back_through(self._attending.qkv, by_qkv, at)

        return mixed.reshape(n_ctx, -1), back

    def _heads(
        self, flat: np.ndarray, n_head: int, norm: Norm | None, growth: np.ndarray | np.float32
    ) -> tuple[np.ndarray, Backward]:
        """Heads [n_ctx, heads, head size], normalised, rotated and times `growth`, and the way back from them."""
        a, n_ctx = self._attending.mixer, len(flat)
        steps: list[Backward] = []

        def apply_norm(x: np.ndarray) -> np.ndarray:
            x, back = self._norm(norm, x)
            steps.append(back)
            return x

        if norm is not None and a.norm_whole:
            flat = apply_norm(flat)
        x = flat.reshape(n_ctx, n_head, -1)
        if norm is not None and not a.norm_whole and not a.norm_rotated:
            x = apply_norm(x)
        elif norm is not None and a.norm_whole:
            steps.append(lambda gradient: gradient.reshape(n_ctx, -1))
        cosines, sines = (table[:n_ctx, None] for table in self._attending.tables(a.rope))
        neighbours = a.rope is not None and a.rope.style is RopeStyle.NORMAL
        x = _rotated(x, cosines, sines, neighbours)
        steps.append(lambda gradient: _rotated(gradient, cosines, -sines, neighbours))
        if norm is not None and a.norm_rotated:
            x = apply_norm(x)
        factor = growth if isinstance(growth, np.float32) else growth[:, :, None]

        def back(gradient: np.ndarray) -> np.ndarray:
            gradient = gradient * factor
            for step in reversed(steps):
                gradient = step(gradient)
            return gradient.reshape(n_ctx, -1)

        return x * factor, back

    def _shares(
        self, q: np.ndarray, k: np.ndarray, hidden: np.ndarray, head: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What each query [n_ctx, n] takes of each key, [n_ctx, n_ctx], and the slope of a cap on the scores."""
        cap, slope = self._attending.mixer.softcap, None
        scores = q @ k.T
        if cap is not None:
            scores = np.tanh(scores / np.float32(cap))
            slope = 1 - scores * scores
            scores *= np.float32(cap)
        scores[hidden] = -np.inf
        most = scores.max(1, keepdims=True)
        if self._attending.sinks.size:
            most = np.maximum(most, self._attending.sinks[head])
        scores -= most
        np.exp(scores, out=scores)
        total = scores.sum(1, keepdims=True)
        if self._attending.sinks.size:
            total += np.exp(self._attending.sinks[head] - most)
        scores /= total
        return scores, slope


class Draws:
    """Tokens drawn from predictions that come a part of the vocabulary at a time.

    `places`, [n_seq, n_ctx], say where in the cumulated probabilities. `add` is told of all scores first, then
    `gradients` of all again, in the same order.
    """

    def __init__(self, places: np.ndarray) -> None:
        self._places = places
        self._most, self._total = np.full(places.shape, -np.inf, np.float32), np.zeros(places.shape)
        self._before, self._missing = np.zeros(places.shape), np.ones(places.shape, bool)

    def add(self, seq: int, scores: np.ndarray) -> None:
        """Take the next scores, float32 [n_ctx, tokens], of a sequence."""
        most = np.maximum(self._most[seq], scores.max(1))
        self._total[seq] *= np.exp(self._most[seq] - most)
        self._total[seq] += np.exp(scores - most[:, None]).sum(1)
        self._most[seq] = most

    def gradients(self, seq: int, scores: np.ndarray, last: bool) -> np.ndarray:
        """Gradients of the drawn tokens' log-likelihood by these scores; `last` are those of the last tokens."""
        shares: np.ndarray = np.exp(scores - self._most[seq][:, None])
        shares /= self._total[seq].astype(np.float32)[:, None]
        reached = shares.cumsum(1, np.float64)
        reached += self._before[seq][:, None]
        self._before[seq] = reached[:, -1]
        at = (reached <= self._places[seq][:, None]).sum(1)
        if last:
            at = np.minimum(at, scores.shape[1] - 1)
        here = np.flatnonzero((at < scores.shape[1]) & self._missing[seq])
        self._missing[seq, here] = False
        np.negative(shares, out=shares)
        shares[here, at[here]] += 1
        return shares


def _hidden_keys(a: Attention, n_ctx: int) -> np.ndarray:
    """Which keys [queries, keys] a query does not see."""
    positions = np.arange(n_ctx)
    distance = positions[:, None] - positions
    hidden: np.ndarray = distance < 0
    if a.window is not None:
        hidden |= distance >= a.window
    if a.chunk is not None:
        hidden |= positions // a.chunk != positions[:, None] // a.chunk
    return hidden


def _rotated(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, neighbours: bool) -> np.ndarray:
    """Heads turned by tables [n_ctx, 1, pairs]; with negated sines this is its transpose."""
    out: np.ndarray = x.copy()
    rotate(out[..., : 2 * cosines.shape[2]], cosines, sines, neighbours)
    return out


def normalised(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, norm: Norm) -> tuple[np.ndarray, Backward]:
    """`x` normalised over its last axis as `norm` says, and the way back through that."""
    centred = x - x.mean(-1, keepdims=True) if norm.kind is NormKind.LAYER else x
    inverse = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(norm.eps))
    unit = centred * inverse

    def back(gradient: np.ndarray) -> np.ndarray:
        by_unit = gradient * weight
        result: np.ndarray = by_unit - unit * (by_unit * unit).mean(-1, keepdims=True)
        if norm.kind is NormKind.LAYER:
            result -= by_unit.mean(-1, keepdims=True)
        result *= inverse
        return result

    made: np.ndarray = unit * weight
    return (made if bias is None else made + bias), back


def _activation(ff: FeedForward, wide: np.ndarray) -> tuple[np.ndarray, Backward]:
    """What a feed-forward block does between its products, and the way back."""
    if ff.gate is None and ff.gate_up is None:
        active, slope = _curve(ff.activation, wide)
        return active, lambda gradient: gradient * slope
    gate, up = wide[:, : ff.n_ff], wide[:, ff.n_ff :]
    if ff.activation is Activation.CLAMPED_SILU:
        kept, seven = np.minimum(gate, np.float32(7)), np.float32(7)
        sigmoid = _sigmoid(np.float32(1.702) * kept)
        active, factor = kept * sigmoid, np.clip(up, -seven, seven) + 1
        slope = (sigmoid + np.float32(1.702) * active * (1 - sigmoid)) * (gate < 7)
        of_up = active * (np.abs(up) < 7)
    else:
        active, slope = _curve(ff.activation, gate)
        factor, of_up = up, active

    def back(gradient: np.ndarray) -> np.ndarray:
        return np.concatenate([gradient * factor * slope, gradient * of_up], 1)

    return active * factor, back


def _curve(activation: Activation | XIELU, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A nonlinearity of `x` and its slope there."""
    if isinstance(activation, XIELU):
        above, below = (math.log1p(math.exp(-abs(p))) + max(p, 0.0) for p in (activation.alpha_p, activation.alpha_n))
        beta, eps = activation.beta, activation.eps
        exp = np.exp(np.minimum(x, eps))
        made = np.where(x > 0, above * x * x, (beta + below) * (exp - 1 - x)) + beta * x
        slope = np.where(x > 0, 2 * above * x, (beta + below) * (exp * (x < eps) - 1)) + beta
        return made.astype(np.float32), slope.astype(np.float32)
    if activation is Activation.RELU:
        return np.maximum(x, 0), (x > 0).astype(np.float32)
    if activation is Activation.RELU_SQUARED:
        positive = np.maximum(x, 0)
        return positive * positive, 2 * positive
    if activation is Activation.GELU:
        c, d = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
        bent = np.tanh(c * (x + d * x * x * x))
        half = np.float32(0.5) * (1 + bent)
        return x * half, half + np.float32(0.5) * x * (1 - bent * bent) * c * (1 + 3 * d * x * x)
    sigmoid = _sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    half = np.float32(0.5)
    made: np.ndarray = half + half * np.tanh(half * x)
    return made
