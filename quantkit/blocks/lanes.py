"""Sixteen-lane vectors for numba: the arithmetic of a scalar algorithm, sixteen times at once.

The reference encoders add long chains of float32 numbers in a fixed order, which a compiler must not reorder and so
cannot vectorise. Put one sub-block in each lane and the same source line becomes one vector instruction, while
every lane still does exactly the scalar sequence: IEEE float32, no fused multiply-add, no reassociation.

`f32x16`, `i32x16` and `mask16` are numba types over LLVM's <16 x float>, <16 x i32> and <16 x i1>; LLVM splits them
into the registers that the machine has. They live only inside compiled functions. Operators work between vectors of
the same type; a scalar is spread with `splat`. Everything else is a function below; `lane_memory` reads and writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import extending
from numba.core import types
from numba.core.cgutils import pack_array
from numba.core.errors import RequireLiteralValue
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import models, register_model

LANES = 16

# Arrays that kernels take: contiguous, of one dimension.
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int32]
Longs: TypeAlias = npt.NDArray[np.int64]
Shorts: TypeAlias = npt.NDArray[np.int16]
Codes: TypeAlias = npt.NDArray[np.uint16]
Bytes: TypeAlias = npt.NDArray[np.uint8]

ALL = np.uint32(0xFFFF)  # the `bits` of a mask that holds in all lanes
ZERO, ONE = np.float32(0), np.float32(1)

if TYPE_CHECKING:
    # What annotations call lane vectors.

    class Mask16:
        """Sixteen truths."""

        def __and__(self, other: Mask16) -> Mask16: ...
        def __or__(self, other: Mask16) -> Mask16: ...
        def __xor__(self, other: Mask16) -> Mask16: ...
        def __invert__(self) -> Mask16: ...

    class F32x16:
        """Sixteen float32."""

        def __add__(self, other: F32x16) -> F32x16: ...
        def __sub__(self, other: F32x16) -> F32x16: ...
        def __mul__(self, other: F32x16) -> F32x16: ...
        def __truediv__(self, other: F32x16) -> F32x16: ...
        def __neg__(self) -> F32x16: ...
        def __lt__(self, other: F32x16) -> Mask16: ...
        def __le__(self, other: F32x16) -> Mask16: ...
        def __gt__(self, other: F32x16) -> Mask16: ...
        def __ge__(self, other: F32x16) -> Mask16: ...
        def __eq__(self, other: F32x16) -> Mask16: ...  # type: ignore[override]
        def __ne__(self, other: F32x16) -> Mask16: ...  # type: ignore[override]

    class I32x16:
        """Sixteen int32."""

        def __add__(self, other: I32x16) -> I32x16: ...
        def __sub__(self, other: I32x16) -> I32x16: ...
        def __mul__(self, other: I32x16) -> I32x16: ...
        def __and__(self, other: I32x16) -> I32x16: ...
        def __or__(self, other: I32x16) -> I32x16: ...
        def __xor__(self, other: I32x16) -> I32x16: ...
        def __lshift__(self, other: I32x16) -> I32x16: ...
        def __rshift__(self, other: I32x16) -> I32x16: ...
        def __lt__(self, other: I32x16) -> Mask16: ...
        def __le__(self, other: I32x16) -> Mask16: ...
        def __gt__(self, other: I32x16) -> Mask16: ...
        def __ge__(self, other: I32x16) -> Mask16: ...
        def __eq__(self, other: I32x16) -> Mask16: ...  # type: ignore[override]
        def __ne__(self, other: I32x16) -> Mask16: ...  # type: ignore[override]
else:
    Mask16 = F32x16 = I32x16 = Any


# Typed as a plain callable: numba's own annotation shows the typing context, which callers never pass.
intrinsic: Callable[..., Any] = extending.intrinsic


class LaneVector(types.Type):  # type: ignore[misc]
    """The numba type of a vector of sixteen `element`s: "float", "i32" or "i1"."""

    def __init__(self, name: str, element: str) -> None:
        self.element = element
        super().__init__(name=name)


_ELEMENTS = {
    "float": ir.FloatType(),
    "i32": ir.IntType(32),
    "i16": ir.IntType(16),
    "i8": ir.IntType(8),
    "i1": ir.IntType(1),
}


def llvm_vector(element: str) -> ir.VectorType:
    """LLVM's type of sixteen elements: "float", "i32", "i16", "i8" or "i1"."""
    return ir.VectorType(_ELEMENTS[element], LANES)


@register_model(LaneVector)
class _LaneVectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: LaneVector) -> None:
        super().__init__(manager, fe_type, llvm_vector(fe_type.element))  # type: ignore[no-untyped-call]


f32x16 = LaneVector("f32x16", "float")
i32x16 = LaneVector("i32x16", "i32")
mask16 = LaneVector("mask16", "i1")


def _operator(op: Any, cases: dict[tuple[LaneVector, ...], tuple[LaneVector, Callable[..., Any]]]) -> None:
    """Give Python operator `op` a meaning on lane vectors: operand types -> (result type, code generator)."""
    signatures = [signature(result, *operands) for operands, (result, _) in cases.items()]
    infer_global(op)(type(f"Lane_{op.__name__}", (ConcreteTemplate,), {"cases": signatures}))
    for operands, (_, generate) in cases.items():

        def lower(context: Any, builder: Any, sig: Any, args: Any, generate: Any = generate) -> Any:
            return generate(builder, *args)

        lower_builtin(op, *operands)(lower)


def _binary(method: str) -> Callable[..., Any]:
    return lambda builder, a, b: getattr(builder, method)(a, b)


def _float_compare(sign: str) -> Callable[..., Any]:
    # "!=" is true of NaN, as in C; the other comparisons are false.
    method = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    return lambda builder, a, b: getattr(builder, method)(sign, a, b)


_FF, _II, _MM = (f32x16, f32x16), (i32x16, i32x16), (mask16, mask16)

_operator(operator.add, {_FF: (f32x16, _binary("fadd")), _II: (i32x16, _binary("add"))})
_operator(operator.sub, {_FF: (f32x16, _binary("fsub")), _II: (i32x16, _binary("sub"))})
_operator(operator.mul, {_FF: (f32x16, _binary("fmul")), _II: (i32x16, _binary("mul"))})
_operator(operator.truediv, {_FF: (f32x16, _binary("fdiv"))})
_operator(operator.and_, {_II: (i32x16, _binary("and_")), _MM: (mask16, _binary("and_"))})
_operator(operator.or_, {_II: (i32x16, _binary("or_")), _MM: (mask16, _binary("or_"))})
_operator(operator.xor, {_II: (i32x16, _binary("xor")), _MM: (mask16, _binary("xor"))})
_operator(operator.lshift, {_II: (i32x16, _binary("shl"))})
_operator(operator.rshift, {_II: (i32x16, _binary("ashr"))})
_operator(operator.neg, {(f32x16,): (f32x16, lambda builder, a: builder.fneg(a))})
_operator(operator.invert, {(mask16,): (mask16, lambda builder, a: builder.not_(a))})
for _op, _sign in [
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
]:

    def _int_compare(builder: Any, a: Any, b: Any, sign: str = _sign) -> Any:
        return builder.icmp_signed(sign, a, b)

    _operator(_op, {_FF: (mask16, _float_compare(_sign)), _II: (mask16, _int_compare)})


def call_llvm(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """Call an LLVM intrinsic by its full name: llvmlite's declare_intrinsic does not know vector overloads."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(builder.module.declare_intrinsic(name, fnty=function_type), args)


def _unary_float(name: str) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_llvm(builder, f"llvm.{name}.v16f32", llvm_vector("float"), args[0])

    return codegen


@intrinsic
def sqrt(typingctx: Any, a: Any) -> Any:
    """Square roots, correctly rounded."""
    return f32x16(f32x16), _unary_float("sqrt")


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """Absolute values."""
    return f32x16(f32x16), _unary_float("fabs")


@intrinsic
def round_half_away(typingctx: Any, a: Any) -> Any:
    """Rounded to the nearest integer, halves away from zero, as C's roundf."""
    return f32x16(f32x16), _unary_float("round")


def _pick(sign: str, a: Any) -> Any:
    kind = types.unliteral(a)
    integers = kind == i32x16 or isinstance(kind, types.Integer)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = args
        compare = builder.icmp_signed if integers else builder.fcmp_ordered
        return builder.select(compare(sign, a, b), a, b)

    return kind(kind, kind), codegen


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """`a < b ? a : b` in each lane, or of scalars, which both take the type of `a`; b where either is NaN."""
    return _pick("<", a)


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """`a > b ? a : b` in each lane, or of scalars, which both take the type of `a`; b where either is NaN."""
    return _pick(">", a)


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """`mask ? a : b` in each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(mask, a, b), codegen


def fill(builder: Any, vector: LaneVector, scalar: Any) -> Any:
    """`scalar` in every lane of a `vector`."""
    undefined = ir.Constant(llvm_vector(vector.element), ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, undefined, order)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The scalar `value` (float32, or an int) in every lane."""
    if isinstance(value, types.Float):
        result, element = f32x16, cast("types.Type", types.float32)
    elif isinstance(value, (types.Integer, types.Boolean)):
        result, element = i32x16, types.int32
    else:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return fill(builder, result, context.cast(builder, args[0], sig.args[0], element))

    return result(value), codegen


@intrinsic
def like(typingctx: Any, value: Any, x: Any) -> Any:
    """The scalar `value` as what `x` is: a float32, or a vector with it in every lane."""
    kind = f32x16 if x == f32x16 else types.float32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[0], sig.args[0], types.float32)
        return fill(builder, f32x16, scalar) if sig.return_type == f32x16 else scalar

    return kind(value, x), codegen


@intrinsic
def power_of_two(typingctx: Any, low_bits: Any) -> Any:
    """2^n for the integer n, from -126 to 127, in the low bits of a float32 or of each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats = args[0].type
        bits = llvm_vector("i32") if sig.return_type == f32x16 else ir.IntType(32)

        def number(n: int) -> Any:
            return ir.Constant(bits, [n] * LANES if sig.return_type == f32x16 else n)

        moved = builder.shl(builder.bitcast(args[0], bits), number(23))
        return builder.bitcast(builder.add(moved, number(127 << 23)), floats)

    return low_bits(low_bits), codegen


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of float32 or of vectors, rounded once where the machine has such an instruction, else twice.

    What it gives differs between machines: never for what encodes or decodes.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        suffix = "v16f32" if sig.return_type == f32x16 else "f32"
        return call_llvm(builder, f"llvm.fmuladd.{suffix}", args[0].type, *args)

    kind = f32x16 if a == f32x16 else types.float32
    return kind(kind, kind, kind), codegen


@intrinsic
def as_int_bits(typingctx: Any, a: Any) -> Any:
    """The bits of the floats, as integers."""
    return i32x16(f32x16), lambda context, builder, sig, args: builder.bitcast(args[0], llvm_vector("i32"))


@intrinsic
def as_float_bits(typingctx: Any, a: Any) -> Any:
    """The floats that have these bits."""
    return f32x16(i32x16), lambda context, builder, sig, args: builder.bitcast(args[0], llvm_vector("float"))


@intrinsic
def to_float(typingctx: Any, a: Any) -> Any:
    """Integers to float32."""
    return f32x16(i32x16), lambda context, builder, sig, args: builder.sitofp(args[0], llvm_vector("float"))


@intrinsic
def to_int(typingctx: Any, a: Any) -> Any:
    """Floats to integers, towards zero. Undefined for values outside int32: see `truncate`."""
    return i32x16(f32x16), lambda context, builder, sig, args: builder.fptosi(args[0], llvm_vector("i32"))


@intrinsic
def repeat(typingctx: Any, vector: Any, count: Any) -> Any:
    """A tuple of `count`, a constant, times the vector."""
    if not isinstance(count, types.IntegerLiteral):
        raise RequireLiteralValue(count)
    result = types.UniTuple(vector, count.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack_array(builder, [args[0]] * result.count)

    return result(vector, count), codegen


@intrinsic
def get(typingctx: Any, vector: Any, lane: Any) -> Any:
    """The scalar in lane `lane`."""
    result = types.float32 if vector == f32x16 else types.int32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], builder.trunc(args[1], ir.IntType(32)))

    return result(vector, types.int64), codegen


def _reduce(sign: str) -> Callable[..., Any]:
    """Halve the vector four times. LLVM's own reduction spends twice the instructions on the NaNs we do not have."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            index = ir.VectorType(ir.IntType(32), width)
            low, high = list(range(width)), list(range(width, 2 * width))
            undefined = ir.Constant(value.type, ir.Undefined)
            a = builder.shuffle_vector(value, undefined, ir.Constant(index, low))
            b = builder.shuffle_vector(value, undefined, ir.Constant(index, high))
            value = builder.select(builder.fcmp_ordered(sign, a, b), a, b)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return codegen


@intrinsic
def largest(typingctx: Any, a: Any) -> Any:
    """The largest of the sixteen numbers, none of which is NaN; of -0 and 0 either."""
    return types.float32(f32x16), _reduce(">")


@intrinsic
def smallest(typingctx: Any, a: Any) -> Any:
    """The smallest of the sixteen numbers, none of which is NaN; of -0 and 0 either."""
    return types.float32(f32x16), _reduce("<")


@intrinsic
def bits(typingctx: Any, mask: Any) -> Any:
    """A mask as an integer: bit i is lane i."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(32))

    return types.uint32(mask16), codegen


@intrinsic
def first_lane(typingctx: Any, mask_bits: Any) -> Any:
    """The number of the lowest set bit of an unsigned 32-bit integer, 32 if there is none."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        no = ir.Constant(ir.IntType(1), 0)
        return builder.zext(call_llvm(builder, "llvm.cttz.i32", ir.IntType(32), args[0], no), ir.IntType(64))

    return types.int64(types.uint32), codegen


@intrinsic
def half_bits(typingctx: Any, value: Any) -> Any:
    """float32 to the bits of the nearest float16 (halves to even, overflow to infinity), as uint16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def half_value(typingctx: Any, value: Any) -> Any:
    """The bits of a float16, as uint16, to float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def halves(typingctx: Any, a: Any) -> Any:
    """Sixteen float32 to the bits of the nearest float16, as `half_bits`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), LANES))
        return builder.zext(builder.bitcast(half, ir.VectorType(ir.IntType(16), LANES)), llvm_vector("i32"))

    return i32x16(f32x16), codegen


@intrinsic
def from_halves(typingctx: Any, a: Any) -> Any:
    """The bits of sixteen float16, in the low halves of integers, to float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = builder.trunc(args[0], ir.VectorType(ir.IntType(16), LANES))
        return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), llvm_vector("float"))

    return f32x16(i32x16), codegen


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def bits_float(typingctx: Any, value: Any) -> Any:
    """The float32 that has these bits, an int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def pair(typingctx: Any, a: Any, b: Any) -> Any:
    """The float32 `a` in the first eight lanes and `b` in the other eight."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = llvm_vector("float")
        undefined, index = ir.Constant(kind, ir.Undefined), ir.IntType(32)
        first = builder.insert_element(undefined, args[0], ir.Constant(index, 0))
        second = builder.insert_element(undefined, args[1], ir.Constant(index, 0))
        order = ir.Constant(ir.VectorType(index, LANES), [0] * 8 + [LANES] * 8)
        return builder.shuffle_vector(first, second, order)

    return f32x16(types.float32, types.float32), codegen


@intrinsic
def lookup(typingctx: Any, table: Any, index: Any) -> Any:
    """Each lane's entry of a table of eight, the first eight lanes of `table`: the low three bits of `index` choose.

    LLVM has no name for this, but knows the pattern: with AVX2 it is one permutation of each half.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = ir.IntType(32)
        eight = ir.Constant(ir.VectorType(number, 8), list(range(8)))
        low = builder.shuffle_vector(args[0], ir.Constant(llvm_vector("float"), ir.Undefined), eight)
        index = builder.and_(args[1], ir.Constant(llvm_vector("i32"), [7] * LANES))
        value: Any = ir.Constant(llvm_vector("float"), ir.Undefined)
        for lane in range(LANES):
            at = builder.extract_element(index, ir.Constant(number, lane))
            value = builder.insert_element(value, builder.extract_element(low, at), ir.Constant(number, lane))
        return value

    return f32x16(f32x16, i32x16), codegen


@intrinsic
def lane_numbers(typingctx: Any) -> Any:
    """0 to 15, each lane its own number."""
    return i32x16(), lambda context, builder, sig, args: ir.Constant(llvm_vector("i32"), list(range(LANES)))
