"""Matrices of torchao's tensors that are plain in safetensors: Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor.

Source of the layout: torchao.prototype.safetensors, which stores what a tensor is made of as `_weight_qdata`,
`_weight_scale` and `_weight_zero_point`.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import FLOAT8, PackedMatrix, misshapen, require
from quantkit.sources.packed.scaled import INT8, scaled

_CODES = "._weight_qdata"


def find_torchao(raw: SafetensorsCheckpoint) -> Iterator[PackedMatrix]:
    """The matrices of a checkpoint that torchao quantized. Raises QuantkitError for layouts made for one kernel."""
    for name, tensor in raw.tensors.items():
        if name.endswith(_CODES):
            base = name.removesuffix(_CODES)
            if tensor.dtype not in FLOAT8 and tensor.dtype != INT8:
                raise misshapen(raw, name, "FP8 or INT8, the layouts of torchao that are supported")
            zeros = f"{base}._weight_zero_point"
            if zeros in raw.tensors and raw.tensors[zeros].dtype not in ("I8", "U8", "I32", "I64"):
                raise misshapen(raw, zeros, "whole numbers: torchao's INT4 for a GPU's kernels is not supported")
            scale = require(raw, f"{base}._weight_scale", name)
            block = _block(raw, name, scale)
            yield scaled(raw, f"{base}.weight", name, scale, block, zeros if zeros in raw.tensors else None)


def _block(raw: SafetensorsCheckpoint, codes: str, scale: str) -> tuple[int, int] | None:
    """The size of a block, which torchao's scales have an axis for each axis for."""
    shape, scales = raw.tensors[codes].shape, raw.tensors[scale].shape
    if len(shape) != 2 or len(scales) != 2 or 0 in scales or any(n % m for n, m in zip(shape, scales, strict=True)):
        return None
    return shape[0] // scales[0], shape[1] // scales[1]
