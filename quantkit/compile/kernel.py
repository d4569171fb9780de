"""How every kernel of quantkit is compiled and announced. `compile.cache` stores the machine code."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import event

from quantkit.compile.cache import KernelCache
from quantkit.compile.observers import kernel_name, tell

log = logging.getLogger(__name__)

# IEEE float32 as written: no reassociation, no fused multiply-add, no traps. No kernel is used as a C callback, so
# numba need not compile the wrapper for one.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called, and keep the machine code on disk for the next run.

    Kernels release the GIL, so threads run them in parallel.
    """
    compiled: Callable[..., Any] = njit(**_OPTIONS)(function)
    try:
        compiled._cache = KernelCache(function)  # type: ignore[attr-defined, no-untyped-call]
    except RuntimeError:
        _Announcer.kept = False  # there is no directory to write to
    return compiled


# A piece of a kernel: always inlined, so that the optimiser sees constant arguments as constants. Python cannot call
# it, which saves a fifth of the compile time.
piece: Callable[..., Any] = njit(**_OPTIONS, forceinline=True, no_cpython_wrapper=True)  # type: ignore[call-overload]


class _Announcer(event.Listener):  # type: ignore[misc]
    """Logs once that kernels are being compiled, when that has taken noticeable time."""

    NOTICEABLE = 0.5
    kept = True

    def __init__(self) -> None:
        self._depth, self._began, self._spent = 0, 0.0, 0.0
        self._timer: threading.Timer | None = None
        self._said = False

    # numba compiles one kernel at a time; events of its pieces come nested in the kernel's.

    def on_start(self, event: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            tell(kernel_name(event.data["dispatcher"].py_func))
        if self._depth == 1 and not self._said:
            self._began = time.perf_counter()
            self._timer = threading.Timer(max(0.0, self.NOTICEABLE - self._spent), self._say)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            tell("")
        if self._depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._spent += time.perf_counter() - self._began

    def _say(self) -> None:
        if not self._said:
            self._said = True
            later = "later runs skip this" if self.kept else "so will later runs, since no cache can be written"
            log.info("Compiling kernels for this machine; %s.", later)


event.register("numba:compile", _Announcer())
