"""The forward pass of a model as plain data: what an evaluator needs to run it, and nothing of how.

An architecture makes a `ForwardSpec` from a model's GGUF metadata and tensor list. A backend (numpy, torch) carries it
out. Weights are named, not held; sizes are counts of numbers; shapes are those of the GGUF tensors. What a field
means when it is None or at its default is "the model does not have this", so most architectures set few of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple, TypeVar

# Bounds on what a model can be: llama.cpp's LLAMA_MAX_LAYERS, and heads far larger than any.
MAX_LAYERS = 512
MAX_HEAD = 1 << 16
T = TypeVar("T")


class NormKind(Enum):
    """How a vector is normalised."""

    RMS = "rms"  # divided by its root mean square
    LAYER = "layer"  # mean taken away, divided by its standard deviation


class RopeStyle(Enum):
    """Which two numbers of a head are rotated together."""

    NORMAL = "normal"  # neighbours: (0, 1), (2, 3), ... as Llama's GGUF tensors are permuted for
    NEOX = "neox"  # the two halves: (0, n/2), (1, n/2 + 1), ...


class Activation(Enum):
    """The nonlinearity of a feed-forward block."""

    SILU = "silu"
    GELU = "gelu"  # the tanh approximation, as llama.cpp computes it
    RELU_SQUARED = "squared relu"
    CLAMPED_SILU = "clamped silu"  # gpt-oss's: within bounds, steeper, and with a gate that is added to


@dataclass(frozen=True)
class XIELU:
    """A learned nonlinearity (Huang and Schlag 2024), with the numbers as the model stores them.

    With p = softplus(alpha_p) and n = beta + softplus(alpha_n), x becomes p x^2 + beta x above 0, and
    n (e^min(x, eps) - 1 - x) + beta x below.
    """

    alpha_n: float
    alpha_p: float
    beta: float
    eps: float


class Gating(Enum):
    """How a router's logits become the shares of experts."""

    SOFTMAX = "softmax"  # over all experts
    SIGMOID = "sigmoid"  # of each by itself
    CHOSEN = "chosen"  # the softmax over the chosen alone
    SPARSE_MIXER = "sparse mixer"  # of each the softmax over those near it that are not chosen before (Liu et al. 2024)


@dataclass(frozen=True)
class Linear:
    """A matrix product, `x @ weight.T + bias`, by the names of its tensors."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """A normalisation, scaled by `weight` and shifted by `bias`, by the names of these tensors, if there are any."""

    weight: str | None
    eps: float
    kind: NormKind = NormKind.RMS
    bias: str | None = None


@dataclass(frozen=True)
class Yarn:
    """YaRN's mixing of interpolated and original frequencies (Peng et al. 2023), with ggml's parameters."""

    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    The first `n_dims` numbers of a head are rotated; pair i by the angle
    `position * freq_scale * freq_base ** (-2 i / n_dims) / factors[i]`, and multiplied by `magnitude`.
    `factors` names a tensor of n_dims / 2 numbers; for sequences of more than `n_ctx_orig` tokens `long_factors`, where
    there are any, take its place (LongRoPE). With `yarn`, `freq_scale` holds only for the slow pairs.
    """

    n_dims: int
    freq_base: float
    style: RopeStyle
    freq_scale: float = 1.0
    magnitude: float = 1.0
    factors: str | None = None
    long_factors: str | None = None
    n_ctx_orig: int = 0
    yarn: Yarn | None = None


@dataclass(frozen=True)
class Temperature:
    """Queries that grow with their position p.

    They are multiplied by 1 + `scale` * ln(floor((p + `offset`) / `step`) + 1).
    """

    scale: float
    step: int
    offset: int = 0


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of an earlier layer: its number, and from which column on a row holds them."""

    layer: int
    at: int


class Products(NamedTuple):
    """Matrices that are multiplied with the same rows, of `n_in` numbers: each with how many numbers it makes."""

    n_in: int
    linears: tuple[tuple[Linear, int], ...]

    @classmethod
    def of(cls, n_in: int, *linears: tuple[Linear | None, int]) -> Products:
        """Those of `linears` that there are."""
        return cls(n_in, tuple((linear, n_out) for linear, n_out in linears if linear is not None))

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices' names."""
        return tuple(linear.weight for linear, _ in self.linears)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the matrices and of what is added to what they make."""
        biases = {linear.bias: (n_out,) for linear, n_out in self.linears if linear.bias is not None}
        return {**{linear.weight: (n_out, self.n_in) for linear, n_out in self.linears}, **biases}


# Names of tensors, with their shapes as arrays have them: rows first. One number is a vector's length.
Shapes = dict[str, tuple[int, ...]]


def _named(*shapes: tuple[str | None, tuple[int, ...]]) -> Shapes:
    return {name: shape for name, shape in shapes if name is not None}


def _norm_shapes(norms: Iterable[tuple[Norm | None, int]]) -> Shapes:
    present = [(norm, (size,)) for norm, size in norms if norm is not None]
    return _named(*((name, shape) for norm, shape in present for name in (norm.weight, norm.bias)))


class Mixer(ABC):
    """What lets a token see those before it. Ends with the product `out`; `width` numbers of a row go into it.

    All tensors that it reads are in `products`, `norms` and `constants`, and backends load them by these.
    """

    out: Linear
    causal: bool = True

    @property
    @abstractmethod
    def width(self) -> int:
        """How many numbers the output product reads of a token."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Counts and sizes that cannot be less than 1."""

    @abstractmethod
    def products(self, n_embd: int) -> tuple[Products, ...]:
        """The matrices before the output product, those together that are multiplied with the same rows."""

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """Its norms, each with how many numbers it normalises, or has weights for."""
        return ()

    @property
    def constants(self) -> Shapes:
        """What else it reads: tensors that stay float32, whatever the precision of products."""
        return {}


@dataclass(frozen=True)
class Attention(Mixer):
    """Self-attention of one layer, causal unless a query sees later positions too.

    Either `q`, `k` and `v` are given, or `qkv`, one product whose rows are q's, then k's, then v's. `scale` multiplies
    q . k. `window` counts the positions that a query sees, itself included; where attention is not causal, half of
    them, at most, stand on either side. With `chunk` it sees none before the last
    multiple of that. `sinks` names a score of each head that belongs to no position. `softcap` c turns a score s into
    c * tanh(s / c). `q_norm` and `k_norm` run over each head before it is rotated, or after it with `norm_rotated`, and
    with `norm_whole` over all heads together. Queries, keys and values are clamped to `clamp` in magnitude. With
    `alibi`, scores fall by the distance from query to key, for each head with a slope of its own (ALiBi, Press et al.
    2022): the last slope of as many heads as the largest power of two among theirs is 2 to the power of minus `alibi`.
    With `gated` the product `q` makes a query and then a gate of each head, and what the head sees is multiplied with
    the gate's sigmoid. Without `v` values are what `k` makes, before it is normalised and rotated; `v_norm` runs over
    each head of values. With `shared` keys and values are those that another layer has made, and there is neither `k`
    nor `v`; a layer whose keys and values others use leaves them in the columns of a row from `kept_at` on.
    """

    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    scale: float
    out: Linear
    q: Linear | None = None
    k: Linear | None = None
    v: Linear | None = None
    qkv: Linear | None = None
    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None
    sinks: str | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_whole: bool = False
    norm_rotated: bool = False
    clamp: float | None = None
    temperature: Temperature | None = None
    causal: bool = True
    alibi: float | None = None
    gated: bool = False
    v_norm: Norm | None = None
    shared: SharedKeys | None = None
    kept_at: int | None = None

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_head * self.head_v

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_head, self.n_head_kv, self.head_k, self.head_v

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        n_q, n_k, n_v = self.n_head * self.head_k, self.n_head_kv * self.head_k, self.n_head_kv * self.head_v
        q = (self.q, n_q * 2 if self.gated else n_q)
        return (Products.of(n_embd, (self.qkv, n_q + n_k + n_v), q, (self.k, n_k), (self.v, n_v)),)

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """See `Mixer`."""
        n_q, n_k = (n_head if self.norm_whole else 1 for n_head in (self.n_head, self.n_head_kv))
        return (self.q_norm, n_q * self.head_k), (self.k_norm, n_k * self.head_k), (self.v_norm, self.head_v)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return _named((self.sinks, (self.n_head,)))


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Attention whose keys and values are made of one latent vector of each token (MLA, DeepSeek-AI 2024).

    `kv_down` makes the latent, of `n_latent` numbers, which `kv_norm` normalises, and a rotated key of `rope.n_dims`
    numbers that all heads share. A query has a part of `head_k` numbers, which is never rotated, and after it one of
    `rope.n_dims`, which is. `k_up` and `v_up` name tensors with one matrix for each head: the first takes a query's
    first part to the latents, where it meets them, the second makes values of `head_v` numbers of what was seen of the
    latents. Queries are made by `q`, or by `q_down`, `q_norm` and `q_up` through a latent of `n_latent_q` numbers.
    """

    n_head: int
    head_k: int
    head_v: int
    n_latent: int
    scale: float
    rope: Rope
    kv_down: Linear
    kv_norm: Norm
    k_up: str
    v_up: str
    out: Linear
    q: Linear | None = None
    n_latent_q: int = 0
    q_down: Linear | None = None
    q_norm: Norm | None = None
    q_up: Linear | None = None

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_head * self.head_v

    @property
    def n_queries(self) -> int:
        """How many numbers the queries of all heads are."""
        return self.n_head * (self.head_k + self.rope.n_dims)

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_head, self.head_k, self.head_v, self.n_latent, *((self.n_latent_q,) if self.q is None else ())

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`; `k_up` and `v_up` have the matrices of all heads below each other."""
        n_down = self.n_latent + self.rope.n_dims
        return (
            Products.of(n_embd, (self.q, self.n_queries), (self.q_down, self.n_latent_q), (self.kv_down, n_down)),
            *([Products.of(self.n_latent_q, (self.q_up, self.n_queries))] if self.q_up is not None else []),
            Products.of(self.head_k, (Linear(self.k_up), self.n_head * self.n_latent)),
            Products.of(self.n_latent, (Linear(self.v_up), self.n_head * self.head_v)),
        )

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """See `Mixer`."""
        return (self.kv_norm, self.n_latent), (self.q_norm, self.n_latent_q)


@dataclass(frozen=True)
class Convolution:
    """A causal convolution over the last `size` tokens, of each of `n_channels` by itself.

    `kernel` names a tensor with a row of `size` numbers for each channel, the oldest token's first. With `silu` what
    comes of it goes through that nonlinearity.
    """

    kernel: str
    size: int
    n_channels: int
    bias: str | None = None
    silu: bool = False

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return {self.kernel: (self.n_channels, self.size), **_named((self.bias, (self.n_channels,)))}


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """A convolution between two gates (LFM2): `project` makes b, c and x, and c * convolution(b * x) goes on."""

    project: Linear
    convolution: Convolution
    out: Linear

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.convolution.n_channels

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.convolution.n_channels, self.convolution.size

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        return (Products.of(n_embd, (self.project, 3 * self.width)),)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return self.convolution.constants


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """A gated delta net (Yang, Kautz and Hatamizadeh 2024): a matrix for each head, which forgets and is corrected.

    `qkv` makes queries and keys, of `n_head_k` heads of `head_k` numbers, then values, of `n_head` heads of `head_v`;
    after `convolution` queries and keys are divided by their lengths, with `eps` under the root, and queries by the
    root of `head_k`. Heads of values that share one of queries and keys are neighbours, or with `tiled` stand
    `n_head_k` apart. A head's matrix S [head_k, head_v] becomes d S + k (b (v - k d S)), and its result is q S: b is
    the sigmoid of what `beta` makes, ln d is `decay` times the softplus of what `alpha` makes, plus `dt_bias`.
    `beta_alpha` makes both in one product, side by side for each head of keys. The result goes through `norm`, head by
    head, and is multiplied with the SiLU of what `gate` makes.
    """

    n_head_k: int
    n_head: int
    head_k: int
    head_v: int
    eps: float
    qkv: Linear
    gate: Linear
    convolution: Convolution
    dt_bias: str
    decay: str
    norm: Norm
    out: Linear
    tiled: bool = False
    beta: Linear | None = None
    alpha: Linear | None = None
    beta_alpha: Linear | None = None

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_head * self.head_v

    @property
    def n_keys(self) -> int:
        """How many numbers the keys of all heads are."""
        return self.n_head_k * self.head_k

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_head_k, self.n_head, self.head_k, self.head_v, self.convolution.n_channels, self.convolution.size

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        return (
            Products.of(
                n_embd,
                (self.qkv, 2 * self.n_keys + self.width),
                (self.gate, self.width),
                (self.beta, self.n_head),
                (self.alpha, self.n_head),
                (self.beta_alpha, 2 * self.n_head),
            ),
        )

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """See `Mixer`."""
        return ((self.norm, self.head_v),)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return {**self.convolution.constants, self.dt_bias: (self.n_head,), self.decay: (self.n_head,)}


@dataclass(frozen=True)
class Mamba2(Mixer):
    """A state space whose heads each decay at one rate (Dao and Gu 2024).

    `project` makes a gate z and x, of `n_head` heads of `head` numbers each, then B and C, of `n_groups` groups of
    `n_state` numbers, and a step for each head; x, B and C go through `convolution`. Heads share the B and C of their
    group. With t the softplus of the step plus `dt_bias`, a head's matrix S [n_state, head] becomes
    e^(`decay` t) S + B (t x), and its result is C S + `skip` x. That is multiplied with the SiLU of z, and each
    group's share of the heads goes through `norm`, where there is one, whose weights are those of all.
    """

    n_head: int
    n_groups: int
    head: int
    n_state: int
    project: Linear
    convolution: Convolution
    dt_bias: str
    decay: str
    skip: str
    out: Linear
    norm: Norm | None = None

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_head * self.head

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_head, self.n_groups, self.head, self.n_state, self.convolution.n_channels, self.convolution.size

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        n_out = 2 * self.width + 2 * self.n_groups * self.n_state + self.n_head
        return (Products.of(n_embd, (self.project, n_out)),)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`; the norm's weights are here, in a row for each group."""
        group = self.width // max(1, self.n_groups)
        return {
            **self.convolution.constants,
            self.dt_bias: (self.n_head,),
            self.decay: (self.n_head, 1),
            self.skip: (self.n_head, 1),
            **_named((self.norm.weight if self.norm is not None else None, (self.n_groups, group))),
        }


@dataclass(frozen=True)
class Mamba(Mixer):
    """A selective state space of each channel (Gu and Dao 2023).

    `project` makes x and then a gate z, of `width` numbers each; x goes through `convolution`. `select` makes of it a
    step of `n_step` numbers, and B and C of `n_state`, each of which goes through its norm where there is one; `step`
    makes the steps of all channels, whose softplus t counts. A channel's state S [n_state] becomes e^(t A) S + t x B,
    where `decay` holds A [channels, n_state], and its result is S C + `skip` x, multiplied with the SiLU of z.
    """

    n_channels: int
    n_state: int
    n_step: int
    project: Linear
    convolution: Convolution
    select: Linear
    step: Linear
    decay: str
    skip: str
    out: Linear
    step_norm: Norm | None = None
    b_norm: Norm | None = None
    c_norm: Norm | None = None

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_channels

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_channels, self.n_state, self.n_step, self.convolution.n_channels, self.convolution.size

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        return (
            Products.of(n_embd, (self.project, 2 * self.n_channels)),
            Products.of(self.n_channels, (self.select, self.n_step + 2 * self.n_state)),
            Products.of(self.n_step, (self.step, self.n_channels)),
        )

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """See `Mixer`: those of the step, of B and of C, in the order of what `select` makes."""
        return (self.step_norm, self.n_step), (self.b_norm, self.n_state), (self.c_norm, self.n_state)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return {
            **self.convolution.constants,
            self.decay: (self.n_channels, self.n_state),
            self.skip: (self.n_channels,),
        }


@dataclass(frozen=True)
class LowRank:
    """A product with two matrices, of `rank` numbers in between, and the name of what is added in float32."""

    rank: int
    down: Linear
    up: Linear
    bias: str | None

    def products(self, n_in: int, n_out: int) -> tuple[Products, Products]:
        """Both, of rows of `n_in` numbers to `n_out`."""
        return Products.of(n_in, (self.down, self.rank)), Products.of(self.rank, (self.up, n_out))


@dataclass(frozen=True)
class TimeMix(Mixer):
    """RWKV 7's memory (Peng et al. 2025): a matrix for each head, which decays, and learns a value for a key.

    Six mixtures of a token with the one before it, by the rows of `lerp`, go into `receptance` r, `decay`, `key` k,
    `value` v, `rate` and `gate`. A decay is e^(-e^-0.5 sigmoid(d)), d what `decay` makes of its tanh in between; a rate
    a and the share of `values` are sigmoids. v is mixed with that of the model's first layer by this share; the first
    layer, which has no `values`, leaves its own in the columns of a row from `values_at` on. q is k times `key_scale`,
    brought to the length one in each head, and k is then multiplied with 1 + (a - 1) times `key_rate`. A head's matrix
    S [values, keys] becomes S diag(decay) - (S q) (q a)T + v kT, and its result is S r. That goes through `norm`, head
    by head; v times the sum of r k `bonus` is added, and all is multiplied with what `gate` makes of its sigmoid in
    between.
    """

    n_head: int
    head: int
    lerp: str
    receptance: Linear
    key: Linear
    value: Linear
    out: Linear
    decay: LowRank
    rate: LowRank
    gate: LowRank
    values: LowRank | None
    key_scale: str
    key_rate: str
    bonus: str
    norm: Norm
    values_at: int

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_head * self.head

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_head, self.head, *(part.rank for part in self.low_ranks)

    @property
    def low_ranks(self) -> tuple[LowRank, ...]:
        """The products with two matrices."""
        return tuple(part for part in (self.decay, self.rate, self.gate, self.values) if part is not None)

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        whole = (Products.of(n_embd, (linear, self.width)) for linear in (self.receptance, self.key, self.value))
        low = (products for part in self.low_ranks for products in part.products(n_embd, self.width))
        return *whole, *low

    @property
    def norms(self) -> tuple[tuple[Norm | None, int], ...]:
        """See `Mixer`; a head is normalised by itself, with its own of the weights."""
        return ((self.norm, self.width),)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        vectors = self.key_scale, self.key_rate, self.bonus, *(part.bias for part in self.low_ranks)
        return {self.lerp: (6, self.width), **_named(*((name, (self.width,)) for name in vectors))}


@dataclass(frozen=True)
class ChannelMix(Mixer):
    """RWKV's feed-forward block: `out` of the squared ReLU of what `key` makes of a token mixed with the one before."""

    n_embd: int
    n_ff: int
    lerp: str
    key: Linear
    out: Linear

    @property
    def width(self) -> int:
        """See `Mixer`."""
        return self.n_ff

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Mixer`."""
        return self.n_embd, self.n_ff

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """See `Mixer`."""
        return (Products.of(n_embd, (self.key, self.n_ff)),)

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return {self.lerp: (self.n_embd,)}


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward block: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.

    `gate_up` is one product whose rows are the gate's, then the other's. With `cutoff` what the gate makes of a token
    counts only by how much it is above its mean and so many of its standard deviations.
    """

    n_ff: int
    down: Linear
    activation: Activation | XIELU = Activation.SILU
    up: Linear | None = None
    gate: Linear | None = None
    gate_up: Linear | None = None
    cutoff: float | None = None

    def products(self, n_embd: int) -> tuple[Products, Products]:
        """What makes the numbers in between, and what is made of them."""
        up = (self.gate_up, 2 * self.n_ff), (self.gate, self.n_ff), (self.up, self.n_ff)
        return Products.of(n_embd, *up), Products.of(self.n_ff, (self.down, n_embd))


@dataclass(frozen=True)
class Apart:
    """Norms of experts that stand beside a dense block (Gemma 4), where the layer's own norm is the dense block's.

    Experts read x through `norm`, their router reads it through `router_norm`, times `router_scale`. What experts make
    goes through `out_norm`, what the dense block makes through `shared_norm`, before the two are added.
    """

    norm: Norm
    router_norm: Norm
    router_scale: float
    out_norm: Norm
    shared_norm: Norm


@dataclass(frozen=True)
class Experts:
    """A mixture of experts. `gate`, `up` and `down` name tensors with one matrix for each; without a gate, as
    `FeedForward`. Their biases, where they have any, are rows of further tensors.

    `gating` makes shares of the logits of `router`. Of `n_expert`, those `n_used` with the largest shares are chosen;
    `selection_bias` names what is added to shares for that comparison only. Where there are `n_groups` of experts, the
    choice is among the `n_groups_used` groups whose two largest sum highest. The shares of the chosen are scaled to sum
    to one if `normalised`, then multiplied by `scale`; they multiply what an expert makes, with `weigh_input` what it
    reads. `shared` is a block that all tokens go through beside, times the sigmoid of `shared_gate` where there is one.
    `gate_up` names a tensor with both projections of each expert, the gate's rows first. `expert_scales` names a number
    for each expert, which multiplies what it makes. With `apart` the experts, their router and the shared block each
    have norms of their own.
    """

    n_ff: int
    n_expert: int
    n_used: int
    router: Linear
    gate: str | None
    up: str | None
    down: str
    activation: Activation = Activation.SILU
    gating: Gating = Gating.SOFTMAX
    selection_bias: str | None = None
    n_groups: int = 1
    n_groups_used: int = 1
    normalised: bool = True
    scale: float = 1.0
    weigh_input: bool = False
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    shared: FeedForward | None = None
    shared_gate: Linear | None = None
    gate_up: str | None = None
    expert_scales: str | None = None
    apart: Apart | None = None

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """The matrices that all tokens go through."""
        shared = () if self.shared is None else self.shared.products(n_embd)
        gate = () if self.shared_gate is None else (Products.of(n_embd, (self.shared_gate, 1)),)
        return Products.of(n_embd, (self.router, self.n_expert)), *gate, *shared

    def stacked(self, n_embd: int) -> tuple[Products, Products]:
        """The experts' own matrices, as `FeedForward.products`; a tensor has those of all below each other."""
        n_rows = self.n_ff * self.n_expert
        up = (self.gate_up, 2 * n_rows), (self.gate, n_rows), (self.up, n_rows)
        return (
            Products.of(n_embd, *((None if name is None else Linear(name), n_out) for name, n_out in up)),
            Products.of(self.n_ff, (Linear(self.down), n_embd * self.n_expert)),
        )

    def biases(self, n_embd: int) -> Shapes:
        """The experts' own biases: a row for each of them."""
        sizes = (self.gate_bias, self.n_ff), (self.up_bias, self.n_ff), (self.down_bias, n_embd)
        return _named(*((name, (self.n_expert, size)) for name, size in sizes))

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return _named((self.selection_bias, (self.n_expert,)), (self.expert_scales, (self.n_expert,)))


@dataclass(frozen=True)
class SideInput:
    """What a layer takes of its own embedding of a token (Gemma 3n).

    `gelu(gate(x))` times the `size` numbers of a row from column `at` on goes through `out` and `norm`, and is added.
    """

    at: int
    size: int
    gate: Linear
    out: Linear
    norm: Norm


@dataclass(frozen=True)
class Laurel:
    """A learned residual (LAuReL, Menghani et al. 2024): y and `norm(right(left(y)))`, of `rank` numbers between.

    y is what the mixers read. It is added after them, and the sum is divided by the root of two.
    """

    rank: int
    left: Linear
    right: Linear
    norm: Norm


@dataclass(frozen=True)
class AltUp:
    """How a layer that works on one of several streams moves the others (AltUp, Baykal et al. 2023).

    m(x) is the tanh of what `router` makes of `router_norm(x)` over the length of x: a number for each stream.
    Before the layer each stream gets all streams added, by the coefficients that `predict` makes of m of the active
    one, a row for each stream. After it each gets what the layer changed added, by one and what `correct` makes of m of
    the layer's result. What the layer's own embedding adds goes to all but the first; it comes of the active stream
    times `scale`.
    """

    router: str
    router_norm: Norm
    predict: str
    correct: str
    scale: str
    n_streams: int

    def constants(self, n_embd: int) -> Shapes:
        """See `Mixer`."""
        n = self.n_streams
        return {self.router: (n, n_embd), self.predict: (n * n, n), self.correct: (n, n), self.scale: (n_embd,)}


@dataclass(frozen=True)
class Layer:
    """One block of the model.

    Usually `x += mix(attention_norm(x))`, then `x += feed_forward(feed_forward_norm(x))`, where what is mixed is the
    sum of all `mixers`; with none of them, or without `feed_forward`, that half is left out. A norm that is None is
    left out; the `post_` norms run on a branch before it is added, and the `out_` norms on x after that. With
    `parallel` both branches read the same x. `branch_scale` multiplies each branch before it is added. Then `side` is
    added, and all is multiplied with the number `out_scale`. With `altup` x is one of the model's streams.
    """

    mixers: tuple[Mixer, ...]
    feed_forward: FeedForward | Experts | None
    attention_norm: Norm | None
    feed_forward_norm: Norm | None
    post_attention_norm: Norm | None = None
    post_feed_forward_norm: Norm | None = None
    parallel: bool = False
    branch_scale: float = 1.0
    out_attention_norm: Norm | None = None
    out_feed_forward_norm: Norm | None = None
    side: SideInput | None = None
    out_scale: str | None = None
    laurel: Laurel | None = None
    altup: AltUp | None = None

    def products(self, n_embd: int) -> tuple[Products, ...]:
        """The layer's matrices, those together that are multiplied with the same rows, but for those of experts."""
        found: list[Products] = []
        for mixer in self.mixers:
            found += [*mixer.products(n_embd), Products.of(mixer.width, (mixer.out, n_embd))]
        if self.feed_forward is not None:
            found += self.feed_forward.products(n_embd)
        if self.laurel is not None:
            rank = self.laurel.rank
            found += [Products.of(n_embd, (self.laurel.left, rank)), Products.of(rank, (self.laurel.right, n_embd))]
        if self.side is not None:
            size = self.side.size
            found += [Products.of(n_embd, (self.side.gate, size)), Products.of(size, (self.side.out, n_embd))]
        return tuple(found)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The names of all matrices, those of experts last, those together that are multiplied with the same rows."""
        n_embd = 0  # names are the same whatever the size
        stacked = self.feed_forward.stacked(n_embd) if isinstance(self.feed_forward, Experts) else ()
        return tuple(products.names for products in (*self.products(n_embd), *stacked))

    def norms(self, n_embd: int) -> list[tuple[Norm | None, int]]:
        """The norms of the layer and of its mixers, each with how many numbers it normalises, or has weights for."""
        others = [getattr(self, field.name) for field in fields(self) if field.name != "mixers"]
        own = [(norm, n_embd) for norm in _found(Norm, *others)]
        return [*own, *(sized for mixer in self.mixers for sized in mixer.norms)]

    def constants(self, n_embd: int) -> Shapes:
        """What else the layer and its mixers read: tensors that stay float32, whatever the precision of products."""
        return {
            **{name: shape for mixer in self.mixers for name, shape in mixer.constants.items()},
            **(self.feed_forward.constants if isinstance(self.feed_forward, Experts) else {}),
            **({} if self.altup is None else self.altup.constants(n_embd)),
            **_named((self.out_scale, (1,))),
        }

    def shapes(self, n_embd: int) -> Shapes:
        """All tensors that the layer reads."""
        ff = self.feed_forward
        stacked = ff.stacked(n_embd) if isinstance(ff, Experts) else ()
        return {
            **{
                name: shape
                for products in (*self.products(n_embd), *stacked)
                for name, shape in products.shapes.items()
            },
            **(ff.biases(n_embd) if isinstance(ff, Experts) else {}),
            **_norm_shapes(self.norms(n_embd)),
            **self.constants(n_embd),
        }


@dataclass(frozen=True)
class SideEmbedding:
    """An embedding of each token for every layer (Gemma 3n): `size` numbers each, in one row of `table`.

    The row times the root of `size` and, of each layer, `norm` of what `project` makes of the token's embedding, over
    the root of that one's length, are added, and divided by the root of two. They stand in a row after the streams.
    """

    size: int
    table: str
    project: Linear
    norm: Norm


@dataclass(frozen=True)
class Streams:
    """Several streams of n_embd numbers side by side, of which layers work on the one called `active` (AltUp).

    All but the first begin as its product with a matrix of `spread`, and end as one with a matrix of `merge`, each
    brought to the length of the first, or of the active one; the mean of all is the result.
    """

    count: int
    active: int
    spread: str
    merge: str


class Pooling(Enum):
    """Which of a text's vectors make one."""

    MEAN = "mean"  # all of them
    FIRST = "cls"
    LAST = "last"


@dataclass(frozen=True)
class Head:
    """A classifier of texts: what follows the last layer, and its norm, in a reranker.

    The text's vector, by `pooling`, goes through `dense` and tanh, or with `gelu` that, through `norm`, and through
    `out`, which makes `n_out` scores; without `out` `dense` makes them. With `softmax` they become probabilities.
    """

    n_out: int
    pooling: Pooling
    dense: Linear | None = None
    gelu: bool = False
    norm: Norm | None = None
    out: Linear | None = None
    softmax: bool = False

    def shapes(self, n_embd: int) -> Shapes:
        """Its matrices and what is added after them."""
        return Products.of(n_embd, (self.dense, n_embd if self.out else self.n_out), (self.out, self.n_out)).shapes


@dataclass(frozen=True)
class ForwardSpec:
    """The forward pass of a model, from token ids to logits.

    `embedding` and `position_embedding` name tensors whose rows are looked up and added; `embedding_scale` multiplies
    the token's. The first row of `segment_embedding` is added to all, and `embedding_norm` runs on the sum. `output` is
    the embedding's own tensor where the two are tied. `logit_scale` multiplies logits, then `logit_softcap` bends them
    as `Attention.softcap` does scores. `idle` are tensors that a forward pass leaves alone: multi-token-prediction
    layers. Rows that go from layer to layer hold the `streams`, or one; then what `side` makes for each layer; then
    `n_kept` numbers of keys and values that several layers use. `head` scores texts.
    """

    architecture: str
    n_vocab: int
    n_embd: int
    n_ctx_train: int
    embedding: str
    layers: tuple[Layer, ...]
    output_norm: Norm
    output: Linear
    embedding_scale: float = 1.0
    position_embedding: str | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    idle: tuple[str, ...] = ()
    segment_embedding: str | None = None
    embedding_norm: Norm | None = None
    side: SideEmbedding | None = None
    streams: Streams | None = None
    n_kept: int = 0
    head: Head | None = None

    @property
    def width(self) -> int:
        """How many numbers of a token go from layer to layer."""
        n_streams = self.n_embd * (self.streams.count if self.streams else 1)
        return n_streams + (len(self.layers) * self.side.size if self.side else 0) + self.n_kept

    @property
    def causal(self) -> bool:
        """Whether no token sees later ones, so that the model can predict what comes next."""
        return all(mixer.causal for layer in self.layers for mixer in layer.mixers)

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the token embedding."""
        return self.output.weight == self.embedding

    @cached_property
    def matrices(self) -> frozenset[str]:
        """The names of all tensors that activations are multiplied with, the embedding and the head not among them."""
        output = () if self.tied else (self.output.weight,)
        names = (name for layer in self.layers for group in layer.inputs for name in group)
        return frozenset([*names, *output])

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of all tensors that the forward pass reads."""
        parts = (getattr(self, field.name) for field in fields(self) if field.name != "architecture")
        return frozenset(_found(str, *parts))

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the tensors, but for tables whose rows are looked up and what stands around the layers."""
        n_embd = self.n_embd
        return {
            self.embedding: (self.n_vocab, n_embd),
            **Products.of(n_embd, (self.output, self.n_vocab)).shapes,
            **_norm_shapes((norm, n_embd) for norm in (self.embedding_norm, self.output_norm)),
            **({} if self.head is None else self.head.shapes(n_embd)),
            **{name: shape for layer in self.layers for name, shape in layer.shapes(n_embd).items()},
        }


def _found(kind: type[T], *values: object) -> Iterator[T]:
    """All of `kind` that a description holds."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, tuple):
            yield from _found(kind, *value)
        elif is_dataclass(value):
            yield from _found(kind, *(getattr(value, field.name) for field in fields(value)))
