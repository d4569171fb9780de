"""Numbers in the bytes of a block: pieces of kernels that several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.blocks.lanes import half_bits, half_value
from quantkit.compile.kernel import piece


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
