"""Lane vectors from and to arrays, and the arrays that a kernel keeps them in.

Indices are not checked, and none may be negative: checks cost a loop its speed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import gep_inbounds, pack_array, unpack_tuple
from numba.core.errors import RequireLiteralValue
from numba.np.arrayobj import make_array, populate_array

from quantkit.blocks.lanes import LANES, call_llvm, f32x16, fill, i32x16, intrinsic, llvm_vector

_NARROW = {types.int8: "i8", types.uint8: "i8", types.int16: "i16", types.uint16: "i16"}


def address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """LLVM's pointer to an element of a contiguous array or of scratch; `index` is of 64 bits."""
    if isinstance(array_type, types.CPointer):
        return gep_inbounds(builder, array, index)
    # Not numba's make_array, which would put the whole description of the array into memory for that.
    return gep_inbounds(builder, context.data_model_manager[array_type].get(builder, array, "data"), index)


def _contiguous(array: Any) -> bool:
    return isinstance(array, types.CPointer) or (
        isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"
    )


def _array_at(context: Any, builder: Any, kind: Any, data: Any, n: Any) -> Any:
    """An array of `n` elements at the pointer `data`, which owns nothing."""
    array = make_array(kind)(context, builder)
    itemsize = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    populate_array(array, data=data, shape=[n], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return array._getvalue()


@intrinsic
def scratch(typingctx: Any, dtype: Any, n: Any) -> Any:
    """Space for `n` vectors, a constant, on the stack: 16 * n numbers, with whatever was there before.

    It is gone when the function that asked for it ends: a piece must not return it. It is indexed like an array, but
    is only a pointer, and so compiles faster; LLVM knows that no two of them overlap.
    """
    if not isinstance(n, types.IntegerLiteral):
        raise RequireLiteralValue(n)
    kind, count = types.CPointer(dtype.dtype), n.literal_value * LANES

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = context.get_data_type(kind.dtype)
        with builder.goto_entry_block():
            space = builder.alloca(ir.ArrayType(element, count))
            space.align = 4 * LANES
        return builder.bitcast(space, ir.PointerType(element))

    return kind(dtype, n), codegen


@intrinsic
def part(typingctx: Any, array: Any, start: Any, n: Any) -> Any:
    """The `n` elements of a contiguous 1-D array from `start` on: `array[start : start + n]`, unchecked.

    Of scratch all that is there from `start` on.
    """
    if not _contiguous(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position, count = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2))
        data = address(context, builder, sig.args[0], args[0], position)
        return data if isinstance(array, types.CPointer) else _array_at(context, builder, array, data, count)

    return array(array, start, n), codegen


@intrinsic
def numbers(typingctx: Any, data: Any, dtype: Any) -> Any:
    """The bytes of a contiguous 1-D array, which begins where such numbers may, as numbers of `dtype`, like scratch."""
    if not _contiguous(data):
        return None
    kind = types.CPointer(dtype.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = address(context, builder, sig.args[0], args[0], context.get_constant(types.intp, 0))
        return builder.bitcast(start, context.get_value_type(kind))

    return kind(data, dtype), codegen


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen neighbours of a contiguous 1-D array from `index` on: float32 to f32x16, integers to i32x16."""
    if not _contiguous(array):
        return None
    result = f32x16 if array.dtype == types.float32 else i32x16
    element = _NARROW.get(array.dtype, result.element)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position = context.cast(builder, args[1], sig.args[1], types.intp)
        at = address(context, builder, sig.args[0], args[0], position)
        pointer = builder.bitcast(at, ir.PointerType(llvm_vector(element)))
        value = builder.load(pointer, align=array.dtype.bitwidth // 8, typ=llvm_vector(element))
        if element != result.element:
            value = (builder.sext if array.dtype.signed else builder.zext)(value, llvm_vector("i32"))
        return value

    return result(array, index), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write sixteen neighbours of a contiguous 1-D array from `index` on; integers are cut to the array's size."""
    if not _contiguous(array):
        return None
    narrow = _NARROW.get(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position = context.cast(builder, args[1], sig.args[1], types.intp)
        at = address(context, builder, sig.args[0], args[0], position)
        value = builder.trunc(args[2], llvm_vector(narrow)) if narrow else args[2]
        builder.store(value, builder.bitcast(at, ir.PointerType(value.type)), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, vector), codegen


@intrinsic
def add_products(typingctx: Any, sums: Any, array: Any, index: Any, stride: Any, vector: Any) -> Any:
    """A tuple of f32x16 with `array[index + i * stride] * vector` added to its i-th, as `multiply_add` does.

    `array` is contiguous, 1-D and float32, and no index negative.
    """
    if not _contiguous(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position, step = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (2, 3))
        results = []
        for total in unpack_tuple(builder, args[0]):
            scalar = builder.load(address(context, builder, sig.args[1], args[1], position))
            spread = fill(builder, f32x16, scalar)
            results.append(call_llvm(builder, "llvm.fmuladd.v16f32", llvm_vector("float"), spread, args[4], total))
            position = builder.add(position, step)
        return pack_array(builder, results)

    return sums(sums, array, index, stride, vector), codegen


@intrinsic
def store_all(typingctx: Any, array: Any, index: Any, stride: Any, vectors: Any) -> Any:
    """Write a tuple of f32x16 to a contiguous 1-D float32 array, from `index` on and `stride` apart."""
    if not _contiguous(array):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position, step = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2))
        for vector in unpack_tuple(builder, args[3]):
            at = address(context, builder, sig.args[0], args[0], position)
            builder.store(vector, builder.bitcast(at, ir.PointerType(vector.type)), align=4)
            position = builder.add(position, step)
        return context.get_dummy_value()

    return types.void(array, index, stride, vectors), codegen


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    """Lanes of `a` (0 to 15) and `b` (16 to 31) in a new order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), order))


@intrinsic
def transpose_tile(typingctx: Any, x: Any, starts: Any, at: Any, xs: Any, to: Any) -> Any:
    """Sixteen floats from each of sixteen places, `x[starts[k] + at:]`, into lane k of sixteen vectors at `xs[to:]`."""
    if not (_contiguous(x) and _contiguous(starts) and _contiguous(xs)):
        return None
    if (x.dtype, starts.dtype, xs.dtype) != (types.float32, types.int64, types.float32):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = llvm_vector("float")
        offset = context.cast(builder, args[2], sig.args[2], types.intp)
        target = context.cast(builder, args[4], sig.args[4], types.intp)
        rows = []
        for k in range(LANES):
            start = builder.load(address(context, builder, sig.args[1], args[1], ir.Constant(ir.IntType(64), k)))
            pointer = address(context, builder, sig.args[0], args[0], builder.add(start, offset))
            rows.append(builder.load(builder.bitcast(pointer, ir.PointerType(vector)), align=4, typ=vector))
        # Within quarters of four rows each; then pairs of elements; then quarters go to their places.
        low = [4 * q + i for q in range(4) for i in (0, LANES, 1, LANES + 1)]
        pair = [4 * q + i for q in range(4) for i in (0, 1, LANES, LANES + 1)]
        columns: list[list[Any]] = [[], [], [], []]
        for k in range(0, LANES, 4):
            a, b, c, d = rows[k : k + 4]
            for half in range(2):
                ab = _shuffled(builder, a, b, [i + 2 * half for i in low])
                cd = _shuffled(builder, c, d, [i + 2 * half for i in low])
                for odd in range(2):
                    columns[2 * half + odd].append(_shuffled(builder, ab, cd, [i + 2 * odd for i in pair]))
        for quarter in range(4):
            place = [4 * quarter + i for i in range(4)]
            pick = [*place, *(LANES + i for i in place)] * 2
            for column in range(4):
                a, b, c, d = columns[column]
                ab, cd = _shuffled(builder, a, b, pick), _shuffled(builder, c, d, pick)
                value = _shuffled(builder, ab, cd, [*range(8), *range(LANES, LANES + 8)])
                index = builder.add(target, ir.Constant(ir.IntType(64), (4 * quarter + column) * LANES))
                pointer = address(context, builder, sig.args[3], args[3], index)
                builder.store(value, builder.bitcast(pointer, ir.PointerType(vector)), align=4)
        return context.get_dummy_value()

    return types.void(x, starts, at, xs, to), codegen
