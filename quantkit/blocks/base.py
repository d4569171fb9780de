"""What a block format is, and the register of all of them."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, ClassVar

from quantkit.blocks.types import GGMLType


class Block:
    """A block format: how weights become bytes and bytes become weights.

    A subclass is registered by being defined with its type: `class Q4_K(Block, type=GGMLType.Q4_K)`. Its two kernels
    are compiled when first called:

    - `encode(x, out, n_per_row, weights)`: float32 `x`, whole rows flattened, to bytes in `out`. `weights` is None or
      float32 of `n_per_row` importance weights, the same for every row; formats that cannot use them ignore them.
    - `decode(data, out)`: bytes to float32, both flat.
    """

    type: ClassVar[GGMLType]
    encode: ClassVar[Callable[..., None]]
    decode: ClassVar[Callable[..., None]]

    registry: ClassVar[dict[GGMLType, builtins.type[Block]]] = {}

    def __init_subclass__(cls, type: GGMLType | None = None) -> None:
        if type is not None:  # a base of several formats has none
            cls.type = type
            Block.registry[type] = cls

    @classmethod
    def encode_kernel(cls) -> tuple[Any, tuple[Any, ...]]:
        """The kernel behind `encode`, and the numba types of what it takes besides."""
        return cls.encode, ()

    @classmethod
    def decode_kernel(cls) -> tuple[Any, tuple[Any, ...]]:
        """The kernel behind `decode`, and the numba types of what it takes besides."""
        return cls.decode, ()
