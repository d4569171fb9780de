"""Numbers in the bytes of a block: pieces of kernels that several formats share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from quantkit.blocks.lane_memory import address
from quantkit.blocks.lanes import Bytes, Floats, intrinsic
from quantkit.compile.kernel import piece


def _put(convert: Callable[[Any, Any, Any, Any], Any]) -> Callable[..., Any]:
    """Generate code that stores `convert(context, builder, type, value)` at a byte, wherever that is."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = address(context, builder, sig.args[0], args[0], position)
        number = convert(context, builder, sig.args[2], args[2])
        builder.store(number, builder.bitcast(pointer, ir.PointerType(number.type)), align=1)
        return context.get_dummy_value()

    return codegen


def _get(element: ir.Type, convert: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Generate code that loads an LLVM `element` from a byte, wherever that is, and converts it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        position = context.cast(builder, args[1], sig.args[1], types.intp)
        pointer = address(context, builder, sig.args[0], args[0], position)
        return convert(builder, builder.load(builder.bitcast(pointer, ir.PointerType(element)), align=1, typ=element))

    return codegen


def _low_bits(kind: types.Type) -> Callable[[Any, Any, Any, Any], Any]:
    return lambda context, builder, source, value: context.cast(builder, value, source, kind)


_SHORT, _WORD, _HALF = ir.IntType(16), ir.IntType(32), ir.HalfType()


@intrinsic
def put_short(typingctx: Any, out: Any, at: Any, value: Any) -> Any:
    """Store the low 16 bits of an integer at byte `at`, the lower byte first."""
    return types.void(out, at, value), _put(_low_bits(types.uint16))


@intrinsic
def put_word(typingctx: Any, out: Any, at: Any, value: Any) -> Any:
    """Store the low 32 bits of an integer at byte `at`, the lowest byte first."""
    return types.void(out, at, value), _put(_low_bits(types.uint32))


@intrinsic
def put_half(typingctx: Any, out: Any, at: Any, value: Any) -> Any:
    """Store a float32 at byte `at` as the nearest float16 (halves to even, overflow to infinity)."""
    return types.void(out, at, types.float32), _put(lambda context, builder, _, x: builder.fptrunc(x, _HALF))


@intrinsic
def get_short(typingctx: Any, data: Any, at: Any) -> Any:
    """Load two bytes at `at` as an integer that is not negative, the lower first."""
    return types.int64(data, at), _get(_SHORT, lambda builder, x: builder.zext(x, ir.IntType(64)))


@intrinsic
def get_word(typingctx: Any, data: Any, at: Any) -> Any:
    """Load four bytes at `at` as uint32, the lowest first."""
    return types.uint32(data, at), _get(_WORD, lambda builder, x: x)


@intrinsic
def get_half(typingctx: Any, data: Any, at: Any) -> Any:
    """Load the float16 at byte `at` as float32."""
    return types.float32(data, at), _get(_HALF, lambda builder, x: builder.fpext(x, ir.FloatType()))


@piece
def clear(out: Bytes, at: int, n: int) -> None:
    """Make `n` bytes from byte `at` on zero."""
    for i in range(n):
        out[at + i] = 0


@piece
def get_nibble(data: Bytes, at: int, j: int) -> int:
    """The j-th four bits from byte `at` on, the low ones of a byte first."""
    return (np.int32(data[at + j // 2]) >> (4 * (j & 1))) & 15


@piece
def get_values(data: Bytes, at: int, n: int, table: Floats, scale: np.float32, out: Floats, to: int) -> None:
    """Entries of a table of 16, times `scale`, that `n` bytes at `at` choose: by the low nibbles, then by the high."""
    for i in range(n):
        byte = data[at + i]
        out[to + i] = scale * table[byte & 15]
        out[to + n + i] = scale * table[byte >> 4]
