"""Numbers in the bytes of a block: pieces of kernels that several formats share, and how kernels know layouts.

A kernel takes `Layout` as it finds it: as a global, or as an argument of a piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.core.imputils import lower_constant, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import models, register_model, typeof_impl

from quantkit.blocks.lanes import half_bits, half_value
from quantkit.blocks.layout import Layout
from quantkit.compile.kernel import piece


class _LayoutType(types.Type):  # type: ignore[misc]
    """The numba type of one layout, which holds nothing at run time."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        super().__init__(name=repr(layout))


register_model(_LayoutType)(models.OpaqueModel)


@typeof_impl.register(Layout)  # type: ignore[untyped-decorator]
def _typeof_layout(layout: Layout, context: Any) -> _LayoutType:
    return _LayoutType(layout)


@lower_constant(_LayoutType)  # type: ignore[untyped-decorator]
def _no_value(context: Any, builder: Any, kind: _LayoutType, layout: Layout) -> Any:
    return context.get_dummy_value()


@infer_getattr
class _FieldsOfLayout(AttributeTemplate):  # type: ignore[misc]
    key = _LayoutType

    def generic_resolve(self, typ: _LayoutType, attr: str) -> Any:  # type: ignore[override]
        return types.intp if attr == "nbytes" or attr in typ.layout.offsets else None


@lower_getattr_generic(_LayoutType)  # type: ignore[untyped-decorator]
def _offset(context: Any, builder: Any, kind: _LayoutType, value: Any, field: str) -> Any:
    return context.get_constant(types.intp, getattr(kind.layout, field))


@piece
def put_short(out: Any, at: Any, value: Any) -> None:
    """Store the low 16 bits of `value` at byte `at`, the lower byte first."""
    out[at] = np.uint8(value & 0xFF)
    out[at + 1] = np.uint8((value >> 8) & 0xFF)


@piece
def get_short(data: Any, at: Any) -> Any:
    """Load two bytes at `at` as an integer that is not negative, the lower first."""
    return np.int64(data[at]) | (np.int64(data[at + 1]) << 8)


@piece
def get_nibble(data: Any, at: Any, j: Any) -> Any:
    """The j-th four bits from byte `at` on, the low ones of a byte first."""
    return (np.int32(data[at + j // 2]) >> (4 * (j & 1))) & 15


@piece
def put_half(out: Any, at: Any, value: Any) -> None:
    """Store a float32 as float16 at byte `at`."""
    put_short(out, at, half_bits(value))


@piece
def get_half(data: Any, at: Any) -> Any:
    """Load the float16 at byte `at` as float32."""
    return half_value(np.uint16(get_short(data, at)))


@piece
def get_values(data: Any, at: Any, n: Any, table: Any, scale: Any, out: Any, to: Any) -> None:
    """Entries of a table of 16, times `scale`, that `n` bytes at `at` choose: by the low nibbles, then by the high."""
    for i in range(n):
        byte = data[at + i]
        out[to + i] = scale * table[byte & 15]
        out[to + n + i] = scale * table[byte >> 4]


@piece
def put_word(out: Any, at: Any, value: Any) -> None:
    """Store the low 32 bits of `value` at byte `at`, the lowest byte first."""
    for i in range(4):
        out[at + i] = np.uint8((value >> np.uint32(8 * i)) & 0xFF)


@piece
def get_word(data: Any, at: Any) -> Any:
    """Load four bytes at `at` as uint32, the lowest first."""
    value = np.uint32(0)
    for i in range(4):
        value |= np.uint32(np.uint32(data[at + i]) << np.uint32(8 * i))
    return value
