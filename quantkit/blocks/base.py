"""What a block format is, and the register of all of them."""

from __future__ import annotations

import builtins
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from numba import njit

from quantkit.blocks.types import GGMLType

# IEEE float32 as written: no reassociation, no fused multiply-add, no traps.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}


@functools.cache
def sources() -> str:
    """A digest of this package's source files, all of which may be inlined into a kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called, and keep the machine code on disk for the next run.

    Kernels see whole blocks as flat arrays. They hold no lock, so threads run them side by side.
    """
    try:
        compiled: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache directory can be written
        compiled = njit(**_OPTIONS)(function)
    else:
        # numba takes machine code for valid while the kernel's own file is unchanged: add those of its helpers.
        file = compiled._cache._cache_file  # type: ignore[attr-defined]
        file._source_stamp = (file._source_stamp, sources())
    return compiled


# A piece of a kernel: always inlined, so that the constants it is given are constants to the optimiser.
piece: Callable[..., Any] = njit(forceinline=True, **_OPTIONS)


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

    def __init_subclass__(cls, type: GGMLType) -> None:
        cls.type = type
        Block.registry[type] = cls
