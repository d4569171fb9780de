"""Matrices of 4-bit floats: NVFP4 (ModelOpt's and compressed-tensors' layouts) and MXFP4 of compressed-tensors.

Sources of the layouts: both libraries' readers, and the OCP's specification of microscaling formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import (
    E2M1,
    FLOAT8,
    PackedMatrix,
    as_floats,
    floats,
    misshapen,
    require,
)

# Both numbers of a byte, the one in the lower half first.
_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1)


@dataclass
class Float4Matrix(PackedMatrix):
    """Codes, two to a byte, a scale for each `group` of them, and a scale of all, which may divide instead."""

    codes: str
    scale: str
    group: int
    scale_of_all: str | None
    divides: bool

    def prepare(self) -> float:
        """The scale of all."""
        if self.scale_of_all is None:
            return 1.0
        return float(floats(self.raw, self.scale_of_all).reshape(-1)[0])

    def rows(self, prepared: float, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        values = np.take(_PAIRS, self.raw.read(self.codes, self.raw.bits(self.codes), start, stop), axis=0)
        stored = self.raw.read(self.scale, self.raw.bits(self.scale), start, stop)
        scales = as_floats(self.raw, self.scale, stored, codes_are_powers=True)
        of_all = np.float32(prepared)
        scales = scales / of_all if self.divides else scales * of_all
        values = values.reshape(stop - start, -1, self.group)
        values *= scales[:, :, None]
        return values.reshape(stop - start, -1)


def float4(
    raw: SafetensorsCheckpoint, name: str, codes: str, scale: str, scale_of_all: str | None, divides: bool
) -> Float4Matrix:
    """Matrix `name` of these tensors. Raises QuantkitError when their shapes do not fit."""
    stored, scales = raw.tensors[codes], raw.tensors[scale]
    if stored.dtype != "U8" or len(stored.shape) != 2:
        raise misshapen(raw, codes, "4-bit numbers of a matrix")
    nv = scales.dtype in FLOAT8
    group = 16 if nv else 32
    n_rows, n_columns = stored.shape[0], 2 * stored.shape[1]
    if (
        scales.shape != (n_rows, n_columns // group)
        or n_columns % group
        or not (nv or scales.dtype in ("U8", "F8_E8M0"))
    ):
        raise misshapen(raw, scale, f"the scales of {group} columns each of {codes!r} of shape {list(stored.shape)}")
    parts = [codes, scale]
    if scale_of_all is not None:
        if raw.tensors[scale_of_all].shape not in ((), (1,)):
            raise misshapen(raw, scale_of_all, "one number")
        parts.append(scale_of_all)
    kind = "NVFP4" if nv else "MXFP4"
    return Float4Matrix(raw, name, (n_rows, n_columns), tuple(parts), kind, codes, scale, group, scale_of_all, divides)


def find_modelopt(raw: SafetensorsCheckpoint) -> Iterator[PackedMatrix]:
    """The matrices of NVIDIA's ModelOpt: `weight` of bytes, `weight_scale`, and `weight_scale_2` of all."""
    for name, tensor in raw.tensors.items():
        if tensor.dtype == "U8" and f"{name}_scale_2" in raw.tensors:
            yield float4(raw, name, name, require(raw, f"{name}_scale", name), f"{name}_scale_2", divides=False)
