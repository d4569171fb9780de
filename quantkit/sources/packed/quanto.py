"""Matrices of Quanto (optimum-quanto) that its files say enough of: INT8 and FP8, with a scale for each row.

Source of the layout: optimum-quanto's WeightQBytesTensor, whose parts are `weight._data` and `weight._scale`. Of
matrices in 4 and 2 bits, files lack the shape, which Quanto takes from a model.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import FLOAT8, PackedMatrix, misshapen, require, wrong
from quantkit.sources.packed.scaled import INT8, scaled

_CODES, _BITS = "._data", "._data._data"


def find_quanto(raw: SafetensorsCheckpoint) -> Iterator[PackedMatrix]:
    """The matrices of a checkpoint that Quanto quantized. Raises QuantkitError for those in fewer than 8 bits."""
    for name, tensor in raw.tensors.items():
        if name.endswith(_BITS):
            raise wrong(raw, name, "packed by Quanto in fewer than 8 bits: its file does not tell the shape")
        if name.endswith(_CODES):
            if tensor.dtype not in FLOAT8 and tensor.dtype != INT8:
                raise misshapen(raw, name, "INT8 or FP8")
            base = name.removesuffix(_CODES)
            yield scaled(raw, base, name, require(raw, f"{base}._scale", name))
