"""Feed-forward blocks, described: dense ones, mixtures of experts, and their nonlinearities."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from quantkit.architectures.products import Linear, Norm, Products, Shapes, named


class Activation(Enum):
    """The nonlinearity of a feed-forward block."""

    SILU = "silu"
    GELU = "gelu"  # the tanh approximation, as llama.cpp computes it
    RELU = "relu"
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
        return named(*((name, (self.n_expert, size)) for name, size in sizes))

    @property
    def constants(self) -> Shapes:
        """See `Mixer`."""
        return named((self.selection_bias, (self.n_expert,)), (self.expert_scales, (self.n_expert,)))
