"""Matrices of bitsandbytes: NF4 and FP4 in blocks, and INT8 with a scale for each row (LLM.int8).

Source of the layouts: the library's QuantState and its modules Linear4bit and Linear8bitLt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import PackedMatrix, floats, misshapen, require, wrong
from quantkit.sources.packed.scaled import INT8, scaled

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE = 4096  # bytes
_MAX_BLOCK = 1 << 20
# The library's 1 / 127, in float32.
_PER_STEP = 7.874015718698502e-3


@dataclass
class BlockedCodes(PackedMatrix):
    """Codes of four bits, the first in the upper half of a byte, into a table; a scale for each block of numbers."""

    block: int
    nested: tuple[int, float] | None  # size of a block of scales, and what is added to them

    def prepare(self) -> tuple[np.ndarray, np.ndarray]:
        """What each byte stands for, [256, 2], and the scales of all blocks."""
        table = floats(self.raw, f"{self.name}.quant_map")
        if not np.isfinite(table).all():
            raise wrong(self.raw, f"{self.name}.quant_map", "not of finite numbers")
        codes = np.arange(256)
        absmax = f"{self.name}.absmax"
        if self.nested is None:
            scales = floats(self.raw, absmax)
        else:
            block, offset = self.nested
            outer = np.repeat(floats(self.raw, f"{self.name}.nested_absmax"), block)
            narrow = self.raw.whole(absmax)
            scales = floats(self.raw, f"{self.name}.nested_quant_map")[narrow] * outer[: len(narrow)]
            scales += np.float32(offset)
        return np.stack([table[codes >> 4], table[codes & 15]], axis=1), scales

    def rows(self, prepared: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        pairs, scales = prepared
        n_columns = self.shape[1]
        first, last = start * n_columns, stop * n_columns
        data = self.raw.bits(self.name).reshape(-1)
        if n_columns % 2 == 0:
            stored = self.raw.read(self.name, data.reshape(-1, n_columns // 2), start, stop)
            values = np.take(pairs, stored, axis=0).reshape(-1)
        else:  # rows begin within bytes
            stored = self.raw.whole(self.name).reshape(-1)[first // 2 : -(-last // 2)]
            values = np.take(pairs, stored, axis=0).reshape(-1)[first % 2 :][: last - first]
        block = first // self.block
        of_values = np.repeat(scales[block : -(-last // self.block)], self.block)
        values = values * of_values[first - block * self.block :][: last - first]
        rows: np.ndarray = values.reshape(stop - start, n_columns)
        return rows


def find_bitsandbytes(raw: SafetensorsCheckpoint) -> Iterator[PackedMatrix]:
    """The matrices of a checkpoint that bitsandbytes quantized."""
    for name, tensor in raw.tensors.items():
        if match := _STATE.fullmatch(name):
            yield _blocked(raw, match[1], name, match[2])
        elif tensor.dtype == INT8 and f"{name.removesuffix('weight')}SCB" in raw.tensors:
            base = name.removesuffix("weight")
            kind = f"{base}weight_format"
            if kind in raw.tensors and raw.whole(kind).any():
                raise wrong(raw, kind, "of a layout for one kind of GPU; save the model in row-major order")
            matrix = scaled(raw, name, name, f"{base}SCB", factor=_PER_STEP)
            if kind in raw.tensors:
                matrix.parts += (kind,)
            yield matrix


def _blocked(raw: SafetensorsCheckpoint, name: str, state: str, kind: str) -> BlockedCodes:
    stored = raw.tensors[require(raw, name, state)]
    told = _told(raw, state)
    shape = told.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise wrong(raw, state, f"of shape {str(shape)[:80]}, which is no matrix")
    count = math.prod(shape)
    if stored.dtype != "U8" or math.prod(stored.shape) != -(-count // 2):
        raise misshapen(raw, name, f"{shape[0]} x {shape[1]} numbers of 4 bits")
    block, n_blocks = _check_blocks(raw, state, told.get("blocksize"), f"{name}.absmax", count)
    table = raw.tensors[require(raw, f"{name}.quant_map", name)]
    if table.shape != (16,):
        raise misshapen(raw, table.name, "16 numbers")
    parts = [name, state, f"{name}.absmax", table.name]
    nested = None
    if f"{name}.nested_absmax" in raw.tensors:
        offset = told.get("nested_offset")
        outer, _ = _check_blocks(raw, state, told.get("nested_blocksize"), f"{name}.nested_absmax", n_blocks)
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise wrong(raw, state, f"with the nested offset {str(offset)[:80]}")
        codes = raw.tensors[require(raw, f"{name}.nested_quant_map", name)]
        if codes.shape != (256,) or raw.tensors[f"{name}.absmax"].dtype != "U8":
            raise misshapen(raw, codes.name, "256 numbers for scales in U8")
        parts += [f"{name}.nested_absmax", codes.name]
        nested = outer, float(offset)
    return BlockedCodes(
        raw, name, (shape[0], shape[1]), tuple(parts), f"{kind.upper()} in blocks of {block}", block, nested
    )


def _told(raw: SafetensorsCheckpoint, state: str) -> dict[str, Any]:
    tensor = raw.tensors[state]
    if tensor.dtype != "U8" or tensor.nbytes > _MAX_STATE:
        raise misshapen(raw, state, "a short text")
    try:
        told = json.loads(raw.whole(state).tobytes())
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise wrong(raw, state, "not a JSON object")
    return told


def _check_blocks(raw: SafetensorsCheckpoint, state: str, block: Any, scales: str, count: int) -> tuple[int, int]:
    """The size of a `block` and how many `count` numbers make, after holding `scales` against that."""
    if type(block) is not int or not 0 < block <= _MAX_BLOCK:
        raise wrong(raw, state, f"of blocks of {str(block)[:80]}")
    n_blocks = -(-count // block)
    if raw.tensors[require(raw, scales, state)].shape != (n_blocks,):
        raise misshapen(raw, scales, f"the scales of {n_blocks} blocks")
    return block, n_blocks
