"""GGUF files: what they hold, read through a memory map, and their headers, written.

Source of the layout: the GGUF specification (`ggml/docs/gguf.md`), versions 2 and 3, little-endian.

Metadata values stay the bytes that they are in the file until somebody asks for them, so a header with a
vocabulary of 250,000 tokens opens in a blink and copies to another file without being rebuilt. Files come from
strangers: every count, length and offset is held against the size of the file before it is used.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME = 64  # GGML_MAX_NAME counts the terminating zero

Buffer = Union[bytes, memoryview]  # noqa: UP007  (evaluated at run time, also by Python 3.10)


class ValueType(IntEnum):
    """The type of a metadata value. The value is its number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_TYPES = {int(kind): kind for kind in GGMLType}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _FORMATS.items()}


def _encode_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True, eq=False)
class Value:
    """One metadata value: its type, and its bytes as they stand in a file.

    Equal values have equal types and equal bytes.
    """

    type: ValueType
    raw: Buffer

    @classmethod
    def of(cls, kind: ValueType, data: Any, item: ValueType | None = None) -> Value:
        """Encode `data`: a number, a bool or a string; for `ValueType.ARRAY` a sequence of `item` values."""
        if kind == ValueType.STRING:
            return cls(kind, _encode_string(data))
        if kind != ValueType.ARRAY:
            return cls(kind, struct.pack("<" + _FORMATS[kind], data))
        if item is None or item == ValueType.ARRAY:
            raise ValueError("an array needs the type of its items, and arrays of arrays are not written")
        head = struct.pack("<IQ", item, len(data))
        if item == ValueType.STRING:
            return cls(kind, head + b"".join(map(_encode_string, data)))
        return cls(kind, head + struct.pack(f"<{len(data)}{_FORMATS[item]}", *data))

    @property
    def item(self) -> ValueType:
        """The type of an array's items."""
        return ValueType(struct.unpack_from("<I", self.raw)[0])

    def __len__(self) -> int:
        """The number of an array's items."""
        return int(struct.unpack_from("<Q", self.raw, 4)[0])

    @cached_property
    def value(self) -> Any:
        """The decoded value: int, float, bool or str; for arrays a list of str, or a numpy array of numbers.

        Bytes that are not UTF-8 come back as surrogate escapes, and encode to themselves again.
        """
        raw = self.raw
        if self.type == ValueType.STRING:
            return bytes(raw[8:]).decode("utf-8", "surrogateescape")
        if self.type != ValueType.ARRAY:
            return struct.unpack_from("<" + _FORMATS[self.type], raw)[0]
        item = self.item
        if item == ValueType.STRING:
            return list(self.strings())
        if item == ValueType.ARRAY:
            raise QuantkitError("arrays of arrays in metadata are not supported")
        import numpy as np

        return np.frombuffer(raw, dtype=np.dtype(_FORMATS[item]).newbyteorder("<"), offset=12)

    def strings(self) -> Iterator[str]:
        """The items of an array of strings, one by one."""
        raw, at = bytes(self.raw), 12
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(len(self)):
            (length,) = unpack(raw, at)
            at += 8 + length
            yield raw[at - length : at].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.type == other.type and self.raw == other.raw

    def __hash__(self) -> int:
        return hash((self.type, bytes(self.raw)))

    def __repr__(self) -> str:
        if self.type == ValueType.ARRAY:
            return f"Value({self.item.name}[{len(self)}])"
        return f"Value({self.type.name}, {self.value!r})"


class Metadata(dict[str, Value]):
    """A GGUF file's key/value pairs, in file order."""

    def lookup(self, key: str, default: Any = None) -> Any:
        """The decoded value of `key`, or `default` when there is none."""
        value = self.get(key)
        return default if value is None else value.value

    def require(self, key: str) -> Any:
        """The decoded value of `key`. Raises QuantkitError when there is none."""
        if key not in self:
            raise QuantkitError(f"the metadata lacks {key}")
        return self[key].value

    def set(self, key: str, kind: ValueType, data: Any, item: ValueType | None = None) -> None:
        """Add `key`, moving it to the end if it is there, as the reference's gguf_set_* functions do."""
        self.pop(key, None)
        self[key] = Value.of(kind, data, item)

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the model's own keys. Raises QuantkitError without it."""
        return str(self.require("general.architecture"))

    @property
    def alignment(self) -> int:
        """The alignment of tensor data in bytes."""
        return int(self.lookup("general.alignment", DEFAULT_ALIGNMENT))


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor. `shape` is in GGUF order: the length of a row comes first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def n_per_row(self) -> int:
        """Weights in a row."""
        return self.shape[0] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows, those of all matrices of a 3-D tensor together."""
        rows = 1
        for n in self.shape[1:]:
            rows *= n
        return rows

    @property
    def n_elements(self) -> int:
        """Weights in the tensor."""
        return self.n_rows * self.n_per_row

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, without padding."""
        return self.type.nbytes(self.shape)


class _Cursor:
    """A position in a header that never leaves it."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self.view, self.at = path, view, 0

    def fail(self, problem: str) -> QuantkitError:
        return QuantkitError(f"{self.path}: {problem}")

    def truncated(self) -> QuantkitError:
        return self.fail(f"truncated: the header goes on beyond the file's {len(self.view)} bytes; download it again")

    def number(self, code: str) -> Any:
        try:
            (value,) = struct.unpack_from("<" + code, self.view, self.at)
        except struct.error:
            raise self.truncated() from None
        self.at += struct.calcsize("<" + code)
        return value

    def take(self, length: int) -> memoryview:
        if length > len(self.view) - self.at:
            raise self.truncated()
        self.at += length
        return self.view[self.at - length : self.at]

    def string(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", "surrogateescape")

    def value(self) -> Value:
        kind = self.kind()
        start = self.at
        self.skip(kind, 0)
        return Value(kind, self.view[start : self.at])

    def kind(self) -> ValueType:
        number = self.number("I")
        try:
            return ValueType(number)
        except ValueError:
            raise self.fail(f"unknown metadata value type {number} at byte {self.at - 4}") from None

    def skip(self, kind: ValueType, depth: int) -> None:
        if kind == ValueType.STRING:
            self.take(self.number("Q"))
        elif kind == ValueType.ARRAY:
            item, count = self.kind(), self.number("Q")
            if item in _SIZES:
                self.take(count * _SIZES[item])
            elif item == ValueType.STRING:
                self.skip_strings(count)
            else:
                raise self.fail("arrays of arrays in metadata are not supported")
        else:
            self.take(_SIZES[kind])

    def skip_strings(self, count: int) -> None:
        if count * 8 > len(self.view) - self.at:
            raise self.truncated()
        at, view, unpack = self.at, self.view, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(view, at)[0]
        except struct.error:
            raise self.truncated() from None
        self.take(at - self.at)


class GGUFFile:
    """One GGUF file, read through a memory map.

    `metadata` and `tensors` (by name, in file order) come from the header; `data(name)` is a view of a tensor's
    bytes, no copy. Raises QuantkitError, which names the file and what is wrong with it, for anything malformed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    start = file.read(4)
                    problem = "not a GGUF file" if start != MAGIC else f"truncated: only {size} bytes"
                    raise QuantkitError(f"{self.path}: {problem}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise QuantkitError(f"{self.path}: {error.strerror or error}") from None
        self.nbytes = size
        self._view = memoryview(self._map)
        cursor = _Cursor(self.path, self._view)
        n_tensors, n_values = self._read_start(cursor)
        self.metadata = self._read_metadata(cursor, n_values)
        self.tensors, self._offsets = self._read_tensors(cursor, n_tensors)

    def _read_start(self, cursor: _Cursor) -> tuple[int, int]:
        magic = bytes(cursor.take(4))
        if magic != MAGIC:
            raise cursor.fail(f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        self.version = cursor.number("I")
        if self.version not in (2, 3):
            if self.version & 0xFFFF == 0:
                raise cursor.fail("a big-endian GGUF file; only little-endian ones are supported")
            raise cursor.fail(f"GGUF version {self.version} is not supported, only 2 and 3")
        n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
        # A tensor takes at least 24 bytes of header and a value 13: larger counts cannot be true.
        if n_tensors * 24 + n_values * 13 > self.nbytes:
            raise cursor.fail(f"truncated: {n_tensors} tensors and {n_values} values do not fit {self.nbytes} bytes")
        return n_tensors, n_values

    def _read_metadata(self, cursor: _Cursor, count: int) -> Metadata:
        metadata = Metadata()
        for _ in range(count):
            key = cursor.string()
            if key in metadata:
                raise cursor.fail(f"the metadata key {key!r} occurs twice")
            metadata[key] = cursor.value()
        value = metadata.get("general.alignment")
        if value is not None and value.type != ValueType.UINT32:
            raise cursor.fail("general.alignment is not a 32-bit unsigned integer")
        alignment = metadata.alignment
        if alignment <= 0 or alignment % 8 or alignment & (alignment - 1):
            raise cursor.fail(f"general.alignment is {alignment}, not a power of two from 8 on")
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = cursor.string()
            if name in tensors:
                raise cursor.fail(f"the tensor {name!r} occurs twice")
            n_dims = cursor.number("I")
            if n_dims > MAX_DIMENSIONS:
                raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions, more than {MAX_DIMENSIONS}")
            shape = tuple(cursor.number("Q") for _ in range(n_dims))
            number = cursor.number("I")
            kind = _TYPES.get(number)
            if kind is None:
                raise cursor.fail(f"tensor {name!r} has the unknown type {number}")
            if shape and shape[0] % kind.block_size:
                raise cursor.fail(
                    f"tensor {name!r} has rows of {shape[0]} weights, not a multiple of {kind.name}'s {kind.block_size}"
                )
            tensors[name] = TensorInfo(name, shape, kind)
            offsets[name] = cursor.number("Q")
        alignment = self.metadata.alignment
        start = -(-cursor.at // alignment) * alignment
        for name, offset in offsets.items():
            end = start + offset + tensors[name].nbytes
            if offset % alignment:
                raise cursor.fail(f"tensor {name!r} is not aligned to {alignment} bytes")
            if end > self.nbytes:
                raise cursor.fail(
                    f"truncated: tensor {name!r} ends at byte {end}, beyond the file's {self.nbytes}; download it again"
                )
            offsets[name] = start + offset
        return tensors, offsets

    def data(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`: a read-only uint8 array of shape (rows, bytes of a row), mapped, not copied."""
        import numpy as np

        info, start = self.tensors[name], self._offsets[name]
        flat = np.frombuffer(self._map, dtype=np.uint8, count=info.nbytes, offset=start)
        return flat.reshape(info.n_rows, -1) if info.nbytes else flat.reshape(0, 0)

    def release(self, name: str) -> None:
        """Give back the memory that reading tensor `name` has mapped; it can be read again."""
        page = mmap.ALLOCATIONGRANULARITY
        start = self._offsets[name] // page * page
        length = self._offsets[name] + self.tensors[name].nbytes - start
        if length and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


def padded(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def encode_header(metadata: Mapping[str, Value], tensors: Iterable[TensorInfo], alignment: int) -> bytes:
    """The bytes of a GGUF version 3 header, padded to where the tensor data starts.

    The tensors' data is expected to follow in the order given, each padded to `alignment`, as llama-quantize and
    gguf-py write it.
    """
    infos: Sequence[TensorInfo] = list(tensors)
    parts: list[Buffer] = [MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(metadata))]
    for key, value in metadata.items():
        parts += (_encode_string(key), struct.pack("<I", value.type), value.raw)
    offset = 0
    for info in infos:
        if len(info.name.encode()) >= MAX_NAME:
            raise QuantkitError(f"the tensor name {info.name!r} is longer than {MAX_NAME - 1} bytes, GGUF's limit")
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
        parts += (_encode_string(info.name), dims, struct.pack("<IQ", info.type, offset))
        offset += padded(info.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header))
