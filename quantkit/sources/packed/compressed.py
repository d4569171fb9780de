"""Matrices as compressed-tensors stores them: integers of 1 to 8 bits packed into words, FP8, INT8, NVFP4 and MXFP4.

Source of the layouts: the library's own compressors, of versions that pack without gaps (0.15 on) and with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from quantkit.architectures.config import Config
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.fp4 import float4
from quantkit.sources.packed.matrix import (
    PackedMatrix,
    as_floats,
    groups_of_columns,
    misshapen,
    n_words,
    require,
    scale_groups,
    unpack,
    words_of,
)
from quantkit.sources.packed.scaled import find_scaled

MAX_BITS = 8


class _Scheme(NamedTuple):
    """How a group of modules is quantized, as far as config.json tells."""

    bits: int
    group_size: int | None


class _Groups(NamedTuple):
    """The group of each column or their size, and the zero points [rows, groups] or nothing."""

    columns: np.ndarray | int
    zeros: np.ndarray | None


@dataclass
class PackedIntegers(PackedMatrix):
    """Integers in words of 32 bits, a scale for each group of columns in a row, perhaps a zero point."""

    packed: str
    scale: str
    bits: int
    across: bool
    n_groups: int
    group_size: int
    index: str | None
    zero_point: str | None

    def prepare(self) -> _Groups:
        """Which columns belong together, and the zero points, which are packed along rows."""
        columns = groups_of_columns(self.raw, self.index, self.shape[1], self.n_groups, self.group_size)
        if self.zero_point is None:
            return _Groups(columns, None)
        if self.raw.tensors[self.zero_point].dtype == "I8":
            return _Groups(columns, self.raw.whole(self.zero_point).astype(np.int32) + (1 << (self.bits - 1)))
        words = np.ascontiguousarray(words_of(self.raw, self.zero_point).T)
        return _Groups(columns, unpack(words, self.bits, self.shape[0], self.across).T)

    def rows(self, prepared: _Groups, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        words = self.raw.read(self.packed, self.raw.bits(self.packed), start, stop).view(np.uint32)
        view = self.raw.bits(self.scale).reshape(-1, self.n_groups)
        lines = (start, stop) if len(view) > 1 else (0, 1)
        scales = as_floats(self.raw, self.scale, self.raw.read(self.scale, view, *lines))
        zeros = 1 << (self.bits - 1) if prepared.zeros is None else prepared.zeros[start:stop]
        return scale_groups(unpack(words, self.bits, self.shape[1], self.across), prepared.columns, zeros, scales)


def _schemes(config: Config) -> tuple[list[_Scheme], tuple[int, int] | None]:
    """What the groups of modules say of weights, and the size of blocks where one of them has blocks."""
    groups, schemes, block = config.table("config_groups") or {}, [], None
    for group in groups.values():
        weights = Config(group, config.path).table("weights") if isinstance(group, dict) else None
        if weights is None:
            continue
        told = Config(weights, config.path)
        bits, size = told.integer("num_bits") or 8, told.find("group_size")
        schemes.append(_Scheme(bits, size if type(size) is int and size > 0 else None))
        block = block_size(told, "block_structure") or block
    return schemes, block


def block_size(config: Config, name: str) -> tuple[int, int] | None:
    """The two sizes of a block that field `name` tells; None where there are none."""
    value = config.find(name)
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() else part for part in value.split("x")]
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 1 << 24 for n in value):
        raise config.wrong((name,), value, "the height and width of a block")
    return value[0], value[1]


def find_compressed(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    """The packed matrices of a checkpoint whose quantization_config is `config`.

    Raises QuantkitError for formats of other tensors (sparse ones, and rotated weights).
    """
    kind = config.find("format")
    sparse = Config(config.table("sparsity_config") or {}, config.path).find("format")
    if kind in ("marlin-24", "mxfp6-pack-quantized") or sparse not in (None, "dense"):
        name = kind if sparse in (None, "dense") else sparse
        raise QuantkitError(f"{config.path}: compressed-tensors' format {str(name)[:80]!r} is not supported")
    if Config(config.table("transform_config") or {}, config.path).table("config_groups"):
        raise QuantkitError(f"{config.path}: its weights are rotated (transform_config), which is not supported")
    schemes, block = _schemes(config)
    for name, tensor in raw.tensors.items():
        if name.endswith("weight_packed"):
            base = name.removesuffix("_packed")
            if tensor.dtype == "I32":
                yield _integers(raw, base, schemes)
            else:
                of_all = f"{base}_global_scale"
                whole = of_all if of_all in raw.tensors else None
                yield float4(raw, base, name, require(raw, f"{base}_scale", name), whole, divides=True)
    yield from find_scaled(raw, block)


def _integers(raw: SafetensorsCheckpoint, base: str, schemes: list[_Scheme]) -> PackedIntegers:
    packed, shape_of = f"{base}_packed", require(raw, f"{base}_shape", f"{base}_packed")
    scale = require(raw, f"{base}_scale", packed)
    stored, scales = raw.tensors[packed].shape, raw.tensors[scale].shape
    told: Any = raw.whole(shape_of).tolist() if len(raw.tensors[shape_of].shape) == 1 else None
    if not isinstance(told, list) or len(told) != 2 or not all(type(n) is int for n in told):
        raise misshapen(raw, shape_of, "the numbers of rows and columns of a matrix")
    n_rows, n_columns = told
    fits = [
        (scheme, across)
        for scheme in schemes
        for across in (True, False)
        if 1 <= scheme.bits <= MAX_BITS
        and n_columns > 0
        and stored == (n_rows, n_words(n_columns, scheme.bits, across))
    ]
    if not fits:
        raise misshapen(raw, packed, f"{n_rows} x {n_columns} numbers of the bits that config.json tells")
    n_groups = scales[1] if len(scales) == 2 else 1
    fits = [
        (scheme, across)
        for scheme, across in fits
        if n_groups in (1, -(-n_columns // (scheme.group_size or n_columns)))
    ]
    if scales not in ((n_rows, n_groups), (1,), (1, 1), (n_rows,)) or not fits:
        raise misshapen(raw, scale, f"the scales of {packed!r} of {n_rows} x {n_columns} numbers")
    if len({(scheme.bits, across if WORDS_DIFFER[scheme.bits] else True) for scheme, across in fits}) > 1:
        raise misshapen(raw, packed, "numbers of one number of bits: config.json tells of several that fit")
    (bits, size), across = fits[0]
    group_size = size if n_groups > 1 and size else n_columns
    parts = [packed, scale, shape_of]
    index, zeros = f"{base}_g_idx", f"{base}_zero_point"
    has_index = index in raw.tensors and n_groups > 1 and raw.tensors[index].shape == (n_columns,)
    if index in raw.tensors:
        parts.append(index)
    if zeros in raw.tensors:
        parts.append(zeros)
        wanted = (n_rows, n_groups) if raw.tensors[zeros].dtype == "I8" else (n_words(n_rows, bits, across), n_groups)
        if raw.tensors[zeros].shape != wanted:
            raise misshapen(raw, zeros, f"the zero points of {packed!r}")
    kind = f"INT{bits} in groups of {group_size}" if n_groups > 1 else f"INT{bits} with a scale for each row"
    return PackedIntegers(
        raw, base, (n_rows, n_columns), tuple(parts), kind, packed, scale, bits, across, n_groups, group_size,
        index if has_index else None, zeros if zeros in raw.tensors else None,
    )  # fmt: skip


# Whether numbers of so many bits lie otherwise in words that have gaps.
WORDS_DIFFER = {bits: 32 % bits > 0 for bits in range(1, MAX_BITS + 1)}
