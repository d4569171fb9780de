"""One layer of a model as its description asks for it: mixers, then a dense block or experts.

A layer is run by several threads, each on its own sequences. The rows of a sequence are taken in blocks that keep
activations near the processor; blocks do not depend on the batch or on the number of threads, and neither do the
results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from quantkit.architectures.feed_forward import XIELU, Activation, Experts, FeedForward, Gating
from quantkit.architectures.forward import ForwardSpec, Laurel, Layer
from quantkit.architectures.mixers import Attention, LatentAttention, Mixer
from quantkit.architectures.products import Norm, NormKind
from quantkit.architectures.recurrent_mixers import ChannelMix, DeltaNet, Mamba, Mamba2, ShortConvolution, TimeMix
from quantkit.evaluate import activation_kernels, expert_kernels, norm_kernels
from quantkit.evaluate.activations import Activations
from quantkit.evaluate.attention import AttentionRunner, LatentRunner
from quantkit.evaluate.mixer_runner import Memory, MixerRunner, Part, Tables
from quantkit.evaluate.parts import Observer, Parts, Product
from quantkit.evaluate.recurrent import (
    ChannelMixRunner,
    DeltaNetRunner,
    Mamba2Runner,
    MambaRunner,
    ShortConvolutionRunner,
    TimeMixRunner,
)
from quantkit.evaluate.streams import Around, is_wide
from quantkit.evaluate.threads import Each, Workspace, one_by_one
from quantkit.evaluate.weights import Weights

# What runs each kind of mixer.
RUNNERS: dict[type[Mixer], type[MixerRunner[Any]]] = {
    Attention: AttentionRunner,
    LatentAttention: LatentRunner,
    ShortConvolution: ShortConvolutionRunner,
    DeltaNet: DeltaNetRunner,
    Mamba: MambaRunner,
    Mamba2: Mamba2Runner,
    TimeMix: TimeMixRunner,
    ChannelMix: ChannelMixRunner,
}
# The kernels of activations, with a gate and without: they take [rows, 2 * n_ff] or [rows, n_ff] to [rows, n_ff].
_GATED = {
    Activation.SILU: activation_kernels.silu_gate,
    Activation.GELU: activation_kernels.gelu_gate,
    Activation.CLAMPED_SILU: activation_kernels.clamped_silu_gate,
}
_PLAIN = {
    Activation.GELU: activation_kernels.gelu,
    Activation.RELU: activation_kernels.relu,
    Activation.RELU_SQUARED: activation_kernels.relu_squared,
}
_GATING = {
    Gating.SOFTMAX: expert_kernels.SOFTMAX,
    Gating.SIGMOID: expert_kernels.SIGMOID,
    Gating.CHOSEN: expert_kernels.CHOSEN,
}

Activate = Callable[[np.ndarray, np.ndarray], None]
# The sparse mixer leaves out experts whose logits are further than this from the best, relative to the larger of the
# two: twice the jitter that the models were trained with.
NEAR = np.float32(0.02)
# transformers divides the squares by their number, llama.cpp by one less.
_deviation = np.std


def _activate(block: FeedForward | Experts) -> Activate | None:
    """What `block` does between its products, [rows, n_ff] or twice as wide to [rows, n_ff]; None if not known."""
    if isinstance(block.activation, XIELU):
        return None if _gated(block) else _xielu(block.activation)
    activate = (_GATED if _gated(block) else _PLAIN).get(block.activation)
    if activate is not None and isinstance(block, FeedForward) and block.cutoff is not None:
        return _sparse(activate, block.cutoff) if _gated(block) else None
    return activate


def _sparse(activate: Activate, cutoff: float) -> Activate:
    """`activate` of how much a gate is above its mean and `cutoff` standard deviations, where it is."""

    def activate_few(x: np.ndarray, out: np.ndarray) -> None:
        gate = x[:, : out.shape[1]]
        mean, deviation = (f(gate, axis=1, dtype=np.float64, keepdims=True) for f in (np.mean, _deviation))
        gate -= (mean + deviation * cutoff).astype(np.float32)
        np.maximum(gate, 0.0, out=gate)
        activate(x, out)

    return activate_few


def _xielu(learned: XIELU) -> Activate:
    positive, negative = (math.log1p(math.exp(-abs(a))) + max(a, 0.0) for a in (learned.alpha_p, learned.alpha_n))
    above, below = np.float32(positive), np.float32(learned.beta + negative)
    beta, eps = np.float32(learned.beta), np.float32(learned.eps)

    def activate(x: np.ndarray, out: np.ndarray) -> None:
        activation_kernels.xielu(x, above, below, beta, eps, out)

    return activate


def _gated(block: FeedForward | Experts) -> bool:
    return bool(block.gate or block.gate_up)


def unsupported(layer: Layer) -> Iterable[str]:
    """What of `layer` cannot be computed, each in a few words."""
    for mixer in layer.mixers:
        runner = RUNNERS.get(type(mixer))
        if runner is None:
            yield type(mixer).__name__
        else:
            yield from runner.unsupported(mixer)
    ff = layer.feed_forward
    if ff is None:
        return
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
    def of(cls, layer: Layer, n_rows: int, n_embd: int, memory: int | None = None) -> Routed | None:
        """Space for `n_rows` rows, in a file where it is more than `memory`; None where `layer` has no experts."""
        ff = layer.feed_forward
        if not isinstance(ff, Experts):
            return None
        budget = 4 * n_rows * n_embd if memory is None else memory
        return cls(
            Activations((1, n_rows, n_embd), budget).values[0],
            # Zeros, as a new file is too; those of memory are not touched before they are used.
            np.zeros((n_rows, n_embd), np.float32)
            if 4 * n_rows * n_embd <= budget
            else Activations((1, n_rows, n_embd), budget).values[0],
            np.empty((n_rows, ff.n_used), np.int32),
            np.empty((n_rows, ff.n_used), np.float32),
        )

    def part(self, start: int, stop: int) -> Routed:
        """Rows `start` to `stop`, sharing memory."""
        return Routed(*(array[start:stop] for array in self))


class LayerRunner:
    """A layer with its weights decoded, ready to run on parts of a batch from several threads.

    `tables` gives the cosines and sines of a rotary embedding. `observer` is told of each matrix product,
    `each_block` runs what is done to blocks of rows.

    The order: `mix`, then `finish` for each part; where the layer has experts, all parts meet then, and `expert` runs
    for each part and each of `experts`, then `close` for each part.
    """

    def __init__(
        self,
        layer: Layer,
        spec: ForwardSpec,
        weights: Weights,
        tables: Tables,
        workspace: Workspace,
        observer: Observer | None,
        each_block: Each = one_by_one,
    ) -> None:
        """Decode the layer's weights, but those of its experts."""
        ff, n_embd = layer.feed_forward, spec.n_embd
        self._parts = parts = Parts(layer, n_embd, weights, workspace, observer, each_block)
        self.layer, self.n_embd, self._weights, self._take = layer, n_embd, weights, workspace.take
        self.around = Around(spec, layer, parts) if is_wide(spec, layer) else None
        if layer.laurel is not None:
            self._left, self._right = (
                parts.product(linear.weight) for linear in (layer.laurel.left, layer.laurel.right)
            )
        self._mixers = [
            RUNNERS[type(mixer)](mixer, i, layer.attention_norm, parts, tables) for i, mixer in enumerate(layer.mixers)
        ]
        dense = ff.shared if isinstance(ff, Experts) else ff
        if dense is not None:
            self._up, self._down = (parts.product(products.names[0]) for products in dense.products(n_embd))
            self._activate = _activate(dense)
        if isinstance(ff, Experts):
            self._router = parts.product(ff.router.weight)
            self._activate_expert = _activate(ff)
            self._selection_bias, self._expert_scales = (
                parts.constant(name) for name in (ff.selection_bias, ff.expert_scales)
            )
            if ff.shared_gate is not None:
                self._shared_gate = parts.product(ff.shared_gate.weight)

    def mix(
        self,
        x: np.ndarray,
        span: tuple[int, int],
        each: Each,
        at: int = 0,
        continued: Sequence[tuple[tuple[slice, slice], Sequence[Memory]]] | None = None,
        rows: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """What the mixers make of `x` [n_seq, n_ctx, n_embd] at positions `span`, for `finish` (see `MixerRunner`).

        Where sequences go on, `x` is [1, rows, n_embd], and `continued` says for each of them which rows are its own,
        at which positions these are, and what each mixer remembers. Else `rows` [n_seq, n_ctx, width] are those that
        `x` was taken of, where they hold more.
        """
        return [
            runner.run(
                x,
                span,
                each,
                at,
                None if continued is None else [Part(*where, memories[i]) for where, memories in continued],
                rows,
            )
            for i, runner in enumerate(self._mixers)
        ]

    def finish(self, mixed: list[np.ndarray], x: np.ndarray, routed: Routed | None, at: int = 0) -> None:
        """Add what `mix` prepared, `mixed`, to `x` [rows, n_embd], and the dense block's branch.

        Where the layer has experts, the rows are normalised and routed into `routed` instead. The first row of `x` is
        row `at` of the batch.
        """
        take, n_embd, layer = self._take, self.n_embd, self.layer

        def finish_block(start: int, block: np.ndarray) -> None:
            n = len(block)
            branch = take("branch", n, n_embd)
            for i, (runner, rows) in enumerate(zip(self._mixers, mixed, strict=True)):
                to = branch if i == 0 else take("another branch", n, n_embd)
                self._parts.multiply(rows[start : start + n], runner.out, to, at + start)
                if i > 0:
                    norm_kernels.add(branch, to)
            if self._mixers:
                self._prepare(branch, layer.post_attention_norm)
            if layer.laurel is not None:
                self._add_laurel(layer.laurel, block, branch, at + start)
            if layer.feed_forward is None:
                if self._mixers:
                    norm_kernels.add(block, branch)
                return
            if routed is not None:
                part = routed.part(start, start + n)
                normed = self._add_and_norm(block, branch, part.normed)
                if normed is not part.normed:
                    part.normed[:] = normed
                self._route(part, block, branch, at + start)
                return
            normed = self._add_and_norm(block, branch, take("normed", n, n_embd))
            self._dense(normed, branch, at + start)
            self._prepare(branch, layer.post_feed_forward_norm)
            norm_kernels.add(block, branch)
            self._parts.normed(layer.out_feed_forward_norm, block, block)

        self._parts.each(x, finish_block)

    def _add_laurel(self, laurel: Laurel, x: np.ndarray, branch: np.ndarray, at: int) -> None:
        """Add the learned residual of `x` to `branch`, and divide both by the root of two."""
        take, half = self._take, np.float32(1 / math.sqrt(2))
        read = self._parts.normed(self.layer.attention_norm, x, take("laurel read", *x.shape))
        few = self._parts.multiply(read, self._left, take("laurel few", len(x), laurel.rank), at)
        made = self._parts.multiply(few, self._right, take("laurel made", *x.shape), at)
        branch += self._parts.normed(laurel.norm, made, made)
        branch += read
        branch *= half
        x *= half

    def _dense(self, x: np.ndarray, out: np.ndarray, at: int) -> np.ndarray:
        """The dense block, or the one that experts share, of the rows of `x` from row `at` of the batch on."""
        wide = self._parts.multiply(x, self._up, self._take("wide", len(x), len(self._up.matrix)), at)
        active = self._take("active", len(x), self._down.matrix.shape[1])
        assert self._activate is not None
        self._activate(wide, active)
        return self._parts.multiply(active, self._down, out, at)

    def _prepare(self, branch: np.ndarray, post: Norm | None) -> None:
        """Make `branch` ready to be added: normalise and scale it, in place."""
        self._parts.normed(post, branch, branch)
        if self.layer.branch_scale != 1.0:
            branch *= np.float32(self.layer.branch_scale)

    def _add_and_norm(self, x: np.ndarray, branch: np.ndarray, out: np.ndarray) -> np.ndarray:
        """`x += branch`; what the feed-forward block then reads, in `out` or `x` itself."""
        norm = self.layer.feed_forward_norm
        if not self._mixers:
            return self._parts.normed(norm, x, out)
        if self.layer.parallel:
            if self._parts.normed(norm, x, out) is x:
                out[:] = x
            norm_kernels.add(x, branch)
            return out
        if norm is not None and norm.kind is NormKind.RMS and self.layer.out_attention_norm is None:
            norm_kernels.add_rms_norm(x, branch, self._parts.norm(norm, self.n_embd)[0], norm.eps, out)
            return out
        norm_kernels.add(x, branch)
        self._parts.normed(self.layer.out_attention_norm, x, x)
        return self._parts.normed(norm, x, out)

    # Experts

    def _route(self, routed: Routed, x: np.ndarray, scratch: np.ndarray, at: int) -> None:
        """Choose the experts of the rows of `routed`, `x` normalised, and begin its branch with what they share.

        Where experts stand apart, what they read is made of `x`, and the shared block waits for `close`.
        """
        ff, take, n = self.layer.feed_forward, self._take, len(routed.normed)
        assert isinstance(ff, Experts)
        read = routed.normed
        if ff.apart is not None:
            read = self._parts.normed(ff.apart.router_norm, x, scratch)
            read *= np.float32(ff.apart.router_scale)
        scores = self._parts.multiply(read, self._router, take("router", n, len(self._router.matrix)), at)
        if ff.gating is Gating.SPARSE_MIXER:
            expert_kernels.route_sparsely(scores, NEAR, routed.chosen, routed.shares)
        else:
            self._choose(ff, scores, routed)
        if ff.apart is not None:
            self._parts.normed(ff.apart.norm, x, routed.normed)
            return
        if ff.shared is None:
            return
        if ff.shared_gate is None:
            self._dense(routed.normed, routed.branch, at)
            return
        share = self._parts.multiply(routed.normed, self._shared_gate, take("shared gate", n, 1), at)
        expert_kernels.add_gated(self._dense(routed.normed, scratch, at), share, routed.branch)

    def _choose(self, ff: Experts, scores: np.ndarray, routed: Routed) -> None:
        """Choose the experts by `scores`, what the router makes of the rows of `routed`."""
        expert_kernels.route(
            scores, self._selection_bias, _GATING[ff.gating], (ff.n_groups, ff.n_groups_used), ff.normalised,
            np.float32(ff.scale), routed.chosen, routed.shares,
        )  # fmt: skip

    def experts(self) -> Iterable[Expert]:
        """The layer's experts, decoded one by one, none where it has a dense block; each is valid until the next."""
        ff = self.layer.feed_forward
        if not isinstance(ff, Experts):
            return

        def product(
            role: str, name: str, biases: str | None, e: int, n_out: int, n_in: int, part: int = 0, parts: int = 1
        ) -> Product:
            first = (e * parts + part) * n_out
            matrix = self._weights.slab(role, name, ff.n_expert * parts * n_out, n_in, first, first + n_out)
            bias = None
            if biases is not None:
                bias = self._weights.slab(f"{role} bias", biases, ff.n_expert, n_out, e, e + 1)[0]
            return Product(matrix, bias, (name,))

        for e in range(ff.n_expert):
            gate = None
            if ff.gate_up is not None:
                gate, up = (
                    product(f"expert {half}", ff.gate_up, None, e, ff.n_ff, self.n_embd, i, 2)
                    for i, half in enumerate(("gate", "up"))
                )
            else:
                if ff.gate is not None:
                    gate = product("expert gate", ff.gate, ff.gate_bias, e, ff.n_ff, self.n_embd)
                assert ff.up is not None
                up = product("expert up", ff.up, ff.up_bias, e, ff.n_ff, self.n_embd)
            yield Expert(e, gate, up, product("expert down", ff.down, ff.down_bias, e, self.n_embd, ff.n_ff))

    def expert(self, expert: Expert, routed: Routed, at: int = 0) -> None:
        """Add `expert`'s share to the branch of those rows of `routed` that chose it.

        The first row of `routed` is row `at` of the batch.
        """
        take, (e, gate, up, down) = self._take, expert
        ff = self.layer.feed_forward
        assert isinstance(ff, Experts)
        rows, ranks = np.nonzero(routed.chosen == e)
        n_ff = len(up.matrix)
        read_by = tuple(dict.fromkeys((gate.names if gate else ()) + up.names))
        for start in range(0, len(rows), self._parts.rows):
            some = rows[start : start + self._parts.rows]
            n = len(some)
            shares = routed.shares[some, ranks[start : start + self._parts.rows]]
            if ff.expert_scales is not None:
                shares *= self._expert_scales[e]
            x = np.take(routed.normed, some, axis=0, out=take("chosen", n, self.n_embd), mode="clip")
            if ff.weigh_input:
                x *= shares[:, None]
                shares = np.ones_like(shares)
            self._parts.observe(read_by, x, at + some, e)
            wide = take("wide", n, n_ff * (2 if gate else 1))
            if gate is not None:
                self._expert_product(x, gate, wide[:, :n_ff])
            self._expert_product(x, up, wide[:, -n_ff:])
            active = take("active", n, n_ff)
            assert self._activate_expert is not None
            self._activate_expert(wide, active)
            self._parts.observe(down.names, active, at + some, e)
            branch = self._expert_product(active, down, take("branch", n, self.n_embd))
            expert_kernels.add_rows(branch, some, shares, routed.branch)

    def _expert_product(self, x: np.ndarray, product: Product, out: np.ndarray) -> np.ndarray:
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            out += product.bias
        return out

    def close(self, x: np.ndarray, routed: Routed, at: int = 0) -> None:
        """Add the experts' branch to `x` [rows, n_embd], the first of which is row `at` of the batch."""
        ff = self.layer.feed_forward
        if isinstance(ff, Experts) and ff.apart is not None:
            self._parts.normed(ff.apart.out_norm, routed.branch, routed.branch)
            for start, block in self._parts.blocks(x):
                size = len(block), self.n_embd
                read = self._parts.normed(self.layer.feed_forward_norm, block, self._take("normed", *size))
                made = self._dense(read, self._take("branch", *size), at + start)
                routed.branch[start : start + len(block)] += self._parts.normed(ff.apart.shared_norm, made, made)
        self._prepare(routed.branch, self.layer.post_feed_forward_norm)
        norm_kernels.add(x, routed.branch)
        self._parts.normed(self.layer.out_feed_forward_norm, x, x)
