"""One layer of a model through torch, as its description asks for it: mixers, then a dense block or experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch
from torch.nn import functional

from quantkit.architectures.feed_forward import XIELU, Activation, Apart, Experts, FeedForward, Gating
from quantkit.architectures.forward import AltUp, ForwardSpec, Head, Laurel, Layer, SideEmbedding, SideInput, Streams
from quantkit.architectures.mixers import (
    Attention,
    LatentAttention,
    LearnedDistances,
    Mixer,
    Rope,
    SharedKeys,
    Temperature,
    Yarn,
)
from quantkit.architectures.products import Linear, Norm
from quantkit.architectures.recurrent_mixers import (
    ChannelMix,
    Convolution,
    DeltaNet,
    LowRank,
    Mamba,
    Mamba2,
    ShortConvolution,
    TimeMix,
)
from quantkit.errors import QuantkitError
from quantkit.evaluate.layers import NEAR
from quantkit.evaluate.streams import is_wide
from quantkit.evaluate.torch_mixers import TorchAttention, TorchLatentAttention, TorchMixer
from quantkit.evaluate.torch_parts import TorchParts
from quantkit.evaluate.torch_recurrent import (
    TorchChannelMix,
    TorchDeltaNet,
    TorchMamba,
    TorchMamba2,
    TorchShortConvolution,
    TorchTimeMix,
)
from quantkit.evaluate.torch_streams import TorchAround
from quantkit.evaluate.torch_weights import Loading

# What runs each kind of mixer.
MIXERS: dict[type[Mixer], type[TorchMixer[Any]]] = {
    Attention: TorchAttention,
    LatentAttention: TorchLatentAttention,
    ShortConvolution: TorchShortConvolution,
    DeltaNet: TorchDeltaNet,
    Mamba: TorchMamba,
    Mamba2: TorchMamba2,
    TimeMix: TorchTimeMix,
    ChannelMix: TorchChannelMix,
}
# What a sum of shares is at least when they are divided by it, as in the kernels.
_LEAST_SUM = 6.103515625e-5

# The fields of the description that this backend carries out. One that is added to the description later is refused
# by name where a model uses it.
_KNOWN: dict[type, str] = {
    **{mixer: runner.fields for mixer, runner in MIXERS.items()},
    ForwardSpec: "architecture n_vocab n_embd n_ctx_train embedding layers output_norm output embedding_scale "
    "position_embedding logit_scale logit_softcap idle segment_embedding embedding_norm side streams n_kept head",
    Layer: "mixers feed_forward attention_norm feed_forward_norm post_attention_norm post_feed_forward_norm "
    "parallel branch_scale out_attention_norm out_feed_forward_norm side out_scale laurel altup",
    XIELU: "alpha_n alpha_p beta eps",
    Temperature: "scale step offset",
    FeedForward: "n_ff down activation up gate gate_up cutoff",
    Experts: "n_ff n_expert n_used router gate up down activation gating selection_bias n_groups n_groups_used "
    "normalised scale weigh_input gate_bias up_bias down_bias shared shared_gate gate_up expert_scales apart",
    Apart: "norm router_norm router_scale out_norm shared_norm",
    Rope: "n_dims freq_base style freq_scale magnitude factors long_factors n_ctx_orig yarn",
    Yarn: "ext_factor beta_fast beta_slow",
    SharedKeys: "layer at",
    LearnedDistances: "table n_buckets",
    Convolution: "kernel size n_channels bias silu",
    LowRank: "rank down up bias",
    SideInput: "at size gate out norm",
    SideEmbedding: "size table project norm",
    Laurel: "rank left right norm",
    AltUp: "router router_norm predict correct scale n_streams",
    Streams: "count active spread merge",
    Head: "n_out pooling dense gelu norm out softmax",  # on the CPU: see `ranking`
    Norm: "weight eps kind bias",
    Linear: "weight bias",
}


def unknown_parts(value: object) -> Iterator[str]:
    """What of a description this backend does not carry out: names as `Attention.window`."""
    if isinstance(value, tuple):
        for item in value:
            yield from unknown_parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Mixer) and type(value) not in _KNOWN:
            yield f"layers of {type(value).__name__}"
            return
        known = _KNOWN.get(type(value), "").split()
        for field in fields(value):
            own = getattr(value, field.name)
            if field.name in known:
                yield from unknown_parts(own)
            elif field.default is MISSING or own != field.default:
                yield f"{type(value).__name__}.{field.name} = {own!r}"


def _activate(activation: Activation | XIELU, x: Any) -> Any:
    if isinstance(activation, XIELU):
        positive, negative = (
            functional.softplus(torch.tensor(a)).item() for a in (activation.alpha_p, activation.alpha_n)
        )
        below = torch.expm1(x.clamp(max=activation.eps)) - x
        return torch.where(x > 0, positive * x * x, (activation.beta + negative) * below) + activation.beta * x
    if activation is Activation.RELU:
        return functional.relu(x)
    if activation is Activation.RELU_SQUARED:
        return functional.relu(x).square()
    if activation is Activation.SILU:
        return functional.silu(x)
    if activation is Activation.GELU:
        return functional.gelu(x, approximate="tanh")
    raise QuantkitError(f"the torch backend does not know the activation {activation.name}")


def _gated(block: FeedForward | Experts, gate: Any, up: Any) -> Any:
    activation = block.activation
    if activation is Activation.CLAMPED_SILU:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if isinstance(block, FeedForward) and block.cutoff is not None:
        whole = gate.float()
        least = whole.mean(-1, keepdim=True) + whole.std(-1, correction=0, keepdim=True) * block.cutoff
        gate = functional.relu(whole - least).to(gate.dtype)
    return _activate(activation, gate) * up


class TorchLayer:
    """A layer that runs through torch."""

    def __init__(self, layer: Layer, spec: ForwardSpec, parts: TorchParts) -> None:
        self._layer, self._parts, self._n_embd = layer, parts, spec.n_embd
        self._mixers = [MIXERS[type(mixer)](mixer, parts) for mixer in layer.mixers]
        self._around = TorchAround(spec, layer, parts) if is_wide(spec, layer) else None

    @property
    def numbers(self) -> int:
        """How many numbers its activations hold for a token, about."""
        ff = self._layer.feed_forward
        of_experts = 2 * ff.n_used * (self._n_embd + 2 * ff.n_ff) if isinstance(ff, Experts) else 0
        return sum(mixer.numbers for mixer in self._mixers) + (0 if ff is None else 4 * ff.n_ff) + of_experts

    def load(self, to: Loading) -> None:
        """Ask for what the layer reads."""
        layer, ff, n_embd = self._layer, self._layer.feed_forward, self._n_embd
        for products in layer.products(n_embd):
            to.products(products)
        for norm, size in layer.norms(n_embd):
            to.norm(norm, size)
        for name, shape in layer.constants(n_embd).items():
            to.constant(name, shape)
        if isinstance(ff, Experts):
            for products in ff.stacked(n_embd):
                to.products(products)
            for name, (n_rows, n_in) in ff.biases(n_embd).items():
                to.matrix(name, n_rows, n_in)

    def run(self, rows: Any, span: slice) -> Any:
        """`rows` [n_seq, n_ctx, width] after the layer, at the positions of `span`."""
        if self._around is None:
            return self._run(rows, span, rows, {})
        kept: dict[int, Any] = {}
        active, streams = self._around.enter(rows)
        made = self._run(active, span, rows, kept)
        kept = {at: values[:, span] for at, values in kept.items()}
        return self._around.leave(made, streams[:, span], rows[:, span], kept)

    def _run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """What the layer makes of `x` [n_seq, n_ctx, n_embd], which was taken of `rows`."""
        layer, parts = self._layer, self._parts
        normed = parts.normed(layer.attention_norm, x)
        branches = [
            parts.product(mixer.run(normed, span, rows, kept), mixer.mixer.out).float() for mixer in self._mixers
        ]
        x = x[:, span]
        after = x
        if branches:
            branch = parts.normed(layer.post_attention_norm, sum(branches)) * layer.branch_scale
            if layer.laurel is not None:
                x, branch = x / math.sqrt(2), self._with_learned(layer.laurel, normed[:, span], branch)
            after = x + branch
        ff = layer.feed_forward
        if ff is None:
            return after
        after = parts.normed(layer.out_attention_norm, after)
        read = x if layer.parallel else after
        if isinstance(ff, FeedForward):
            branch = self._dense(ff, parts.normed(layer.feed_forward_norm, read)).float()
        elif ff.apart is None:
            normed = parts.normed(layer.feed_forward_norm, read)
            branch = self._beside(ff, normed) + self._experts(ff, normed, normed)
        else:
            router_read = parts.normed(ff.apart.router_norm, read) * ff.apart.router_scale
            branch = parts.normed(ff.apart.out_norm, self._experts(ff, parts.normed(ff.apart.norm, read), router_read))
            if ff.shared is not None:
                made = self._dense(ff.shared, parts.normed(layer.feed_forward_norm, read)).float()
                branch = branch + parts.normed(ff.apart.shared_norm, made)
        after = after + parts.normed(layer.post_feed_forward_norm, branch) * layer.branch_scale
        return parts.normed(layer.out_feed_forward_norm, after)

    def _with_learned(self, laurel: Laurel, read: Any, branch: Any) -> Any:
        """`branch` with the learned residual of what mixers `read`."""
        few = self._parts.product(read, laurel.left)
        made = self._parts.normed(laurel.norm, self._parts.product(few, laurel.right).float())
        return (branch + made + read) / math.sqrt(2)

    def _dense(self, ff: FeedForward, x: Any) -> Any:
        if ff.gate_up is not None:
            active = _gated(ff, *self._parts.product(x, ff.gate_up).chunk(2, dim=2))
        elif ff.gate is not None:
            active = _gated(ff, *self._parts.products(x, ff.gate, ff.up))
        else:
            assert ff.up is not None
            active = _activate(ff.activation, self._parts.product(x, ff.up))
        return self._parts.product(active, ff.down)

    # -- experts

    def _beside(self, ff: Experts, x: Any) -> Any:
        """What the block beside the experts makes of `x`; 0 where there is none."""
        if ff.shared is None:
            return 0
        branch = self._dense(ff.shared, x).float()
        return branch if ff.shared_gate is None else branch * self._parts.product(x, ff.shared_gate).float().sigmoid()

    def _experts(self, ff: Experts, x: Any, router_read: Any) -> Any:
        """What the experts make of `x` [n_seq, positions, n_embd], in float32, where the router reads `router_read`."""
        parts = self._parts
        rows = x.reshape(-1, x.shape[2]).to(parts.dtype)
        chosen, shares = self._route(ff, parts.product(router_read.reshape(rows.shape), ff.router).float())
        if ff.expert_scales is not None:
            shares = shares * parts.tensor(ff.expert_scales)[chosen]
        # The choices in the experts' order, those of one in the order of the rows: the device is waited for once.
        choices = chosen.flatten()
        counts = torch.bincount(choices, minlength=ff.n_expert).tolist()
        order = choices.argsort(stable=True)
        some = order // ff.n_used
        read = rows[some]
        if ff.weigh_input:
            read = read * shares.flatten()[order, None].to(read.dtype)
        self._observe_experts((ff.gate_up, ff.gate, ff.up), read, some, counts)
        made = [
            self._each_expert(name, biases, read, counts)
            for name, biases in ((ff.gate_up, None), (ff.gate, ff.gate_bias), (ff.up, ff.up_bias))
            if name is not None
        ]
        if ff.gate_up is not None:
            made = list(made[0].chunk(2, 1))
        active = _gated(ff, *made) if len(made) == 2 else _activate(ff.activation, made[0])
        self._observe_experts((ff.down,), active, some, counts)
        made_of = self._each_expert(ff.down, ff.down_bias, active, counts)
        branch = torch.zeros_like(x).view(rows.shape)
        for place, share in zip(order.argsort().view(chosen.shape).t(), shares.t(), strict=True):
            y = made_of[place].float()
            branch = branch + y if ff.weigh_input else torch.addcmul(branch, y, share[:, None])
        return branch.view(x.shape)

    def _observe_experts(self, names: tuple[str | None, ...], read: Any, some: Any, counts: list[int]) -> None:
        """Tell what each expert reads: of `read`, made of the rows `some`, as many as `counts` has for it."""
        present = tuple(name for name in names if name is not None)
        for e, (own, at) in enumerate(zip(read.split(counts), some.split(counts), strict=True)):
            self._parts.observe(present, own, e, at)

    def _each_expert(self, name: str, biases: str | None, read: Any, counts: list[int]) -> Any:
        """Each expert's rows of `read` times its own matrix of `name`, plus its row of `biases`, below each other."""
        parts = self._parts
        matrices = parts.weights.matrix(name).view(len(counts), -1, read.shape[1])
        bias = None if biases is None else parts.weights.matrix(biases)
        made = [
            parts.times(own, matrices[e], None if bias is None else bias[e])
            for e, own in enumerate(read.split(counts))
            if len(own)
        ]
        return torch.cat(made) if made else read.new_empty(0, matrices.shape[1])

    def _route(self, ff: Experts, logits: Any) -> tuple[Any, Any]:
        """The experts that each row of `logits` [rows, experts] chooses, and their shares: [rows, experts used]."""
        if ff.gating is Gating.SPARSE_MIXER:
            return _route_sparsely(ff.n_used, logits)
        if ff.gating is Gating.SIGMOID:
            shares = logits.sigmoid()
        else:
            shares = logits if ff.gating is Gating.CHOSEN else logits.softmax(1)
        # Where nothing is added to the shares, the logits are in their order, and do not become equal near 0 and 1.
        plain = ff.selection_bias is None and ff.n_groups == 1
        scores = logits if plain else shares
        if ff.selection_bias is not None:
            scores = scores + self._parts.tensor(ff.selection_bias)
        if ff.n_groups > 1:
            groups = scores.view(len(scores), ff.n_groups, -1)
            best = groups.topk(min(2, groups.shape[2]), dim=2)[0].sum(2).topk(ff.n_groups_used, dim=1)[1]
            left_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=groups.device).scatter(1, best, False)
            scores = groups.masked_fill(left_out[:, :, None], -torch.inf).view(scores.shape)
        chosen = scores.topk(ff.n_used, dim=1)[1]
        shares = shares.gather(1, chosen)
        if ff.gating is Gating.CHOSEN:
            shares = shares.softmax(1)
        elif ff.normalised:
            shares = shares / shares.sum(1, keepdim=True).clamp(min=_LEAST_SUM)
        return chosen, shares * ff.scale


def _route_sparsely(n_used: int, logits: Any) -> tuple[Any, Any]:
    """See `expert_kernels.route_sparsely`."""
    left, chosen, shares = logits, [], []
    for _ in range(n_used):
        best, index = left.max(1, keepdim=True)
        far = (best - logits) / torch.maximum(logits.abs(), best) > NEAR
        shares.append(left.masked_fill(far, -torch.inf).softmax(1).gather(1, index))
        chosen.append(index)
        left = left.scatter(1, index, -torch.inf)
    return torch.cat(chosen, 1), torch.cat(shares, 1)
