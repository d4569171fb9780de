"""Where a long run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step of `phase`: calibrate, choose types or quantize.

    In layer `layer` of `n_layer` (which is the output matrix; 0 of 0 where the layers are not run one by one) at tensor
    `tensor`, "" between them. `done` of the phase's `total` units of work, of about the same time each, are done.
    """

    phase: str
    layer: int
    n_layer: int
    tensor: str
    done: float
    total: float

    @property
    def where(self) -> str:
        """The layer and the tensor in words."""
        if self.n_layer == 0:
            return self.tensor
        layer = "output" if self.layer == self.n_layer else f"layer {self.layer + 1} of {self.n_layer}"
        return f"{layer} {self.tensor}".rstrip()
