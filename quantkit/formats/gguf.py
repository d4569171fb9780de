"""GGUF files: reading them, and writing their headers.

Source of the layout: the GGUF specification (`ggml/docs/gguf.md`), versions 2 and 3, little-endian.

Metadata values stay the bytes that they are in the file until somebody asks for them, so a header with a
vocabulary of 250,000 tokens opens at once and is copied to another file without being rebuilt. Files are untrusted:
every count, length and offset is checked against the size of the file before it is used.
"""

from __future__ import annotations

import math
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
from quantkit.formats.reading import InputFile

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME = 64  # GGML_MAX_NAME counts the terminating zero
# Far beyond real files, and few enough that what each costs in memory stays small.
MAX_ALIGNMENT = 1 << 16
MAX_TENSORS = 1 << 17
MAX_VALUES = 1 << 16
MAX_KEY = 1 << 16  # bytes; the specification's
MAX_ELEMENTS = (1 << 63) - 1  # GGML counts in int64
# Bytes of a header that are read at first.
FIRST_READ = 1 << 20

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
INTEGERS = tuple(kind for kind, code in _FORMATS.items() if code in "BbHhIiQq")
FLOATS = (ValueType.FLOAT32, ValueType.FLOAT64)
MAX_FLOAT32 = 3.4028234663852886e38
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
        """Encode `data`: a number, a bool or a string; for `ValueType.ARRAY` a sequence of `item` values.

        Raises QuantkitError for a number that the type cannot hold.
        """
        if (item is None and kind == ValueType.ARRAY) or item == ValueType.ARRAY:
            raise ValueError("an array needs the type of its items, and arrays of arrays are not written")
        try:
            if kind == ValueType.STRING:
                return cls(kind, _encode_string(data))
            if item is None:
                return cls(kind, struct.pack("<" + _FORMATS[kind], data))
            head = struct.pack("<IQ", item, len(data))
            if item == ValueType.STRING:
                return cls(kind, head + b"".join(map(_encode_string, data)))
            return cls(kind, head + struct.pack(f"<{len(data)}{_FORMATS[item]}", *data))
        except (struct.error, OverflowError):
            stored = kind if item is None else item
            raise QuantkitError(f"{str(data)[:80]} cannot be stored as {stored.name}") from None
        except UnicodeEncodeError:
            raise QuantkitError(f"{str(data)[:80]!r} holds half of a surrogate pair: it is not UTF-8") from None

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
    """A GGUF file's key/value pairs, in file order.

    `label` is the file or directory that they come from, for messages. Read values through the checked accessors:
    files are untrusted, so any key can have any type and value.
    """

    def __init__(
        self, values: Mapping[str, Value] | Iterable[tuple[str, Value]] = (), label: str | None = None
    ) -> None:
        super().__init__(values)
        self.label = getattr(values, "label", "") if label is None else label

    def wrong(self, key: str, wanted: str) -> QuantkitError:
        """The error that says that the value of `key` is not `wanted`."""
        where, value = f"{self.label}: " if self.label else "", self[key]
        if value.type == ValueType.ARRAY:
            shown = f"an array of {len(value)} {value.item.name}"
        elif value.type == ValueType.STRING:
            shown = repr(value.value[:60])
        else:
            shown = str(value.value)
        return QuantkitError(f"{where}the metadata's {key} is {shown}, not {wanted}")

    def lacking(self, key: str) -> QuantkitError:
        """The error that says that there is no `key`."""
        return QuantkitError(f"{self.label}: the metadata lacks {key}" if self.label else f"the metadata lacks {key}")

    def _found(self, key: str, default: object) -> Value | None:
        if key not in self and default is None:
            raise self.lacking(key)
        return self.get(key)

    def integer(self, key: str, low: int = 0, high: int = 0xFFFFFFFF, default: int | None = None) -> int:
        """The whole number `key`, of any integer type; `default` where there is none, required without a default.

        Raises QuantkitError for a value of another type, or outside `low` to `high`. So do the others, of theirs.
        """
        value = self._found(key, default)
        if value is None:
            return int(default)  # type: ignore[arg-type]
        if value.type not in INTEGERS or not low <= value.value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return int(value.value)

    def number(
        self, key: str, low: float = -MAX_FLOAT32, high: float = MAX_FLOAT32, default: float | None = None
    ) -> float:
        """The finite number `key`, of any numeric type."""
        value = self._found(key, default)
        if value is None:
            return float(default)  # type: ignore[arg-type]
        if value.type not in (*INTEGERS, *FLOATS) or not low <= value.value <= high:
            bounds = "" if (low, high) == (-MAX_FLOAT32, MAX_FLOAT32) else f" from {low:g} to {high:g}"
            raise self.wrong(key, f"a finite number{bounds}")
        return float(value.value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """The truth value `key`."""
        value = self._found(key, default)
        if value is not None and value.type != ValueType.BOOL:
            raise self.wrong(key, "true or false")
        return bool(default if value is None else value.value)

    def string(self, key: str, default: str | None = None) -> str:
        """The text `key`."""
        value = self._found(key, default)
        if value is not None and value.type != ValueType.STRING:
            raise self.wrong(key, "text")
        return str(default if value is None else value.value)

    def strings(self, key: str, default: Sequence[str] | None = None) -> list[str]:
        """The texts in the array `key`."""
        value = self._found(key, default)
        if value is None:
            return list(default or ())
        if value.type != ValueType.ARRAY or value.item != ValueType.STRING:
            raise self.wrong(key, "an array of texts")
        return list(value.strings())

    def array(self, key: str, items: Sequence[ValueType]) -> np.ndarray:
        """The numbers in the array `key`, whose items have one of the types `items`: read-only, of shape (n,)."""
        value = self._found(key, None)
        assert value is not None
        if value.type != ValueType.ARRAY or value.item not in items or value.item not in _SIZES:
            raise self.wrong(key, f"an array of {' or '.join(item.name for item in items)}")
        numbers: np.ndarray = value.value
        return numbers

    def integers(self, key: str, count: int, low: int = 0, high: int = 0xFFFFFFFF) -> list[int]:
        """The `count` whole numbers in the array `key`."""
        value = self._found(key, None)
        assert value is not None
        wanted = f"{count} whole numbers from {low} to {high}"
        if value.type != ValueType.ARRAY or value.item not in INTEGERS or len(value) != count:
            raise self.wrong(key, wanted)
        numbers = [int(n) for n in value.value]
        if any(not low <= n <= high for n in numbers):
            raise self.wrong(key, wanted)
        return numbers

    def numbers(self, key: str, count: int) -> list[float]:
        """The `count` finite numbers in the array `key`."""
        value = self._found(key, None)
        assert value is not None
        kinds = (*INTEGERS, ValueType.FLOAT32, ValueType.FLOAT64)
        if value.type != ValueType.ARRAY or value.item not in kinds or len(value) != count:
            raise self.wrong(key, f"{count} numbers")
        numbers = [float(n) for n in value.value]
        if not all(map(math.isfinite, numbers)):
            raise self.wrong(key, f"{count} numbers")
        return numbers

    def scalar(self, key: str) -> int | float | str | None:
        """The number, truth value or text `key`, whatever its type; None where there is none, or an array."""
        value = self.get(key)
        if value is None or value.type == ValueType.ARRAY:
            return None
        found: int | float | str = value.value
        return found

    def is_array(self, key: str) -> bool:
        """Whether there is a `key`, and it holds an array."""
        return key in self and self[key].type == ValueType.ARRAY

    def set(self, key: str, kind: ValueType, data: Any, item: ValueType | None = None) -> None:
        """Add `key`, moving it to the end if it is there, as the reference's gguf_set_* functions do."""
        value = Value.of(kind, data, item)
        self.pop(key, None)
        self[key] = value

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the model's own keys. Raises QuantkitError without it."""
        return self.string("general.architecture")

    @property
    def alignment(self) -> int:
        """The alignment of tensor data in bytes. Raises QuantkitError when it is none."""
        key = "general.alignment"
        alignment = self.integer(key, 0, default=DEFAULT_ALIGNMENT)
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(key, f"a power of two from 8 to {MAX_ALIGNMENT}")
        return alignment


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
    """A position in a header, which is read as far as it is needed and never beyond the file's end."""

    def __init__(self, file: InputFile) -> None:
        self.path, self.size, self.at = file.path, file.nbytes, 0
        self._file = file
        self.view = memoryview(b"")

    def fail(self, problem: str) -> QuantkitError:
        return QuantkitError(f"{self.path}: {problem}")

    def truncated(self) -> QuantkitError:
        return self.fail(f"truncated: the header does not end within the file's {self.size} bytes; download it again")

    def reach(self, end: int) -> None:
        """Have the header's first `end` bytes in `view`. Raises QuantkitError when the file has fewer."""
        if end > self.size:
            raise self.truncated()
        if end > len(self.view):
            self.view = memoryview(self._file.read(0, min(self.size, max(end, 8 * len(self.view), FIRST_READ))))

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.reach(self.at + size)
        (value,) = struct.unpack_from("<" + code, self.view, self.at)
        self.at += size
        return value

    def take(self, length: int) -> memoryview:
        self.reach(self.at + length)
        self.at += length
        return self.view[self.at - length : self.at]

    def string(self, what: str, most: int) -> str:
        length = self.number("Q")
        if length > most:
            raise self.fail(f"a {what} of {length} bytes at byte {self.at - 8}, and {most} are the most")
        return bytes(self.take(length)).decode("utf-8", "surrogateescape")

    def value(self) -> Value:
        kind = self.kind()
        start = self.at
        self.skip(kind)
        return Value(kind, self.view[start : self.at])

    def kind(self) -> ValueType:
        number = self.number("I")
        try:
            return ValueType(number)
        except ValueError:
            raise self.fail(f"unknown metadata value type {number} at byte {self.at - 4}") from None

    def skip(self, kind: ValueType) -> None:
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
        at, unpack = self.at, struct.Struct("<Q").unpack_from
        if at + count * 8 > self.size:
            raise self.truncated()
        for _ in range(count):
            if at + 8 > len(self.view):
                self.reach(at + 8)
            at += 8 + unpack(self.view, at)[0]
        self.take(at - self.at)


class GGUFFile:
    """One GGUF file.

    `metadata` and `tensors` (by name, in file order) come from the header; `read` gets a tensor's bytes.
    Raises QuantkitError, which names the file and what is wrong with it, for anything malformed, and when the file
    changes while it is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = InputFile(self.path)
        self.nbytes = self._file.nbytes
        if self.nbytes < 24:
            start = self._file.read(0, min(4, self.nbytes))
            raise QuantkitError(
                f"{self.path}: {'not a GGUF file' if start != MAGIC else f'truncated: only {self.nbytes} bytes'}"
            )
        cursor = _Cursor(self._file)
        n_tensors, n_values = self._read_start(cursor)
        self.metadata = self._read_metadata(cursor, n_values)
        self.tensors, self._offsets = self._read_tensors(cursor, n_tensors)
        self._place(cursor)

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
        if n_tensors > MAX_TENSORS or n_values > MAX_VALUES:
            raise cursor.fail(
                f"{n_tensors} tensors and {n_values} metadata values; {MAX_TENSORS} and {MAX_VALUES} are the most"
            )
        return n_tensors, n_values

    def _read_metadata(self, cursor: _Cursor, count: int) -> Metadata:
        metadata = Metadata(label=str(self.path))
        for _ in range(count):
            key = cursor.string("metadata key", MAX_KEY)
            if key in metadata:
                raise cursor.fail(f"the metadata key {key[:80]!r} occurs twice")
            metadata[key] = cursor.value()
        value = metadata.get("general.alignment")
        if value is not None and value.type != ValueType.UINT32:
            raise metadata.wrong("general.alignment", "a 32-bit unsigned integer")
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        tensors: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = cursor.string("tensor name", MAX_NAME - 1)
            if name in tensors:
                raise cursor.fail(f"the tensor {name!r} occurs twice")
            n_dims = cursor.number("I")
            if n_dims > MAX_DIMENSIONS:
                raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions, more than {MAX_DIMENSIONS}")
            shape = tuple(cursor.number("Q") for _ in range(n_dims))
            if not 0 < math.prod(shape) <= MAX_ELEMENTS:
                raise cursor.fail(f"tensor {name!r} has the impossible shape {' x '.join(map(str, shape))}")
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
        return tensors, offsets

    def _place(self, cursor: _Cursor) -> None:
        """Make the tensors' offsets relative to the start of the file, and refuse invalid ones."""
        alignment = self.metadata.alignment
        start = end = padded(cursor.at, alignment)
        last = ""
        for name, offset in sorted(self._offsets.items(), key=lambda item: item[1]):
            at, nbytes = start + offset, self.tensors[name].nbytes
            if offset % alignment:
                raise cursor.fail(f"tensor {name!r} is not aligned to {alignment} bytes")
            if at + nbytes > self.nbytes:
                raise cursor.fail(
                    f"truncated: tensor {name!r} ends at byte {at + nbytes}, beyond the file's {self.nbytes}; "
                    "download it again"
                )
            if at < end:
                raise cursor.fail(f"the tensors {last!r} and {name!r} overlap")
            self._offsets[name], end, last = at, at + nbytes, name

    def offset(self, name: str) -> int:
        """Where the data of tensor `name` begins, in bytes from the start of the file."""
        return self._offsets[name]

    def read(self, name: str, start: int = 0, stop: int | None = None, buffer: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of tensor `name`: uint8 of shape (rows, bytes of a row). Safe from several threads.

        They are read into the beginning of `buffer`, flat uint8, if it is large enough, else into new memory.
        Raises QuantkitError when the file has become shorter.
        """
        import numpy as np

        info = self.tensors[name]
        start, stop, _ = slice(start, stop).indices(info.n_rows)
        width = info.type.row_nbytes(info.n_per_row)
        shape = max(0, stop - start), width
        if buffer is not None and shape[0] * width <= buffer.size:
            rows = buffer[: shape[0] * width].reshape(shape)
        else:
            rows = np.empty(shape, np.uint8)
        self._file.read_into(self._offsets[name] + start * width, rows)
        return rows

    def check(self) -> None:
        """Raise QuantkitError when the file has changed since it was opened."""
        self._file.check()


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
        if len(_encode_string(info.name)) - 8 >= MAX_NAME:
            raise QuantkitError(f"the tensor name {info.name!r} is longer than {MAX_NAME - 1} bytes, GGUF's limit")
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
        parts += (_encode_string(info.name), dims, struct.pack("<IQ", info.type, offset))
        offset += padded(info.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header))
