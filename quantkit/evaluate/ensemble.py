"""Models that are measured together over chunks of a text: here, batch by batch, or by the workers of a cluster.

What is measured of a chunk does not depend on where, nor on what else is measured with it, to the last bit: see
`Model.exactly`. What is summed over chunks is summed in their order, so the results of a cluster are those of this
machine, where its processors are of one kind.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from quantkit.architectures import forward_spec
from quantkit.architectures.forward import ForwardSpec
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import AnyModel, load
from quantkit.evaluate.model import Model
from quantkit.evaluate.parts import ROWS, aligned
from quantkit.evaluate.settings import Compute, Progress
from quantkit.machine import available_memory
from quantkit.sources.source import TensorSource, open_model

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

log = logging.getLogger(__name__)

R = TypeVar("R")
# What is measured of some chunks: called with the models, their tokens, int32 [n, n_ctx], and which chunk is the first.
Measure = Callable[[Sequence[Model], np.ndarray, int], R]

# The fewest tokens that a worker gets at a time: a weight is decoded once for them.
_TASK = 4096


class Ran(NamedTuple):
    """What computed a measurement: see `Model`. `memory` is the most that a process took, in bytes."""

    backend: str
    precision: str
    blas: str
    memory: int | None

    @classmethod
    def of(cls, model: Model) -> Ran:
        """What `model` computes with, and the memory that it took until now."""
        return cls(model.backend, model.precision, model.blas, model.peak_memory())


class Ensemble:
    """`models` that run together as `compute` says, and share its memory; on `cluster`'s workers if that is given.

    `sources` and `specs` are theirs. Raises QuantkitError as `backends.load` does, and, with a cluster, for models that
    are loaded here already or that its workers cannot open.
    """

    def __init__(
        self, models: Sequence[AnyModel], compute: Compute | None = None, cluster: Cluster | None = None
    ) -> None:
        self._cluster, self.models = cluster, list[Model]()
        if cluster is None:
            budget = available_memory() // 2 if compute is None or compute.memory is None else compute.memory
            share = replace(compute or Compute(), memory=budget // len(models))
            self.models = [
                one if isinstance(one, Model) and compute is None else load(one, share if len(models) > 1 else compute)
                for one in models
            ]
            self.sources: list[TensorSource] = [model.source for model in self.models]
            self.specs: list[ForwardSpec] = [model.spec for model in self.models]
            if not any(isinstance(one, Model) for one in models):
                _take_turns(self.models, budget)
            self.memory = self.models[0].memory
            return
        from quantkit.pipeline.cluster import packed

        for one in models:
            if isinstance(one, Model):
                raise QuantkitError(f"{one.source.label}: is loaded here already and cannot be sent to workers")
        self.sources = [open_model(one) for one in models if not isinstance(one, Model)]
        self.specs = [forward_spec(source.metadata, source.tensors) for source in self.sources]
        self._packed, self._compute = tuple(packed(source) for source in self.sources), compute or Compute()
        self._ran: set[Ran] = set()
        self.memory = available_memory() // 2

    @property
    def ran(self) -> Ran:
        """What the measurements until now were computed with."""
        if self._cluster is None:
            return Ran.of(self.models[0])
        kinds = self._ran or {Ran(self._compute.backend, self._compute.precision, "", None)}
        blas = ", ".join(sorted({each.blas for each in kinds}))
        one = next(iter(kinds))
        return Ran(one.backend, one.precision, blas, max(each.memory or 0 for each in kinds) or None)

    def batch(self, n_ctx: int, wanted: int | None = None, most: int | None = None) -> int:
        """How many chunks of `n_ctx` tokens to run together: about `wanted`, by memory if None, not above `most`."""
        if self._cluster is not None:
            tokens = max(_TASK, ROWS * self._cluster.threads)
            step = wanted or max(1, tokens // n_ctx)
        else:
            step = wanted or min(model.batch(n_ctx) for model in self.models)
        return whole_groups(step if most is None else min(step, most), n_ctx, up=wanted is not None)

    def run(
        self,
        tokens: np.ndarray,
        measure: Measure[R],
        step: int,
        *,
        stops: int | None = None,
        progress: Progress | None = None,
        so_far: Callable[[], float | None] = lambda: None,
    ) -> Iterator[tuple[slice, R]]:
        """What `measure` gives of the chunks `tokens` [n, n_ctx], in their order: which chunks, and the result.

        `step` chunks run together, as `batch` said; none together that are before and after a multiple of `stops`.
        `measure` is pickled for workers. `progress` is told of chunks, and of the value that `so_far` gives.
        """
        parts = []
        for start in range(0, len(tokens), stops or len(tokens)):
            stop = min(len(tokens), start + (stops or len(tokens)))
            parts += [slice(at, min(at + step, stop)) for at in range(start, stop, step)]
        each = self._run_here if self._cluster is None else self._run_there
        yield from each(tokens, parts, measure, progress or (lambda *_: None), so_far)

    def _run_here(
        self,
        tokens: np.ndarray,
        parts: Sequence[slice],
        measure: Measure[R],
        progress: Progress,
        so_far: Callable[[], float | None],
    ) -> Iterator[tuple[slice, R]]:
        def within(model: int, share: float) -> None:
            done = (part.stop - part.start) * (model + share) / len(self.models)
            progress(part.start + done, len(tokens), so_far())

        for part in parts:
            with ExitStack() as stack:
                for i, model in enumerate(self.models):
                    stack.enter_context(model.telling(partial(within, i)))
                    stack.enter_context(model.exactly(tokens.shape[1]))
                result = measure(self.models, tokens[part], part.start)
            yield part, result
            progress(part.stop, len(tokens), so_far())

    def _run_there(
        self,
        tokens: np.ndarray,
        parts: Sequence[slice],
        measure: Measure[R],
        progress: Progress,
        so_far: Callable[[], float | None],
    ) -> Iterator[tuple[slice, R]]:
        from quantkit.pipeline.cluster import Task

        assert self._cluster is not None
        tasks = [
            Task(
                f"chunks {part.start}-{part.stop - 1}",
                measure_chunks,
                (self._packed, self._compute, measure, tokens[part], part.start),
            )
            for part in parts
        ]
        waiting: dict[int, R] = {}
        done = following = 0
        for number, (result, ran) in self._cluster.run(tasks):
            if self._ran and ran.blas not in {each.blas for each in self._ran}:
                log.warning("a worker multiplies by %s, others by %s: last digits may differ", ran.blas, self.ran.blas)
            self._ran.add(ran)
            waiting[number] = result
            done += parts[number].stop - parts[number].start
            while following in waiting:
                yield parts[following], waiting.pop(following)
                following += 1
            progress(done, len(tokens), so_far())


def whole_groups(n: int, n_ctx: int, up: bool = False) -> int:
    """`n` chunks in whole groups of those that go through products together: fewer if possible, more with `up`."""
    group = aligned(n_ctx)
    return max(group, (-(-n // group) if up else n // group) * group)


# Workers run one measurement at a time, on all their threads: models are large.
_alone = threading.Lock()


def measure_chunks(
    sources: tuple[bytes, ...], compute: Compute, measure: Measure[R], tokens: np.ndarray, first: int
) -> tuple[R, Ran]:
    """What a worker does: `measure` of the chunks `tokens` from chunk `first` on, by the packed `sources`.

    Also says what computed. The models stay loaded for the next chunks.
    """
    with models_here(sources, compute) as models, ExitStack() as stack:
        for model in models:
            stack.enter_context(model.exactly(tokens.shape[1]))
        return measure(models, tokens, first), Ran.of(models[0])


@contextmanager
def models_here(sources: tuple[bytes, ...], compute: Compute, keep: bool | None = None) -> Iterator[list[Model]]:
    """The models of packed `sources`, loaded on this worker as `load` does, for one task at a time."""
    from quantkit.pipeline.cluster import kept

    with _alone:
        yield kept((sources, compute, keep), lambda: _load(sources, compute, keep))


def _load(sources: Sequence[bytes], compute: Compute, keep: bool | None) -> list[Model]:
    from quantkit.pipeline.cluster import opened, worker_limits

    threads, memory = worker_limits()
    memory = min(available_memory(), memory) // 2 if compute.memory is None else compute.memory
    share = replace(compute, threads=compute.threads or threads, memory=memory // len(sources))
    models = [load(opened(source), share, keep) for source in sources]
    _take_turns(models, memory)
    return models


def _take_turns(models: Sequence[Model], memory: int) -> None:
    """Let models that share `memory` go through a batch one after the other, in the same place.

    While one runs, all that stands of the others is their last layer's output at half of the positions: a quarter of
    what a running model takes.
    """
    if len(models) > 1:
        for model in models:
            model.take_turns(models[0])
            model.memory = memory * 5 // (4 + len(models))
