"""How a measurement computes, what it is taken over, and what it gives: the parts that all measurements share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantkit.errors import QuantkitError

# Told how far a measurement is: what is done, of how much, and the result so far, None before there is one. Within a
# batch what is done is a fraction.
Progress = Callable[[float, int, "float | None"], None]

BACKENDS = ("numpy", "torch")
DEVICES = ("cpu", "cuda", "mps")
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What carries out a forward pass, and how much of the machine it may take.

    `backend` is numpy, or torch (the extra quantkit[torch]), which also takes `device` (cpu, cuda or mps; cuda:1 for
    the second GPU, cuda:0,cuda:1 for both) and `precision` (f32 or bf16); numpy computes on the CPU in float32.
    `threads` is the number of threads, all usable processors if None. `memory` bounds the bytes that numpy takes for
    weights and activations, half of what is available if None.

    Raises QuantkitError for names that are not known, combinations that cannot be, and less than one thread.
    """

    backend: str = "numpy"
    device: str = "cpu"
    precision: str = "f32"
    threads: int | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for what, name, known in (
            ("backend", self.backend, BACKENDS),
            *(("device", each.partition(":")[0], DEVICES) for each in self.device.split(",")),
            ("precision", self.precision, PRECISIONS),
        ):
            if name not in known:
                raise QuantkitError(f"there is no {what} {name!r}: use {', '.join(known[:-1])} or {known[-1]}")
        if self.backend == "numpy" and (self.device, self.precision) != ("cpu", "f32"):
            raise QuantkitError(
                f"the numpy backend computes on the CPU in f32, not on {self.device} in {self.precision}: use torch"
            )
        if "," in self.device and not all(each.startswith("cuda") for each in self.device.split(",")):
            raise QuantkitError(f"only GPUs compute together, as cuda:0,cuda:1, not {self.device}")
        if self.threads is not None and self.threads < 1:
            raise QuantkitError(f"cannot compute on {self.threads} threads: use 1 or more")
        if self.memory is not None and self.memory < 0:
            raise QuantkitError(f"cannot compute in {self.memory} bytes of memory")

    @property
    def buffer_size(self) -> int | None:
        """Bytes that the rows may take which are being quantized: half of the memory; None for any."""
        return None if self.memory is None else max(1, self.memory // 2)


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How a text is cut: into chunks of `n_ctx` tokens, at most `chunks` of them (all if None).

    `batch` is how many chunks run together, by memory if None; the results do not depend on it.
    Raises QuantkitError for sizes that cannot be.
    """

    n_ctx: int = 512
    chunks: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.n_ctx < 4:
            raise QuantkitError(f"a context of {self.n_ctx} tokens is too short to score: use 4 or more")
        if self.chunks is not None and self.chunks < 1:
            raise QuantkitError(f"cannot measure over {self.chunks} chunks: use 1 or more")
        if self.batch is not None and self.batch < 1:
            raise QuantkitError(f"cannot run {self.batch} chunks together: use 1 or more")


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    stderr: float

    @classmethod
    def mean(cls, x: np.ndarray) -> Estimate:
        """The mean of all numbers of `x`; llama-perplexity gives ten values or fewer no standard error, nor do we."""
        return cls(float(x.mean()), float(x.std()) / math.sqrt(x.size - 1) if x.size > 10 else 0.0)

    @classmethod
    def share(cls, n_true: int, n: int) -> Estimate:
        """`n_true` of `n` as a share of one, with a binomial's standard error."""
        p = n_true / n
        return cls(p, math.sqrt(p * (1 - p) / max(1, n - 1)))

    def exp(self) -> Estimate:
        """e to this value; infinity where that is too large for a float."""
        value = math.exp(self.value) if self.value < 709.0 else math.inf
        return Estimate(value, value * self.stderr if self.stderr else 0.0)
