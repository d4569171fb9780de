"""Matrix products and norms by the names of their tensors: what all parts of a forward pass are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

# Names of tensors, with their shapes as arrays have them: rows first. One number is a vector's length.
Shapes = dict[str, tuple[int, ...]]


class NormKind(Enum):
    """How a vector is normalised."""

    RMS = "rms"  # divided by its root mean square
    LAYER = "layer"  # mean taken away, divided by its standard deviation


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
    def shapes(self) -> Shapes:
        """The shapes of the matrices and of what is added to what they make."""
        biases = {linear.bias: (n_out,) for linear, n_out in self.linears if linear.bias is not None}
        return {**{linear.weight: (n_out, self.n_in) for linear, n_out in self.linears}, **biases}


def named(*shapes: tuple[str | None, tuple[int, ...]]) -> Shapes:
    """Those of `shapes` that have a name."""
    return {name: shape for name, shape in shapes if name is not None}


def norm_shapes(norms: Iterable[tuple[Norm | None, int]]) -> Shapes:
    """The shapes of the weights and biases of norms of so many numbers."""
    present = [(norm, (size,)) for norm, size in norms if norm is not None]
    return named(*((name, shape) for norm, shape in present for name in (norm.weight, norm.bias)))
