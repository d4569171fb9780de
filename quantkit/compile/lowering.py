"""Short LLVM code for what kernels are full of: loops over ranges, indices, and divisions of integers.

numba writes fifty instructions for `for i in range(n)` and as many for `n // 8`, most of which LLVM has to get rid of
again. Writing, reading and optimising them took a third of a kernel's compilation. What is here means the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir.instructions import InsertValue
from numba.core import types
from numba.core.cgutils import gep_inbounds
from numba.core.lowering import Lower

Code = Callable[[Any, Any, Any, Any], Any]  # of numba's context, LLVM's builder, signature and arguments: the result


class KernelLowering(Lower):  # type: ignore[misc]
    """From numba's code to LLVM's, without the work of reference counts in kernels that have none."""

    def pre_lower(self) -> None:
        """Before a function: have numba ask here first how to write something."""
        shorten(self.context)
        super().pre_lower()  # type: ignore[no-untyped-call]

    def delvar(self, name: str) -> None:
        """The end of a variable's life."""
        if self.context.enable_nrt:
            super().delvar(name)  # type: ignore[no-untyped-call]


def shorten(context: Any) -> None:
    """Let the target context of one function know the code that is here; numba's own is for all else."""
    numbas = context.get_function

    def get_function(function: Any, sig: Any, **options: Any) -> Any:
        key = function.get_impl_key(sig) if isinstance(function, types.Function) else function
        code = _chosen(key, sig)
        if code is None:
            return numbas(function, sig, **options)
        return lambda builder, args, loc=None: code(context, builder, sig, args)

    context.get_function = get_function
    context.pair_first = lambda builder, pair, kind: builder.extract_value(pair, 0)
    context.pair_second = lambda builder, pair, kind: builder.extract_value(pair, 1)


def _chosen(key: Any, sig: Any) -> Code | None:
    args = sig.args
    if key is operator.getitem and _is_plain(*args):
        return _get_item
    if key is operator.setitem and _is_plain(*args[:2]) and isinstance(args[2], (types.Integer, types.Float)):
        return _set_item
    if key is range and all(_is_signed(kind) for kind in args):
        return _range
    if key == "getiter" and isinstance(args[0], types.RangeType) and _is_signed(args[0].dtype):
        return _begin_range
    if key == "iternext" and isinstance(args[0], types.RangeIteratorType) and _is_signed(args[0].yield_type):
        return _next_of_range
    if key in (operator.floordiv, operator.mod) and _is_signed(sig.return_type):
        return _quotient if key is operator.floordiv else _remainder
    return None


def _is_signed(kind: Any) -> bool:
    return bool(getattr(kind, "signed", False))


def _is_plain(array: Any, index: Any) -> bool:
    return (
        isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C" and array.aligned
        and isinstance(array.dtype, (types.Integer, types.Float)) and isinstance(index, types.Integer)
    )  # fmt: skip


def _element(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """A pointer to `array[index]`; as in Python, negative indices count from the end."""
    model = context.data_model_manager[sig.args[0]]
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    constant = isinstance(index, ir.Constant) and index.constant >= 0
    if not constant and _is_signed(sig.args[1]):
        size = builder.extract_value(model.get(builder, args[0], "shape"), 0)
        negative = builder.icmp_signed("<", index, ir.Constant(index.type, 0))
        index = builder.select(negative, builder.add(index, size), index)
    return gep_inbounds(builder, model.get(builder, args[0], "data"), index)


def _get_item(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.load(_element(context, builder, sig, args))


def _set_item(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value = context.cast(builder, args[2], sig.args[2], sig.args[0].dtype)
    builder.store(value, _element(context, builder, sig, args))
    return context.get_dummy_value()


def _made(context: Any, builder: Any, kind: Any, *parts: Any) -> Any:
    """A structure of numba's type `kind`."""
    made = ir.Constant(context.get_value_type(kind), ir.Undefined)
    for i, part in enumerate(parts):
        made = builder.insert_value(made, part, i)
    return made


def _range(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    dtype = context.get_value_type(sig.return_type.dtype)
    start, stop = (ir.Constant(dtype, 0), args[0]) if len(args) == 1 else args[:2]
    step = args[2] if len(args) == 3 else ir.Constant(dtype, 1)
    return _made(context, builder, sig.return_type, start, stop, step)


def _part(builder: Any, structure: Any, at: int) -> Any:
    """A field of a structure: as it was put there, where that is known."""
    value = structure
    while isinstance(value, InsertValue):
        if list(value.indices) == [at]:
            return value.operands[1]
        value = value.operands[0]
    return builder.extract_value(structure, at)


def _count(builder: Any, start: Any, stop: Any, step: Any) -> Any:
    """How many numbers a range has, none if that is not above zero: the distance over the step, rounded up."""
    zero, one = ir.Constant(step.type, 0), ir.Constant(step.type, 1)
    distance = stop if isinstance(start, ir.Constant) and start.constant == 0 else builder.sub(stop, start)
    if isinstance(step, ir.Constant) and step.constant > 0:
        if step.constant == 1:
            return distance
        return builder.sdiv(builder.add(distance, ir.Constant(step.type, step.constant - 1)), step)
    upward, still = builder.icmp_signed(">", step, zero), builder.icmp_signed("==", step, zero)
    rest = builder.select(upward, builder.sub(step, one), builder.add(step, one))
    # A step of 0, which would divide by it, ends at once.
    count = builder.sdiv(builder.add(distance, rest), builder.select(still, one, step))
    return builder.select(still, zero, count)


def _begin_range(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """An iterator: where the next number and the count of numbers to come are kept, the end and the step."""
    start, stop, step = (_part(builder, args[0], i) for i in range(3))
    with builder.goto_entry_block():
        at, left = builder.alloca(start.type), builder.alloca(start.type)
    builder.store(start, at)
    builder.store(_count(builder, start, stop, step), left)
    return _made(context, builder, sig.return_type, at, stop, step, left)


def _next_of_range(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """A pair: the next number, and whether there is one."""
    at, step, left = (builder.extract_value(args[0], i) for i in (0, 2, 3))
    number, count = builder.load(at), builder.load(left)
    builder.store(builder.add(number, step), at)
    builder.store(builder.sub(count, ir.Constant(count.type, 1)), left)
    some = builder.icmp_signed(">", count, ir.Constant(count.type, 0))
    return _made(context, builder, sig.return_type, number, some)


def _power(divisor: Any) -> int | None:
    """n where the divisor is the constant 2^n."""
    value = divisor.constant if isinstance(divisor, ir.Constant) else None
    return value.bit_length() - 1 if isinstance(value, int) and value > 0 and value & (value - 1) == 0 else None


def _operands(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return (context.cast(builder, arg, kind, sig.return_type) for arg, kind in zip(args, sig.args, strict=True))


def _divided(builder: Any, a: Any, b: Any) -> tuple[Any, Any, Any, Any]:
    """What C makes of a / b and of a % b; whether the remainder has the other sign than b; and whether there is none.

    Of a division by zero or one that overflows numba makes 0.
    """
    zero = ir.Constant(a.type, 0)
    overflows = builder.and_(
        builder.icmp_signed("==", a, ir.Constant(a.type, -(1 << (a.type.width - 1)))),
        builder.icmp_signed("==", b, ir.Constant(b.type, -1)),
    )
    none = builder.or_(builder.icmp_signed("==", b, zero), overflows)
    divisor = builder.select(none, ir.Constant(b.type, 1), b)
    rest = builder.srem(a, divisor)
    differs = builder.and_(
        builder.icmp_signed("!=", rest, zero), builder.icmp_signed("<", builder.xor(rest, divisor), zero)
    )
    return builder.sdiv(a, divisor), rest, differs, none


def _quotient(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    a, b = _operands(context, builder, sig, args)
    power = _power(b)
    if power is not None:
        return builder.ashr(a, ir.Constant(a.type, power))
    quotient, _, differs, none = _divided(builder, a, b)
    floor = builder.sub(quotient, builder.zext(differs, a.type))
    return builder.select(none, ir.Constant(a.type, 0), floor)


def _remainder(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    a, b = _operands(context, builder, sig, args)
    if _power(b) is not None:
        return builder.and_(a, ir.Constant(a.type, b.constant - 1))
    _, rest, differs, none = _divided(builder, a, b)
    return builder.select(none, ir.Constant(a.type, 0), builder.select(differs, builder.add(rest, b), rest))
