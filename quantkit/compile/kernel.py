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
from typing import Any, ClassVar, TypeVar

from numba import njit, typeof
from numba.core import event, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.errors import TypingError
from numba.core.imputils import lower_constant, lower_getattr_generic
from numba.core.typed_passes import NativeLowering
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import models, register_model, typeof_impl

from quantkit.compile.cache import KernelCache
from quantkit.compile.fixed import Fixed
from quantkit.compile.lowering import KernelLowering
from quantkit.compile.observers import kernel_name, tell

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

# IEEE float32 as written: no reassociation, no fused multiply-add, no traps. No kernel is used as a C callback, so
# numba need not compile the wrapper for one. Without its runtime (nrt) it does not count the users of arrays.
_OPTIONS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True, "_nrt": False,
}  # fmt: skip
_ALLOCATING = {"_nrt": True}
# Passes of numba's for what no kernel has: closures, `with`, `raise` of what is not constant, array expressions,
# tuples to unroll. Each would look through every piece. (IRProcessing does what numba does after every other pass.)
_NEEDLESS = {
    "AnnotateTypes", "DeadBranchPrune", "FindLiterallyCalls", "InlineClosureLikes", "InlineInlinables",
    "InlineOverloads", "IRProcessing", "LiteralPropagationSubPipelinePass", "LiteralUnroll",
    "MakeFunctionToJitFunction", "NoPythonSupportedFeatureValidation", "NopythonRewrites", "RewriteDynamicRaises",
    "RewriteSemanticConstants", "WithLifting",
}  # fmt: skip


_NUMBERS = (types.IntegerLiteral, types.BooleanLiteral)


class _Typing:
    """numba's typing context, with a memory: what functions make of arguments of the same types again and again.

    Numba would try the rules of every type that `+` is known for each time that it is met.
    """

    _found: ClassVar[dict[Any, Any]] = {}

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        """All else is the context's."""
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, args: Any, kws: Any) -> Any:
        """The signature of `function` for arguments of these types; see numba."""
        args = tuple(args)
        if isinstance(function, types.Dispatcher):
            return self._resolve_piece(function, args, kws)
        if kws or (isinstance(function, types.Type) and not isinstance(function, (types.Function, types.NumberClass))):
            return self._context.resolve_function_type(function, args, kws)
        found = self._found.get((function, args))
        if found is None:
            found = self._context.resolve_function_type(function, args, kws)
            if found is not None and found.return_type.is_precise():
                self._found[function, args] = found
        return found

    def _resolve_piece(self, function: Any, args: tuple[Any, ...], kws: Any) -> Any:
        # numba would compile a piece anew for every constant that it is given.
        numbers = tuple(types.unliteral(kind) if isinstance(kind, _NUMBERS) else kind for kind in args)
        try:
            return self._context.resolve_function_type(function, numbers, kws)
        except TypingError:
            if numbers == args:
                raise
            # Some need one, such as those with scratch of that size.
            return self._context.resolve_function_type(function, args, kws)


@register_pass(mutates_CFG=True, analysis_only=False)
class _KernelLowering(NativeLowering):  # type: ignore[misc]
    _name = "kernel_lowering"

    @property
    def lowering_class(self) -> Any:
        return KernelLowering


class _KernelCompiler(Compiler):  # type: ignore[misc]
    """numba's compiler without the steps that kernels do not need."""

    def __init__(self, typingctx: Any, *others: Any) -> None:
        super().__init__(_Typing(typingctx), *others)  # type: ignore[no-untyped-call]

    def define_pipelines(self) -> Any:
        """numba's passes, but `_NEEDLESS`."""
        pipelines = super().define_pipelines()  # type: ignore[no-untyped-call]
        # `weights is None` decides what is compiled, and is decided before types are.
        pruned = not any(isinstance(kind, (types.NoneType, types.Omitted)) for kind in self.state.args)
        for pipeline in pipelines:
            kept = []
            for step in pipeline.passes:
                if step[0].__name__ not in _NEEDLESS:
                    kept.append(step)
                elif step[0].__name__ == "DeadBranchPrune" and not pruned:
                    kept.append(step)
                    pruned = True
            pipeline.passes = [(_KernelLowering, *step[1:]) if step[0] is NativeLowering else step for step in kept]
        return pipelines


def kernel(function: F) -> F:
    """Compile `function` when it is first called, and keep the machine code on disk for the next run.

    Kernels release the GIL, so threads run them in parallel. They make no arrays (`allocating_kernel`), but take them,
    or `lane_memory.scratch`.
    """
    return _kernel(function, _OPTIONS)


def allocating_kernel(function: F) -> F:
    """A kernel that makes arrays, whose users numba counts: that takes longer to compile."""
    return _kernel(function, _OPTIONS | _ALLOCATING)


def _kernel(function: F, options: dict[str, Any]) -> F:
    compiled: F = njit(**options, pipeline_class=_KernelCompiler)(function)
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


class _PieceCompiler(_KernelCompiler):
    def define_pipelines(self) -> Any:
        codegen, name = self.state.targetctx.codegen(), self.state.func_id.func_qualname
        self.state.library = _PieceLibrary(codegen, name)  # type: ignore[no-untyped-call]
        return super().define_pipelines()


_PIECE_OPTIONS = _OPTIONS | {"forceinline": True, "no_cpython_wrapper": True, "pipeline_class": _PieceCompiler}


def piece(function: F) -> F:
    """A piece of a kernel: always inlined, so that the constants it is given are constants to the optimiser.

    numba compiles it once for all numbers, and once more for every `Fixed` object and every type of array.
    """
    inlined: F = njit(**_PIECE_OPTIONS)(function)
    return inlined


def allocating_piece(function: F) -> F:
    """A piece that makes arrays."""
    inlined: F = njit(**_PIECE_OPTIONS | _ALLOCATING)(function)
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
