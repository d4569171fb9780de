"""Block formats: encode and decode rows of weights in GGML's types.

`GGMLType` costs nothing to import; numba and the kernels are loaded by the first `encode` or `decode`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    import numpy as np

    from quantkit.blocks.base import Block
    from quantkit.compile.ahead import KernelJob

__all__ = [
    "GGMLType",
    "block",
    "decode",
    "encodable",
    "encode",
    "first_nonfinite",
    "first_nonfinite_stored",
    "jobs",
    "largest",
]

# The width of the plain floats, and the bits of the exponent, all set in NaN and infinity.
_FLOATS = {GGMLType.F32: (32, 0x7F800000), GGMLType.F16: (16, 0x7C00), GGMLType.BF16: (16, 0x7F80)}


def _registry() -> dict[GGMLType, type[Block]]:
    # A format is registered by being defined.
    from quantkit.blocks import float4, iq1, iq2, iq3, k_affine, k_symmetric, legacy, nonlinear, one_scale, plain  # noqa: F401
    from quantkit.blocks.base import Block

    return Block.registry


def encodable() -> list[GGMLType]:
    """The types that `encode` and `decode` know."""
    return sorted(_registry())


def block(kind: GGMLType) -> type[Block]:
    """The format of `kind`. Raises QuantkitError for types that have none."""
    try:
        return _registry()[kind]
    except KeyError:
        raise QuantkitError(f"{kind.name} cannot be encoded or decoded") from None


def encode(
    rows: np.ndarray, kind: GGMLType, weights: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Quantize float32 `rows` of shape (n_rows, n_per_row) to uint8 of shape (n_rows, bytes of a row).

    `weights`, float32 of n_per_row, say how much each column matters. `out` receives the bytes if given. The bytes
    are those of ggml's `ggml_quantize_chunk`. Raises QuantkitError when blocks do not divide the rows.
    """
    import numpy as np

    n_rows, n_per_row = rows.shape
    if out is None:
        out = np.empty((n_rows, kind.row_nbytes(n_per_row)), np.uint8)
    if weights is not None:
        weights = _fixed(np.ascontiguousarray(weights, np.float32))
    block(kind).encode(_fixed(np.ascontiguousarray(rows, np.float32)), out.reshape(-1), n_per_row, weights)
    return out


def decode(rows: np.ndarray, kind: GGMLType, out: np.ndarray | None = None) -> np.ndarray:
    """Dequantize uint8 `rows` of shape (n_rows, bytes of a row) to float32 of shape (n_rows, n_per_row).

    `out` receives the weights if given. The values are those of ggml's `dequantize_row_*`, bit for bit.
    """
    import numpy as np

    n_rows, nbytes = rows.shape
    if nbytes % kind.type_size:
        raise QuantkitError(f"rows of {nbytes} bytes do not hold {kind.name}: its blocks take {kind.type_size}")
    if out is None:
        out = np.empty((n_rows, nbytes // kind.type_size * kind.block_size), np.float32)
    block(kind).decode(_fixed(np.ascontiguousarray(rows)), out.reshape(-1))
    return out


def _fixed(array: np.ndarray) -> np.ndarray:
    """A flat, read-only view: numba compiles a kernel anew for arrays that can be written."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def first_nonfinite(rows: np.ndarray) -> int:
    """The index of the first NaN or infinity in contiguous float32 `rows`, flattened; -1 if there is none."""
    from quantkit.blocks.plain import first_nonfinite as search

    return int(search(_fixed(rows)))


def first_nonfinite_stored(rows: np.ndarray, kind: GGMLType) -> int:
    """The same for contiguous uint8 rows that hold floats of `kind`: F32, F16 or BF16.

    Plain numpy, for copying, which needs no kernels and should not wait for them.
    """
    import numpy as np

    bits, exponent = _FLOATS[kind]
    words = rows.reshape(-1).view(f"u{bits // 8}")
    # Seen as integers, NaN and infinity are the largest: of the positive floats, and with the sign bit of all.
    if words.size == 0 or (words.view(f"i{bits // 8}").max() < exponent and words.max() < exponent | 1 << (bits - 1)):
        return -1
    return int(np.argmax(words & words.dtype.type(exponent) == exponent))


def largest(rows: np.ndarray) -> float:
    """The largest magnitude in contiguous float32 `rows`."""
    from quantkit.blocks.plain import largest_magnitude

    return float(largest_magnitude(_fixed(rows)))


def codec_kernels(encoded: Iterable[tuple[GGMLType, bool]] = (), decoded: Iterable[GGMLType] = ()) -> list[KernelJob]:
    """The kernels to compile for encoding to types, with importance weights or without, and for decoding from others.

    In the order in which they are needed.
    """
    from numba.core import types

    from quantkit.blocks.grids import GridBlock, neighbour_job
    from quantkit.blocks.plain import first_nonfinite as search
    from quantkit.blocks.plain import largest_magnitude
    from quantkit.compile.ahead import KernelJob

    floats, raw = (types.Array(kind, 1, "C", readonly=True) for kind in (types.float32, types.uint8))
    result, packed = types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C")
    encoded, found, encoders = list(encoded), [], []
    for kind in decoded:
        kernel, tables = block(kind).decode_kernel()
        found.append(KernelJob(kernel, (raw, result, *tables), 0.3))
    for kind, weighted in encoded:
        kernel, tables = block(kind).encode_kernel()
        on_grid = issubclass(block(kind), GridBlock)  # which takes an empty array for no weights
        signature = (floats, packed, types.int64, floats if weighted or on_grid else types.none, *tables)
        encoders.append(KernelJob(kernel, signature, 4.0 if on_grid else 2.0))
    if any(issubclass(block(kind), GridBlock) for kind, _ in encoded):
        found.append(neighbour_job())
    if encoders:
        found += [
            KernelJob(search, (floats,), 0.2),
            *dict.fromkeys(encoders),
            KernelJob(largest_magnitude, (floats,), 0.2),
        ]
    return found
