"""What lets a token see those before it, as the engine runs it: what all kinds of mixers share.

A mixer keeps what it needs of the tokens that it has read in arrays, its memory, so that generation goes on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from quantkit.architectures.mixers import Mixer, Rope
from quantkit.architectures.products import Norm
from quantkit.evaluate.parts import Parts
from quantkit.evaluate.threads import Each

# Cosines and sines [positions, pairs] of a rotary embedding, from the first position that is read on.
Tables = Callable[["Rope | None"], "tuple[np.ndarray, np.ndarray]"]
# What a mixer remembers of the tokens that it has read, of one sequence.
Memory = tuple[np.ndarray, ...]
M = TypeVar("M", bound=Mixer)


class Part(NamedTuple):
    """The next tokens of a sequence: their `rows` among those of all, their `positions`, and what is remembered."""

    rows: slice
    positions: slice
    memory: Memory


class MixerRunner(ABC, Generic[M]):
    """A mixer, ready to run on parts of a batch from several threads.

    `parts` has its weights, decoded; `index` tells the mixers of a layer apart.
    """

    def __init__(self, mixer: M, index: int, norm: Norm | None, parts: Parts, tables: Tables) -> None:
        self.mixer, self.index, self.norm, self.parts, self.tables = mixer, index, norm, parts, tables
        self.out = parts.product(mixer.out.weight)
        self.load()

    @staticmethod
    @abstractmethod
    def unsupported(mixer: M) -> Iterable[str]:
        """What of `mixer` cannot be computed, each in a few words."""

    @staticmethod
    @abstractmethod
    def memory(mixer: M, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of what is remembered of at most `n_ctx` tokens; zeros before the first."""

    @abstractmethod
    def load(self) -> None:
        """Take the weights from `parts`, as they are needed."""

    @abstractmethod
    def run(
        self,
        x: np.ndarray,
        span: tuple[int, int],
        each: Each,
        at: int,
        continued: Sequence[Part] | None,
        carried: np.ndarray | None = None,
    ) -> np.ndarray:
        """What the output product reads of each sequence of `x` [n_seq, n_ctx, n_embd] at positions of `span`.

        The result is [n_seq * positions, width], the workspace's. `each` runs what is made of parts. The first row of
        `x` is row `at` of the batch. Sequences begin with `x`, unless `continued` gives them: then `x` is
        [1, rows, n_embd] and `span` all of it. Else `carried` [n_seq, n_ctx, width], where layers share keys and
        values, holds those.
        """

    def normed_blocks(self, x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of `x` [rows, n_embd], normalised, in blocks, each with the number of its first row."""
        for start, block in self.parts.blocks(x):
            yield start, self.parts.normed(self.norm, block, self.parts.take("normed", *block.shape))

    def mixed(self, *shape: int) -> np.ndarray:
        """Space for the result."""
        return self.parts.take(f"mixed {self.index}", *shape)


def positioned(start: int, n: int, lengths: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """`n` rows from row `start` on of sequences of so many rows each, cut by sequence.

    Gives the sequence, which of its rows comes first, which of the `n` that is, and how many there are.
    """
    done = before = 0
    for seq, length in enumerate(lengths):
        first = start + done - before
        if first < length and done < n:
            count = min(n - done, length - first)
            yield seq, first, done, count
            done += count
        before += length
