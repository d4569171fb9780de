"""How kernels and BLAS share the threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from quantkit.evaluate.threads import Threads, blas_name


def blas_threads() -> set[int]:
    np.dot(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("count", "n_tasks", "side_by_side"), [(2, 2, True), (2, 1, False), (1, 5, False), (3, 7, True)]
)
def test_tasks_that_fill_the_threads_run_side_by_side_with_one_blas_thread_each(count, n_tasks, side_by_side):
    before, seen = blas_threads(), []
    with Threads(count).share(n_tasks) as share:
        assert blas_threads() == {1 if side_by_side else count}

        def within(i: int) -> None:
            seen.append(threading.current_thread() is threading.main_thread())

        share.outer(lambda _: share.inner(within, 4), n_tasks)
    assert len(seen) == 4 * n_tasks
    # Either the tasks or what they are made of leave the calling thread, never both, and neither with one thread.
    assert set(seen) == {count == 1}
    assert blas_threads() == before


def test_what_a_task_raises_is_raised_and_blas_gets_its_threads_back():
    before = blas_threads()

    def fail(i: int) -> None:
        raise ValueError(i)

    threads = Threads(2)
    with pytest.raises(ValueError), threads.share(2) as share:
        share.outer(fail, 2)
    with pytest.raises(ValueError):
        threads.run([lambda: fail(1)])
    assert blas_threads() == before


def test_the_library_that_multiplies_is_named_with_its_kernels():
    words = "from quantkit.evaluate.threads import blas_name; print(blas_name())"
    library = blas_name().split()[0]
    if library != "OpenBLAS":
        pytest.skip(f"numpy multiplies with {library} here")
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OpenBLAS Nehalem"
