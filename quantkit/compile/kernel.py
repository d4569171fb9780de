"""How every kernel of quantkit is compiled and announced. `compile.cache` stores the machine code.

A kernel is what Python calls. It is made of pieces, which are inlined.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit, typeof
from numba.core import event, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.imputils import lower_constant, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import models, register_model, typeof_impl

from quantkit.compile.cache import KernelCache
from quantkit.compile.fixed import Fixed
from quantkit.compile.observers import kernel_name, tell

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

# IEEE float32 as written: no reassociation, no fused multiply-add, no traps. No kernel is used as a C callback, so
# numba need not compile the wrapper for one.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}


def kernel(function: F) -> F:
    """Compile `function` when it is first called, and keep the machine code on disk for the next run.

    Kernels release the GIL, so threads run them in parallel.
    """
    compiled: F = njit(**_OPTIONS)(function)
    try:
        compiled._cache = KernelCache(function)  # type: ignore[attr-defined, no-untyped-call]
    except RuntimeError:
        _Announcer.kept = False  # there is no directory to write to
    return compiled


class _PieceLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The code of a piece, which becomes machine code only where it is linked into a kernel.

    numba would optimise and assemble every function by itself too, as if Python could call it.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """No address: there is no machine code."""
        self._ensure_finalized()  # type: ignore[no-untyped-call]
        return 0

    @property
    def codegen(self) -> Any:
        """What numba tells the environment of the function to, which only its Python wrapper would need."""
        return _NoEnvironment


class _NoEnvironment:
    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        pass


class _PieceCompiler(Compiler):  # type: ignore[misc]
    def define_pipelines(self) -> Any:
        codegen, name = self.state.targetctx.codegen(), self.state.func_id.func_qualname
        self.state.library = _PieceLibrary(codegen, name)  # type: ignore[no-untyped-call]
        return super().define_pipelines()  # type: ignore[no-untyped-call]


def piece(function: F) -> F:
    """A piece of a kernel: always inlined, so that the constants it is given are constants to the optimiser."""
    options = {**_OPTIONS, "forceinline": True, "no_cpython_wrapper": True, "pipeline_class": _PieceCompiler}
    inlined: F = njit(**options)(function)
    return inlined


class _FixedType(types.Type):  # type: ignore[misc]
    """The numba type of one `Fixed` object. Names of types are in the names of machine code, so they must be alike in
    all processes for the same object, and different for others."""

    def __init__(self, value: Fixed) -> None:
        self.value = value
        digest = hashlib.sha256(_described(value).encode()).hexdigest()[:16]
        super().__init__(name=f"{type(value).__name__}#{digest}")


def _described(value: Any) -> str:
    """All of a value that matters, in the same words in all processes."""
    if isinstance(value, Fixed):
        return f"{type(value).__name__}({', '.join(f'{k}={_described(v)}' for k, v in sorted(vars(value).items()))})"
    function = getattr(value, "py_func", None)
    return repr(value) if function is None else f"{function.__module__}.{function.__qualname__}"


register_model(_FixedType)(models.OpaqueModel)


@typeof_impl.register(Fixed)  # type: ignore[untyped-decorator]
def _typeof_fixed(value: Fixed, context: Any) -> _FixedType:
    return _FixedType(value)


@lower_constant(_FixedType)  # type: ignore[untyped-decorator]
def _nothing_at_run_time(context: Any, builder: Any, kind: _FixedType, value: Fixed) -> Any:
    return context.get_dummy_value()


@infer_getattr
class _Attributes(AttributeTemplate):  # type: ignore[misc]
    key = _FixedType

    def generic_resolve(self, typ: _FixedType, attr: str) -> Any:  # type: ignore[override]
        value = getattr(typ.value, attr, None)
        return None if value is None else types.maybe_literal(value) or typeof(value)


@lower_getattr_generic(_FixedType)  # type: ignore[untyped-decorator]
def _attribute(context: Any, builder: Any, kind: _FixedType, nothing: Any, attr: str) -> Any:
    value = getattr(kind.value, attr)
    return context.get_constant_generic(builder, typeof(value), value)


class _NoCollection(event.Listener):  # type: ignore[misc]
    """Keeps Python from looking for reference cycles while a kernel compiles.

    numba makes millions of objects that live until it is done; looking through them again and again takes a fifth of
    the time.
    """

    def __init__(self) -> None:
        self._depth, self._enabled = 0, False

    def on_start(self, event: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._enabled = gc.isenabled()
            gc.disable()

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._enabled:
            gc.enable()


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


event.register("numba:compile", _NoCollection())
event.register("numba:compile", _Announcer())
