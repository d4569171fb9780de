"""Matrices of GPTQ and AWQ: integers packed into words, columns as rows, scales and zero points for groups.

Sources of the layouts: GPTQModel's and AutoAWQ's modules (`qweight`, `qzeros`, `scales`, `g_idx`). Both store [inputs,
outputs], so that a row of the weight is a column of words: what is stored of a matrix is held while it is read. AWQ's
version for products with vectors (GEMV) stores rows as rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quantkit.architectures.config import Config
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import SafetensorsCheckpoint
from quantkit.sources.packed.matrix import (
    WORD,
    PackedMatrix,
    floats,
    groups_of_columns,
    misshapen,
    require,
    scale_groups,
    unpack,
    words_of,
)

BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
# Which of eight neighbours AutoAWQ keeps in each place of a word, from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _Stored(NamedTuple):
    """A matrix as it is stored: words, zeros and scales [groups, outputs], each input's group or the groups' size."""

    words: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray | int


@dataclass
class GroupedColumns(PackedMatrix):
    """What GPTQ and AWQ share. `base` is the name of the module."""

    base: str
    bits: int
    group_size: int
    index: str | None

    def _stored(self, zeros: np.ndarray) -> _Stored:
        groups = groups_of_columns(self.raw, self.index, self.shape[1], len(zeros), self.group_size)
        scales = floats(self.raw, f"{self.base}.scales")
        return _Stored(words_of(self.raw, f"{self.base}.qweight"), zeros, scales, groups)

    def _scaled(self, prepared: _Stored, numbers: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The weights whose integers are `numbers` [rows, row length]."""
        zeros = np.ascontiguousarray(prepared.zeros[:, start:stop].T)
        scales = np.ascontiguousarray(prepared.scales[:, start:stop].T)
        return scale_groups(numbers, prepared.groups, zeros, scales)


@dataclass
class GPTQMatrix(GroupedColumns):
    """GPTQ's: neighbours along the inputs share a word. `zero_offset` is what was taken from the zero points."""

    zero_offset: int

    def prepare(self) -> _Stored:
        """All of it, which its rows lie across."""
        zeros = unpack(words_of(self.raw, f"{self.base}.qzeros"), self.bits, self.shape[0])
        return self._stored(zeros.astype(np.int16) + self.zero_offset)

    def rows(self, prepared: _Stored, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        words = np.ascontiguousarray(prepared.words[:, start:stop].T)
        return self._scaled(prepared, unpack(words, self.bits, self.shape[1]), start, stop)


@dataclass
class AWQMatrix(GroupedColumns):
    """AWQ's: neighbours along the outputs share a word, in an order of their own."""

    def prepare(self) -> _Stored:
        """All of it, which its rows lie across."""
        words = words_of(self.raw, f"{self.base}.qzeros")
        return self._stored(np.ascontiguousarray(self._columns(words, 0, self.shape[0]).T))

    def rows(self, prepared: _Stored, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        return self._scaled(prepared, self._columns(prepared.words, start, stop), start, stop)

    @staticmethod
    def _columns(words: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The numbers of outputs `start` to `stop`, uint8 [outputs, rows of `words`]."""
        first = start // 8
        stored = np.ascontiguousarray(words[:, first : -(-stop // 8)].T, "<u4").view(np.uint8)
        stored = stored.reshape(-1, words.shape[0], 4)
        numbers = np.empty((len(stored), 8, words.shape[0]), np.uint8)
        for place, neighbour in enumerate(_AWQ_ORDER):
            np.right_shift(stored[:, :, place // 2], _AWQ_BITS * (place % 2), out=numbers[:, neighbour])
        numbers &= 15
        return numbers.reshape(-1, words.shape[0])[start - 8 * first : stop - 8 * first]


@dataclass
class AWQRows(PackedMatrix):
    """AWQ's for products with vectors: neighbours along the inputs share a word, in their order.

    `base` is the name of the module. Zero points and scales [outputs, groups] are padded to whole words.
    """

    base: str
    group_size: int

    def prepare(self) -> _Stored:
        """All of it."""
        n_groups = self.shape[1] // self.group_size
        zeros = unpack(words_of(self.raw, f"{self.base}.qzeros"), _AWQ_BITS, n_groups)
        scales = floats(self.raw, f"{self.base}.scales")[:, :n_groups]
        return _Stored(words_of(self.raw, f"{self.base}.qweight"), zeros, scales, self.group_size)

    def rows(self, prepared: _Stored, start: int, stop: int) -> np.ndarray:
        """See PackedMatrix."""
        mine = slice(start, stop)
        numbers = unpack(prepared.words[mine], _AWQ_BITS, self.shape[1])
        return scale_groups(numbers, prepared.groups, prepared.zeros[mine], prepared.scales[mine])


def find_gptq(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    """The matrices of GPTQ in a checkpoint whose quantization_config is `config`.

    Version 1 of the format, which its `checkpoint_format` calls "gptq", stores zero points less one.
    """
    kind = config.find("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise QuantkitError(f"{config.path}: GPTQ's format {str(kind)[:80]!r} is not supported, only gptq and gptq_v2")
    told = config.integer("bits")
    for name, base, words, scales in _modules(raw):
        index = f"{base}.g_idx" if f"{base}.g_idx" in raw.tensors else None
        # Where modules differ the shapes tell the bits.
        n_inputs = raw.tensors[index].shape[0] if index and raw.tensors[index].shape else 0
        bits = words[0] * WORD // n_inputs if n_inputs else told
        if bits not in BITS:
            raise misshapen(raw, name, f"numbers of {', '.join(map(str, BITS))} bits")
        n_inputs = n_inputs or words[0] * WORD // bits
        if n_inputs * bits != words[0] * WORD or scales[1] != words[1]:
            raise misshapen(raw, name, f"a matrix with scales of shape {list(scales)}")
        zeros = require(raw, f"{base}.qzeros", name)
        if raw.tensors[zeros].shape != (scales[0], -(-words[1] * bits // WORD)):
            raise misshapen(raw, zeros, f"the zero points of {scales[0]} groups of {words[1]} columns")
        size = _group_size(raw, config, f"{base}.scales", n_inputs, scales[0], exact=index is None)
        parts = (name, zeros, f"{base}.scales", *([index] if index else []))
        yield GPTQMatrix(
            raw, f"{base}.weight", (words[1], n_inputs), parts, f"GPTQ, INT{bits} in groups of {size}",
            base, bits, size, index, int(kind == "gptq"),
        )  # fmt: skip


def find_awq(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    """The matrices of AWQ, as AutoAWQ's versions "gemm" and "gemv" lay them out."""
    version = str(config.find("version") or "gemm").lower()
    bits = config.integer("bits", "w_bit")
    if version not in ("gemm", "gemv") or bits not in (None, _AWQ_BITS):
        raise QuantkitError(
            f"{config.path}: AWQ of version {version[:80]!r} with {bits} bits is not supported, "
            "only gemm and gemv, with 4"
        )
    if version == "gemv":
        yield from _find_awq_rows(raw, config)
        return
    for name, base, words, scales in _modules(raw):
        n_inputs, n_outputs = words[0], words[1] * 8
        zeros = require(raw, f"{base}.qzeros", name)
        if scales[1] != n_outputs or raw.tensors[zeros].shape != (scales[0], words[1]):
            raise misshapen(raw, name, f"a matrix with scales of shape {list(scales)}")
        size = _group_size(raw, config, f"{base}.scales", n_inputs, scales[0], exact=True)
        yield AWQMatrix(
            raw, f"{base}.weight", (n_outputs, n_inputs), (name, zeros, f"{base}.scales"),
            f"AWQ, INT4 in groups of {size}", base, _AWQ_BITS, size, None,
        )  # fmt: skip


def _find_awq_rows(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    """The matrices of AWQ's version "gemv"."""
    for name, base, words, scales in _modules(raw):
        n_inputs = words[1] * 8
        zeros = require(raw, f"{base}.qzeros", name)
        told = config.find("group_size", "q_group_size")
        size = told if type(told) is int and 0 < told < n_inputs else n_inputs
        fits = scales[0] == words[0] and n_inputs % size == 0 and scales[1] >= n_inputs // size
        if not fits or raw.tensors[zeros].shape != (words[0], scales[1] // 8) or scales[1] % 8:
            raise misshapen(
                raw, f"{base}.scales", f"the scales of {n_inputs} columns in groups of {size}, and zero points"
            )
        yield AWQRows(
            raw, f"{base}.weight", (words[0], n_inputs), (name, zeros, f"{base}.scales"),
            f"AWQ, INT4 in groups of {size}", base, size,
        )  # fmt: skip


def _modules(raw: SafetensorsCheckpoint) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """The name of each tensor of words, its module's, its shape and its scales' shape."""
    for name, tensor in raw.tensors.items():
        if name.endswith(".qweight"):
            base = name.removesuffix(".qweight")
            scales = raw.tensors[require(raw, f"{base}.scales", name)].shape
            if tensor.dtype != "I32" or len(tensor.shape) != 2 or 0 in tensor.shape:
                raise misshapen(raw, name, "I32 with two axes")
            if len(scales) != 2 or 0 in scales:
                raise misshapen(raw, f"{base}.scales", "the scales of groups")
            yield name, base, tensor.shape, scales


def _group_size(
    raw: SafetensorsCheckpoint, config: Config, scales: str, n_inputs: int, n_groups: int, exact: bool
) -> int:
    """How many inputs a group has; `exact` where no tensor lists the groups."""
    told = config.find("group_size", "q_group_size")
    size = told if type(told) is int and 0 < told < n_inputs else n_inputs
    if exact and -(-n_inputs // size) != n_groups:
        raise misshapen(raw, scales, f"the scales of {n_inputs} columns in groups of {size}")
    return size
