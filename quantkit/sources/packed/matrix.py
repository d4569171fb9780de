"""A matrix that a checkpoint keeps in fewer bits, and what the formats of such matrices share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import SafetensorsCheckpoint

WORD = 32  # bits


def _minifloats(exponent_bits: int, bias: int, special: str) -> np.ndarray:
    """The values of all 8-bit floats of a kind, float32 [256].

    `special` says which codes are no numbers: as IEEE 754 has it, "all ones", or "negative zero".
    """
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.where(codes >> 7, -1.0, 1.0) * np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    top = exponent == (1 << exponent_bits) - 1
    if special == "IEEE":
        values[top] = np.where(mantissa[top] > 0, np.nan, np.copysign(np.inf, values[top]))
    elif special == "all ones":
        values[(codes & 127) == 127] = np.nan
    else:
        values[128] = np.nan
    return np.asarray(values, np.float32)


# The values of the types of 8 bits that safetensors knows, by code: those of the OCP's specifications and of AMD.
FLOAT8 = {
    "F8_E4M3": _minifloats(4, 7, "all ones"),
    "F8_E5M2": _minifloats(5, 15, "IEEE"),
    "F8_E4M3FNUZ": _minifloats(4, 8, "negative zero"),
    "F8_E5M2FNUZ": _minifloats(5, 16, "negative zero"),
}
# Powers of two, which only scales are.
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
# The values of E2M1, the 4-bit float of NVFP4 and MXFP4, by code.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


@dataclass
class PackedMatrix(ABC):
    """Matrix `name` of `shape` (the length of a row comes last; experts in front), made of the tensors `parts`.

    `kind` tells users how it is stored. Rows are counted through all axes but the last. Everything raises QuantkitError
    where the file holds what the format does not allow.
    """

    raw: SafetensorsCheckpoint
    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    kind: str

    def prepare(self) -> Any:
        """What all of its rows need: never more than the stored tensors. It is held while the matrix is read."""
        return None

    @abstractmethod
    def rows(self, prepared: Any, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, float32 [rows, row length]: a new array. Safe from several threads."""


def floats(raw: SafetensorsCheckpoint, name: str, codes_are_powers: bool = False) -> np.ndarray:
    """All of tensor `name`, float32 in its shape. `codes_are_powers`: where it is U8, it is E8M0."""
    return as_floats(raw, name, raw.whole(name), codes_are_powers)


def as_floats(raw: SafetensorsCheckpoint, name: str, values: np.ndarray, codes_are_powers: bool = False) -> np.ndarray:
    """The numbers whose bits are `values`, of tensor `name`, as float32."""
    dtype = raw.tensors[name].dtype
    if dtype in FLOAT8:
        return np.take(FLOAT8[dtype], values)
    if dtype == "F8_E8M0" or (dtype == "U8" and codes_are_powers):
        return np.take(E8M0, values)
    if dtype == "BF16":
        shifted: np.ndarray = np.left_shift(values, 16, dtype=np.uint32)
        return shifted.view(np.float32)
    if dtype in ("F16", "F32"):
        return np.asarray(values, np.float32)
    raise wrong(raw, name, f"{dtype}, not of a type that scales have")


def wrong(raw: SafetensorsCheckpoint, name: str, problem: str) -> QuantkitError:
    """The error that says that tensor `name` is `problem`."""
    return QuantkitError(f"{raw.tensors[name].path}: tensor {name!r} is {problem}")


def misshapen(raw: SafetensorsCheckpoint, name: str, wanted: str) -> QuantkitError:
    """The error that says that tensor `name` has not the shape that is `wanted`."""
    tensor = raw.tensors[name]
    return wrong(raw, name, f"{tensor.dtype} of shape {list(tensor.shape)}, not {wanted}")


def require(raw: SafetensorsCheckpoint, name: str, beside: str) -> str:
    """`name`, if there is such a tensor. Raises QuantkitError: it belongs to `beside`."""
    if name not in raw.tensors:
        raise QuantkitError(f"{raw.tensors[beside].path}: tensor {beside!r} is there, and {name!r} is not")
    return name


def unpack(words: np.ndarray, bits: int, count: int, across: bool = True) -> np.ndarray:
    """The first `count` whole numbers of `bits` bits of each row, lowest bits first: uint8 [rows, count].

    `words` is uint32 [rows, words]. Numbers may lie `across` two words, or else the bits over at a word's end are
    unused. Raises ValueError where rows are too short.
    """
    if words.shape[1] < n_words(count, bits, across):
        raise ValueError(f"{words.shape[1]} words of {WORD} bits hold no {count} numbers of {bits} bits")
    if 8 % bits == 0:
        stored = np.ascontiguousarray(words, "<u4").view(np.uint8)
        if bits == 8:
            return stored[:, :count]
        numbers = np.empty((*stored.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.right_shift(stored, bits * i, out=numbers[:, :, i])
        numbers &= (1 << bits) - 1
        return numbers.reshape(len(words), -1)[:, :count]
    at = np.arange(count)
    per_word = WORD // bits
    word, offset = (at * bits // WORD, at * bits % WORD) if across else (at // per_word, at % per_word * bits)
    values = words[:, word] >> offset.astype(np.uint32)
    split = np.flatnonzero(offset + bits > WORD)
    if len(split):
        values[:, split] |= words[:, word[split] + 1] << (WORD - offset[split]).astype(np.uint32)
    return np.asarray(values & np.uint32((1 << bits) - 1), np.uint8)


def scale_groups(
    numbers: np.ndarray, groups: np.ndarray | int, zeros: np.ndarray | int, scales: np.ndarray
) -> np.ndarray:
    """`(numbers - zeros) * scales`, float32 [rows, columns], with a zero and a scale [rows, groups] for each group.

    `groups` is the group of each column, or how many neighbours a group has.
    """
    values: np.ndarray = numbers.astype(np.float32)
    if isinstance(groups, int):
        grid = values.reshape(len(values), -1, groups)
        grid -= zeros[:, :, None] if isinstance(zeros, np.ndarray) else np.float32(zeros)
        grid *= scales[:, :, None]
        return values
    values -= np.take(zeros, groups, axis=1) if isinstance(zeros, np.ndarray) else np.float32(zeros)
    values *= np.take(scales, groups, axis=1)
    return values


def n_words(count: int, bits: int, across: bool = True) -> int:
    """How many words of 32 bits `count` numbers of `bits` bits take."""
    return -(-count * bits // WORD) if across else -(-count // (WORD // bits))


def words_of(raw: SafetensorsCheckpoint, name: str) -> np.ndarray:
    """All of tensor `name`, which must be I32 with two axes, as uint32."""
    tensor = raw.tensors[name]
    if tensor.dtype != "I32" or len(tensor.shape) != 2:
        raise misshapen(raw, name, "I32 with two axes")
    return raw.whole(name).view(np.uint32)


def groups_of_columns(
    raw: SafetensorsCheckpoint, index: str | None, n_columns: int, n_groups: int, size: int
) -> np.ndarray | int:
    """The group of each of the columns, int64 [n_columns], as tensor `index` tells; the size of whole groups without.

    Raises QuantkitError where a group is not below `n_groups`.
    """
    if index is None:
        return size if n_columns == n_groups * size else np.minimum(np.arange(n_columns) // size, n_groups - 1)
    tensor = raw.tensors[index]
    if tensor.dtype not in ("I32", "I64") or tensor.shape != (n_columns,):
        raise misshapen(raw, index, f"the groups of {n_columns} columns")
    groups = raw.whole(index).astype(np.int64)
    if n_columns and not 0 <= int(groups.min()) <= int(groups.max()) < n_groups:
        raise wrong(raw, index, f"with groups from {groups.min()} to {groups.max()}, and there are {n_groups}")
    if n_columns == n_groups * size and np.array_equal(groups, np.arange(n_columns) // size):
        return size
    return groups
