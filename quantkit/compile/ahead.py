"""Compiling kernels ahead in helper processes, so that a first run uses all processors for it.

numba compiles one kernel at a time in a process. A command that knows which kernels it will need lists them in the
order in which it will need them. Helper processes take them from the end and leave the machine code in the cache. This
process compiles kernels when it needs them, as usual; while a helper is compiling that kernel, it compiles the next.
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

# Seconds of compilation that are worth starting a helper for.
_WORTHWHILE = 1.5
_MOST_HELPERS = 3
# The helper gets this process's module path: with -m, files in the working directory would come before it.
_HELPER = "import sys; sys.path[:] = sys.argv[1:]; from quantkit.compile.ahead import serve; serve()"


class KernelJob(NamedTuple):
    """A kernel to compile for a signature: numba types. `seconds` is an estimate of the time it takes."""

    kernel: Any
    signature: tuple[Any, ...]
    seconds: float


@contextmanager
def compiled_ahead(jobs: Sequence[KernelJob], threads: int) -> Iterator[None]:
    """Let helper processes, at most `threads` with this one, compile those of `jobs` that are not in the cache.

    `jobs` are in the order in which they will be needed. Starts no helper when little or nothing is missing, or when
    no cache can be written. If a helper fails, this process does its work.
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
    """Helper processes, each with a thread that hands it one job after the other."""

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
        """Wait until no helper is compiling this kernel, and let none start to; meanwhile, compile others here."""
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
        """Kill the helpers, whatever they are doing."""
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
    """The main function of a helper process: compile the kernels named on stdin, until that is closed.

    A byte on stdout says that it is ready for the next.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it too, and ends it at once
    replies = os.dup(1)
    os.dup2(2, 1)
    importlib.import_module("quantkit.compile.kernel")
    with suppress(EOFError, BrokenPipeError):
        while True:
            os.write(replies, b".")
            module, name, signature = pickle.load(sys.stdin.buffer)
            # If a kernel cannot be compiled here, the main process compiles it and reports the error.
            with suppress(Exception):
                found = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
                found.compile(signature)  # type: ignore[attr-defined]
