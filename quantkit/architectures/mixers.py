"""Mixers, described: the parts of a layer that let a token see those before it, and the rotary embedding of most.

Attention, short convolutions, gated delta nets, state spaces and RWKV's memory. A mixer names its tensors, and says
what it computes with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from quantkit.architectures.products import Linear, Norm, Products, Shapes, named


class RopeStyle(Enum):
    """Which two numbers of a head are rotated together."""

    NORMAL = "normal"  # neighbours: (0, 1), (2, 3), ... as Llama's GGUF tensors are permuted for
    NEOX = "neox"  # the two halves: (0, n/2), (1, n/2 + 1), ...


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

    def factors_for(self, n_ctx: int) -> str | None:
        """The name of the factors for sequences of `n_ctx` tokens, if there are any."""
        long = self.long_factors is not None and n_ctx > self.n_ctx_orig
        return self.long_factors if long else self.factors


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
        return named((self.sinks, (self.n_head,)))


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
        return {self.kernel: (self.n_channels, self.size), **named((self.bias, (self.n_channels,)))}


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
            **named((self.norm.weight if self.norm is not None else None, (self.n_groups, group))),
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
        return {self.lerp: (6, self.width), **named(*((name, (self.width,)) for name in vectors))}


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
