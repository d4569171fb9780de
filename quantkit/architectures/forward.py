"""The forward pass of a model as plain data: what an evaluator needs to run it, and nothing of how.

An architecture makes a `ForwardSpec` from a model's GGUF metadata and tensor list. A backend (numpy, torch) carries it
out. Weights are named, not held; sizes are counts of numbers; shapes are those of arrays, rows first. What a field
means when it is None or at its default is "the model does not have this", so most architectures set few of them. The
parts of a layer are in `mixers`, `recurrent_mixers` and `feed_forward`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import TypeVar

from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.mixers import Mixer
from quantkit.architectures.products import Linear, Norm, Products, Shapes, named, norm_shapes

# Bounds on what a model can be: llama.cpp's LLAMA_MAX_LAYERS, and heads far larger than any.
MAX_LAYERS = 512
MAX_HEAD = 1 << 16
T = TypeVar("T")


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

    def norms(self, n_embd: int) -> list[tuple[Norm, int]]:
        """The norms of the layer and of its mixers, each with how many numbers it normalises, or has weights for."""
        others = [getattr(self, field.name) for field in fields(self) if field.name != "mixers"]
        own = [(norm, n_embd) for norm in _found(Norm, *others)]
        return own + [(norm, size) for mixer in self.mixers for norm, size in mixer.norms if norm is not None]

    def constants(self, n_embd: int) -> Shapes:
        """What else the layer and its mixers read: tensors that stay float32, whatever the precision of products."""
        return {
            **{name: shape for mixer in self.mixers for name, shape in mixer.constants.items()},
            **(self.feed_forward.constants if isinstance(self.feed_forward, Experts) else {}),
            **({} if self.altup is None else self.altup.constants(n_embd)),
            **named((self.out_scale, (1,))),
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
            **norm_shapes(self.norms(n_embd)),
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
            **norm_shapes((norm, n_embd) for norm in (self.embedding_norm, self.output_norm)),
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
