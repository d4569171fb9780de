"""Mixers, described: the parts of a layer that let a token see those before it.

A mixer names its tensors, and says what it computes with them. Here are attention and its rotation; mixers that carry a
state along are in `recurrent_mixers`.
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
class LearnedDistances:
    """What scores gain by how far a key stands before or after the query, as T5 learns it (Raffel et al. 2020).

    `table` names a tensor of `n_buckets` rows with a number for each head. Half of the rows are for keys after the
    query; of each half, one in two is for one distance, and the others for longer and longer ranges, up to 128.
    """

    table: str
    n_buckets: int


@dataclass(frozen=True)
class Attention(Mixer):
    """Self-attention of one layer, causal unless a query sees later positions too.

    Either `q`, `k` and `v` are given, or `qkv`, one product whose rows are q's, then k's, then v's. `scale` multiplies
    q . k. `window` counts the positions that a query sees, itself included; where attention is not causal, half of
    them, at most, stand on either side. With `chunk` it sees none before the last multiple of that. `sinks` names a
    score of each head that belongs to no position. `softcap` c turns a score s into c * tanh(s / c). `q_norm` and
    `k_norm` run over each head before it is rotated, or after it with `norm_rotated`, and with `norm_whole` over all
    heads together. Queries, keys and values are clamped to `clamp` in magnitude. With `alibi`, scores fall by the
    distance from query to key, for each head with a slope of its own (ALiBi, Press et al. 2022): the last slope of as
    many heads as the largest power of two among theirs is 2 to the power of minus `alibi`. With `distances` they gain
    what is learned of it. With `gated` the product `q` makes a query and then a gate of each head, and what the head
    sees is multiplied with the gate's sigmoid. Without `v` values are what `k` makes, before it is normalised and
    rotated; `v_norm` runs over each head of values. With `shared` keys and values are those that another layer has
    made, and there is neither `k` nor `v`; a layer whose keys and values others use leaves them in the columns of a row
    from `kept_at` on.
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
    distances: LearnedDistances | None = None
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
        learned = self.distances
        distances = () if learned is None else ((learned.table, (learned.n_buckets, self.n_head)),)
        return named((self.sinks, (self.n_head,)), *distances)


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
