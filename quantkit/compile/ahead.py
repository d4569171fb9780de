"""Compiling kernels ahead, in processes beside this one: a first run need not wait for one processor.

numba compiles one kernel at a time in a process. A command that knows which kernels it will need lists them in the
order in which it will come to them. Helper processes take them from the end and leave the machine code in the cache;
this process compiles what it comes to as ever; while a helper is at what it needs, it compiles the next.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from quantkit.compile import cache as kernel_cache
from quantkit.compile.cache import KernelCache
from quantkit.compile.observers import kernel_name, tell

# Seconds of work that make up for starting a helper.
_WORTHWHILE = 1.5
_MOST_HELPERS = 3
# The helper gets this process's module path: with -m, files in the working directory would come before it.
_HELPER = "import sys; sys.path[:] = sys.argv[1:]; from quantkit.compile.ahead import serve; serve()"


class KernelJob(NamedTuple):
    """A kernel to compile for a signature: numba types. `seconds` is about how long that takes."""

    kernel: Any
    signature: tuple[Any, ...]
    seconds: float


@contextmanager
def compiled_ahead(jobs: Sequence[KernelJob], threads: int) -> Iterator[None]:
    """Let helper processes, with this one at most `threads`, compile what of `jobs` is not in the cache.

    `jobs` are in the order in which they will be needed. Starts nothing when little or nothing is missing, and when
    there is no cache to leave it in. Whatever goes wrong with a helper, this process does its work.
    """
    missing = [job for job in jobs if _missing(job)]
    seconds = [job.seconds for job in missing]
    count = min(threads - 1, _MOST_HELPERS, int((sum(seconds) - max(seconds, default=0.0)) / _WORTHWHILE))
    if count < 1 or not sys.executable or getattr(sys, "frozen", False):
        yield
        return
    helpers = _Helpers(missing, count)
    kernel_cache.before_compiling = helpers.wait
    try:
        yield
    finally:
        kernel_cache.before_compiling = None
        helpers.close()


def _missing(job: KernelJob) -> bool:
    cache = job.kernel._cache
    return isinstance(cache, KernelCache) and not cache.holds(job.signature, job.kernel.targetctx.codegen())


class _Helpers:
    """Processes that compile, each with a thread that hands it one job after the other."""

    def __init__(self, jobs: Sequence[KernelJob], count: int) -> None:
        self._changed = threading.Condition()
        self._left = {(job.kernel._cache, job.signature): job for job in jobs}
        self._names = {key: kernel_name(job.kernel.py_func) for key, job in self._left.items()}
        self._under_way: set[tuple[KernelCache, Any]] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _HELPER, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                break
            thread = threading.Thread(target=self._hand_out, args=(process,), daemon=True)
            self._processes.append(process)
            self._threads.append(thread)
            thread.start()

    def wait(self, cache: KernelCache, signature: Any) -> None:
        """Come back when no helper is compiling this kernel; none will begin to. Meanwhile, compile others here."""
        key = (cache, signature)
        while True:
            with self._changed:
                self._left.pop(key, None)
                if key not in self._under_way:
                    tell("")
                    return
                if not self._left:
                    self._changed.wait(1.0)  # Ctrl-C does not end an endless wait on Windows
                    continue
                job = self._left.pop(next(iter(self._left)))
            job.kernel.compile(job.signature)

    def close(self) -> None:
        """End the helpers, whatever they are at."""
        with self._changed:
            self._left.clear()
        for process in self._processes:
            process.kill()
        for process, thread in zip(self._processes, self._threads, strict=True):
            thread.join()
            process.wait()

    def _hand_out(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError), process.stdin, process.stdout:
            ready = process.stdout.read(1)
            while ready:  # nothing, when it has ended
                with self._changed:
                    if not self._left:
                        return
                    key, job = self._left.popitem()
                    self._under_way.add(key)
                try:
                    function = job.kernel.py_func
                    pickle.dump((function.__module__, function.__qualname__, job.signature), process.stdin)
                    process.stdin.flush()
                    ready = process.stdout.read(1)
                finally:
                    with self._changed:
                        self._under_way.discard(key)
                        self._changed.notify_all()


def serve() -> None:
    """What a helper process does: compile the kernels that it is told on stdin, until that ends.

    It says with a byte on stdout that it is ready for another.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it too, and ends it at once
    replies = os.dup(1)
    os.dup2(2, 1)
    importlib.import_module("quantkit.compile.kernel")
    with suppress(EOFError, BrokenPipeError):
        while True:
            os.write(replies, b".")
            module, name, signature = pickle.load(sys.stdin.buffer)
            # What cannot be compiled here the main process compiles, and meets the error.
            with suppress(Exception):
                found = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
                found.compile(signature)  # type: ignore[attr-defined]
