"""Matrices of 8-bit numbers with scales: FP8 and INT8, one scale for all, for each row, or for each block.

Sources of the layouts: transformers' and vLLM's readers of `fp8`, `fbgemm_fp8`, compressed-tensors, ModelOpt and
bitsandbytes, and DeepSeek V3's inference code for blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import FLOAT8, PackedMatrix, as_floats, floats, misshapen

INT8 = "I8"


class _Scales(NamedTuple):
    """Scales [matrices, blocks of rows, blocks of columns], the size of a block, and what stands for zero."""

    values: np.ndarray
    rows: int
    columns: int
    zeros: np.ndarray | None


@dataclass
class ScaledMatrix(PackedMatrix):
    """Codes and scales; `zero_point` names what is taken from codes first, `factor` multiplies in the end."""

    codes: str
    scale: str
    block: tuple[int, int]
    zero_point: str | None = None
    factor: float | None = None

    def prepare(self) -> _Scales:
        """The scales, as numbers."""
        *lead, n_rows, n_columns = self.shape
        rows, columns = self.block
        grid = (math.prod(lead), -(-n_rows // rows), -(-n_columns // columns))
        values = floats(self.raw, self.scale, codes_are_powers=True)
        if values.size == 1:
            grid = (1, 1, 1)
        zeros = None
        if self.zero_point is not None:
            zeros = self.raw.whole(self.zero_point).astype(np.float32).reshape(grid)
        return _Scales(values.reshape(grid), rows, columns, zeros)

    def rows(self, prepared: _Scales, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        stored = self.raw.bits(self.codes).reshape(-1, self.shape[-1])
        codes = self.raw.read(self.codes, stored, start, stop)
        kind = self.raw.tensors[self.codes].dtype
        values: np.ndarray = codes.astype(np.float32) if kind == INT8 else as_floats(self.raw, self.codes, codes)
        if prepared.zeros is not None:
            values -= self._spread(prepared, prepared.zeros, start, stop)
        values *= self._spread(prepared, prepared.values, start, stop)
        if self.factor is not None:
            values *= np.float32(self.factor)
        return values

    def _spread(self, prepared: _Scales, scales: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The scales of each row, [rows, 1] or [rows, row length]."""
        if scales.size == 1:
            return scales.reshape(1, 1)
        matrix, row = np.divmod(np.arange(start, stop), self.shape[-2])
        of_rows: np.ndarray = scales[matrix, row // prepared.rows]
        if of_rows.shape[1] == 1:
            return of_rows
        return np.repeat(of_rows, prepared.columns, axis=1)[:, : self.shape[-1]]


def scaled(
    raw: SafetensorsCheckpoint,
    name: str,
    codes: str,
    scale: str,
    block: tuple[int, int] | None = None,
    zero_point: str | None = None,
    factor: float | None = None,
) -> ScaledMatrix:
    """Matrix `name` of the tensors `codes` and `scale`, whose shapes tell what has a scale of its own.

    `block` is the size of a block where there are such. Raises QuantkitError when the shapes do not fit.
    """
    shape, of_scale = raw.tensors[codes].shape, raw.tensors[scale].shape
    if len(shape) not in (2, 3) or not math.prod(shape):
        raise misshapen(raw, codes, "a matrix")
    what = "INT8" if raw.tensors[codes].dtype == INT8 else "FP8"
    *lead, n_rows, n_columns = shape
    grid: tuple[int, int]
    if math.prod(of_scale) == 1:
        grid, kind = (n_rows, n_columns), f"{what} with one scale"
    elif block is not None and of_scale == (*lead, -(-n_rows // block[0]), -(-n_columns // block[1])):
        grid, kind = block, f"{what} in blocks of {block[0]}x{block[1]}"
    elif of_scale in ((*lead, n_rows), (*lead, n_rows, 1)):
        grid, kind = (1, n_columns), f"{what} with a scale for each row"
    elif lead and of_scale in (tuple(lead), (*lead, 1, 1)):
        grid, kind = (n_rows, n_columns), f"{what} with a scale for each expert"
    elif len(of_scale) == len(shape) and of_scale[:-1] == shape[:-1] and n_columns % of_scale[-1] == 0:
        grid = (1, n_columns // of_scale[-1])
        kind = f"{what} in groups of {grid[1]}"
    else:
        blocks = "" if block is None else f" in blocks of {block[0]}x{block[1]}"
        raise misshapen(raw, scale, f"the scales of {codes!r} of shape {list(shape)}{blocks}")
    parts = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    if zero_point is not None:
        zeros = raw.tensors[zero_point]
        if math.prod(zeros.shape) != math.prod(of_scale) or zeros.dtype not in ("I8", "U8", "I32", "I64"):
            raise misshapen(raw, zero_point, f"the zero points of {codes!r}")
    return ScaledMatrix(raw, name, shape, parts, kind, codes, scale, grid, zero_point, factor)


def find_scaled(raw: SafetensorsCheckpoint, block: tuple[int, int] | None) -> Iterator[PackedMatrix]:
    """The matrices of 8 bits whose scale stands beside them, called `_scale_inv` or `_scale`; both multiply."""
    for name, tensor in raw.tensors.items():
        if tensor.dtype not in FLOAT8 and tensor.dtype != INT8:
            continue
        scale = next((name + ending for ending in ("_scale_inv", "_scale") if name + ending in raw.tensors), None)
        zeros = f"{name}_zero_point"
        if scale is not None:
            yield scaled(raw, name, name, scale, block, zeros if zeros in raw.tensors else None)
