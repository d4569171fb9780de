"""The threads of a model, shared between its kernels and BLAS."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_info

_T = TypeVar("_T")

# Runs a task for 0 to a count, and waits for all of them.
Each = Callable[[Callable[[int], None], int], None]


class Workspace(threading.local):
    """Arrays that a thread uses again and again, by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A contiguous float32 array of this shape; what it held before is lost."""
        size = math.prod(shape)
        array = self.arrays.get(name)
        if array is None or array.size < size:
            array = self.arrays[name] = np.empty(size, np.float32)
        return array[:size].reshape(shape)


class Share(NamedTuple):
    """How the tasks of a piece of work share the threads: `outer` runs them, `inner` what each of them is made of.

    `blocks` runs those of its parts that are matrix products.
    """

    outer: Each
    inner: Each
    blocks: Each


class Threads:
    """`count` threads for kernels and matrix products alike.

    BLAS has threads of its own. Both its threads and ours spin while they wait, so at the same time they would take the
    processors from each other. Either tasks run side by side with one BLAS thread each, or they run one after the other
    with all; `share` decides which. `workspace` holds each thread's own arrays.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.workspace = Workspace()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="quantkit-evaluate")

    @cached_property
    def _controller(self) -> ThreadpoolController:
        return ThreadpoolController()

    @contextmanager
    def share(self, n_tasks: int) -> Iterator[Share]:
        """Share the threads among `n_tasks` tasks: side by side if these fill the threads, else one after the other.

        In the latter case what a task is made of runs side by side where it can.
        """
        if n_tasks >= self.count > 1:
            with self.alone() as together:
                yield Share(together, one_by_one, one_by_one)
        else:
            with self._controller.limit(limits=self.count, user_api="blas"):
                yield Share(one_by_one, self._together if self.count > 1 else one_by_one, one_by_one)

    @contextmanager
    def share_exactly(self, n_tasks: int, n_blocks: int = 1) -> Iterator[Share]:
        """As `share`, but products have one BLAS thread each: the last bits depend on the number of these.

        A task has `n_blocks` blocks of rows, which run side by side instead where these are more than the tasks.
        """
        with self.alone() as together:
            if n_tasks >= min(self.count, n_blocks):
                yield Share(together, one_by_one, one_by_one)
            else:
                yield Share(one_by_one, together, together)

    @contextmanager
    def alone(self) -> Iterator[Each]:
        """Tasks side by side, each with one BLAS thread: to the last bit the same however many threads there are."""
        with self._controller.limit(limits=1, user_api="blas"):
            yield self._together

    def map(self, task: Callable[[int], _T], items: Iterable[int]) -> Iterator[_T]:
        """The results of `task` on each item, in order, worked out side by side."""
        return self._pool.map(task, items)

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Carry out tasks side by side and wait for all; the first exception is raised here."""
        for future in [self._pool.submit(task) for task in tasks]:
            future.result()

    def _together(self, task: Callable[[int], None], count: int) -> None:
        for _ in self._pool.map(task, range(count)):
            pass


def one_by_one(task: Callable[[int], None], count: int) -> None:
    """Run `task` for 0 to `count`, on the calling thread."""
    for i in range(count):
        task(i)


def blas_name() -> str:
    """The library that multiplies numpy's matrices and its kernels, as "OpenBLAS Haswell"."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    # Others may have come with scipy or torch.
    own = next((pool for pool in pools if "numpy" in pool["filepath"]), pools[0] if pools else None)
    if own is None:
        return str(np.__config__.CONFIG["Build Dependencies"]["blas"]["name"])  # type: ignore[attr-defined]
    name = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS"}.get(own["internal_api"], own["internal_api"])
    return f"{name} {own['architecture']}" if own.get("architecture") else name
