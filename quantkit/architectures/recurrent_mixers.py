"""Mixers that read a text in order and carry a state along, described.

Short convolutions, gated delta nets, state spaces, and RWKV's two kinds of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.architectures.mixers import Mixer
from quantkit.architectures.products import Linear, Norm, Products, Shapes, named


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
