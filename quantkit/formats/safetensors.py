"""Safetensors checkpoints: the tensors of a directory, one file or many shards.

Files are untrusted. The safetensors library opens each one and checks its header: types, shapes, and offsets that
fill the file without a gap. The shards are checked here against the index that lists them. What the library does not
give to numpy is read here, at the places that it has checked: bfloat16 and 8-bit floats, which numpy does not have, and
parts of tensors without a copy, by position, so that a file that shrinks meanwhile is an error and no SIGBUS.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from quantkit.errors import QuantkitError
from quantkit.formats.reading import InputFile

# How old checkpoints become ones in safetensors: transformers reads only the numbers of pickles.
_CONVERT = (
    'Convert pytorch_model.bin: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{0}', dtype='auto').save_pretrained('{0}-safetensors')\""
)
INDEX = "model.safetensors.index.json"
MAX_JSON = 100 * 1024 * 1024  # the format's own bound on a header
MAX_NAME = 1024  # far longer than any, and short enough for numbers in it to be read as such

# Bits of an element of each type that the format knows.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# numpy has no bfloat16: its bits travel as uint16, those of 8-bit floats as uint8.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BIT_TYPES = NUMPY_TYPES | {
    name: np.dtype(f"<{'i' if name[0] == 'I' else 'u'}{bits // 8}")
    for name, bits in _BITS.items()
    if name[0] in "IU" or name.startswith("F8")
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `shape` is the checkpoint's: the length of a row comes last. `start` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int


def _listed(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _once(path: Path) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise QuantkitError(f"{path}: the name {twice!r} occurs twice in its header")
        return found

    return pairs


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in `path`. Raises QuantkitError when it cannot be read, is not one, or exceeds `limit` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise QuantkitError(f"{path}: larger than {limit} bytes, which no such file is")
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that `data`, found in `path`, holds. Raises QuantkitError when it is not one."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once(path))
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise QuantkitError(f"{path}: not a JSON object")
    return value


class Shards(Protocol):
    """Safetensors files that are elsewhere, and are read through files of the same size with the same header."""

    @property
    def names(self) -> Sequence[str]:
        """Their names."""
        ...

    def open(self, name: str) -> InputFile:
        """The file `name`."""
        ...


class _File:
    """One safetensors file, mapped. `file` reads it; `path` is what it is called."""

    def __init__(self, path: Path, file: InputFile) -> None:
        self.path, self.file = path, file
        size = self.file.nbytes
        if size < 10:
            raise QuantkitError(f"{path}: truncated: only {size} bytes; download it again")
        length = int.from_bytes(self.file.read(0, 8), "little")
        if length > MAX_JSON:
            raise QuantkitError(f"{path}: not a safetensors file: it announces a header of {length} bytes")
        if 8 + length > size:
            raise QuantkitError(f"{path}: truncated: its header ends at byte {8 + length} of {size}; download it again")
        self.tensors = {tensor.name: tensor for tensor in sorted(self._checked(8 + length), key=lambda t: t.name)}
        try:
            with open(file.path, "rb") as opened:
                self.map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise QuantkitError(f"{path}: cannot be mapped: {getattr(error, 'strerror', error)}") from None
        self.file.check()
        self.address = int(np.frombuffer(self.map, np.uint8).__array_interface__["data"][0])

    def _checked(self, start: int) -> Iterator[StoredTensor]:
        """The tensors, after the library has checked the header; `start` is where it ends."""
        try:
            with safe_open(self.file.path, framework="numpy") as file:
                # In the order of their places: the library has made sure that each begins where the last one ends.
                for name in file.offset_keys():
                    entry = file.get_slice(name)
                    dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                    if len(name) > MAX_NAME:
                        raise QuantkitError(
                            f"{self.path}: the tensor name {name[:40]!r}... of {len(name)} characters is longer than "
                            f"{MAX_NAME}"
                        )
                    if dtype not in _BITS:
                        raise QuantkitError(f"{self.path}: tensor {name!r} has the unknown type {dtype!r}")
                    if len(shape) > 16:
                        raise QuantkitError(f"{self.path}: tensor {name!r} has {len(shape)} axes, more than any tensor")
                    nbytes = math.prod(shape) * _BITS[dtype] // 8
                    yield StoredTensor(name, dtype, shape, self.path, start, nbytes)
                    start += nbytes
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
            if "ncomplete" in reason:
                reason = "its tensors do not end where it does; download it again"
            raise QuantkitError(f"{self.path}: not a whole safetensors file: {reason[:200]}") from None
        if start != self.file.nbytes:
            raise QuantkitError(
                f"{self.path}: its tensors end at byte {start} of {self.file.nbytes}; download it again"
            )


class SafetensorsCheckpoint:
    """The tensors of a checkpoint directory.

    `tensors` holds them by name: files in the order of their names, the tensors of a file in the order of theirs,
    which is the order that the reference converter follows. Raises QuantkitError, which names the file and the
    tensor, for anything missing or malformed.
    """

    def __init__(self, directory: Path, elsewhere: Shards | None = None, stem: str = "model") -> None:
        """Map every shard of `directory`, or `elsewhere`, and check it against its header and the index.

        The names of the files begin with `stem` where there is no index.
        """
        self.directory, self._stem = directory, stem
        index = directory / INDEX
        self._files: dict[Path, _File] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._lock = threading.Lock()
        self._whole: tuple[str, np.ndarray] | None = None
        weight_map = self._weight_map(index) if index.is_file() else None
        names = sorted(set(weight_map.values())) if weight_map is not None else self._unindexed(elsewhere)
        for name in names:
            path = directory / name
            if not path.is_file() if elsewhere is None else name not in elsewhere.names:
                raise QuantkitError(f"{index}: lists the shard {name!r}, which is not there; download it")
            opened = InputFile(path) if elsewhere is None else elsewhere.open(name)
            file = self._files[path] = _File(path, opened)
            if weight_map is not None:
                self._compare(file, {key for key, shard in weight_map.items() if shard == name})
            for key, tensor in file.tensors.items():
                if key in self.tensors:
                    raise QuantkitError(f"{path}: tensor {key!r} is also in {self.tensors[key].path.name}")
                self.tensors[key] = tensor
        if not self.tensors:
            raise QuantkitError(f"{directory}: its safetensors files hold no tensors")

    @staticmethod
    def _weight_map(index: Path) -> Mapping[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise QuantkitError(f"{index}: it has no weight_map")
        for key, name in weight_map.items():
            # A shard is a plain file name beside the index; anything else could lead out of the directory.
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
                raise QuantkitError(f"{index}: it puts tensor {key!r} into {str(name)[:120]!r}, which names no shard")
        return weight_map

    def _unindexed(self, elsewhere: Shards | None) -> list[str]:
        try:
            found = {path.name for path in self.directory.iterdir()}
            present = sorted(found.union(() if elsewhere is None else elsewhere.names))
        except OSError as error:
            raise QuantkitError(f"{self.directory}: {error.strerror or error}") from None
        names = [name for name in present if name.startswith(self._stem) and name.endswith(".safetensors")]
        if not names:
            others = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
            instead = f", only {_listed(others)}" if others else ""
            if any(name.endswith(".bin") for name in others) or self.directory.parent.name == "snapshots":
                instead += "; pickled weights are not read, as they can run code"
                instead += ". " + _CONVERT.format(self.directory) if self._stem == "model" else ""
            raise QuantkitError(f"{self.directory}: it holds no {self._stem}*.safetensors{instead}")
        for name in names:
            if (shard := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name)) is not None:
                whole = [f"{shard[1]}-{i + 1:05d}-of-{shard[2]}.safetensors" for i in range(int(shard[2]))]
                if missing := sorted(set(whole) - set(names)):
                    raise QuantkitError(f"{self.directory}: shards are missing: {_listed(missing)}; download them")
        return names

    def _compare(self, file: _File, listed: set[str]) -> None:
        if missing := sorted(listed - file.tensors.keys()):
            raise QuantkitError(f"{file.path}: lacks {_listed(missing)}, which {INDEX} puts there; download both again")
        if extra := sorted(file.tensors.keys() - listed):
            raise QuantkitError(f"{file.path}: {INDEX} does not put {_listed(extra)} there; download both again")

    @property
    def paths(self) -> set[Path]:
        """The files."""
        return set(self._files)

    def data(self, name: str) -> np.ndarray:
        """Tensor `name` in its shape: float32, float16, or uint16 that holds bfloat16's bits.

        Read-only and mapped, not copied: a view to rearrange, whose values `read` gets safely. Raises QuantkitError for
        any other type of element.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in NUMPY_TYPES:
            raise QuantkitError(
                f"{tensor.path}: tensor {name!r} is {tensor.dtype}; only F32, F16 and BF16 can be read: "
                "take the unquantized checkpoint"
            )
        return self.bits(name)

    def bits(self, name: str) -> np.ndarray:
        """Tensor `name` in its shape, of any type: whole numbers, floats, or unsigned ones that hold a float's bits.

        Otherwise as `data`. Raises QuantkitError for types of less than 8 bits, and the rarest ones.
        """
        tensor = self.tensors[name]
        dtype = _BIT_TYPES.get(tensor.dtype)
        if dtype is None:
            raise QuantkitError(f"{tensor.path}: tensor {name!r} is {tensor.dtype}, which cannot be read")
        source = self._files[tensor.path].map
        flat: np.ndarray = np.frombuffer(
            source, dtype=dtype, count=tensor.nbytes // dtype.itemsize, offset=tensor.start
        )
        return flat.reshape(tensor.shape)

    def whole(self, name: str) -> np.ndarray:
        """All of tensor `name` as `bits` has it, but in memory: a new array. Raises QuantkitError as `read`."""
        view = self.bits(name)
        return self.read(name, view.reshape(1, -1), 0, 1).reshape(view.shape) if view.size else view.copy()

    def read(self, name: str, view: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of `view`, counted through all axes but the last: contiguous, (rows, row length).

        `view` is `data(name)`, rearranged; it only says where the values are, and they are read by position, so that a
        file that has shrunk is an error and no SIGBUS. Where rows do not lie in one piece, as in a transposed matrix,
        the whole tensor is held until another is read so. Raises QuantkitError when the file has changed.
        """
        tensor = self.tensors[name]
        file, width = self._files[tensor.path], view.shape[-1] * view.itemsize
        first = int(view.__array_interface__["data"][0]) - file.address
        if not tensor.start <= first < tensor.start + tensor.nbytes:
            return take_rows(view, start, stop)  # a small tensor whose order was made when it was opened
        if view.shape[-1] > 1 and view.strides[-1] != view.itemsize:
            whole = self._whole_tensor(name, file)
            return take_rows(np.ndarray(view.shape, view.dtype, whole, first - tensor.start, view.strides), start, stop)
        rows = np.empty((stop - start, view.shape[-1]), view.dtype)
        if not rows.size:
            return rows
        places = np.unravel_index(np.arange(start, stop), view.shape[:-1])
        offsets = sum((place * step for place, step in zip(places, view.strides, strict=False)), np.int64(first))
        lowest, span = int(offsets.min()), int(offsets.max() - offsets.min()) + width
        steps = (offsets - lowest) // width
        if span <= 2 * rows.nbytes and np.array_equal(lowest + steps * width, offsets):
            # Close together, if in another order: one read, and a gathering in memory.
            near = rows if span == rows.nbytes else np.empty((span // width, view.shape[-1]), view.dtype)
            file.file.read_into(lowest, near)
            return near if len(steps) == len(near) and (np.diff(steps) == 1).all() else near[steps]
        at = 0
        for run in np.split(offsets, np.flatnonzero(np.diff(offsets) != width) + 1):
            file.file.read_into(int(run[0]), rows[at : at + len(run)])
            at += len(run)
        return rows

    def _whole_tensor(self, name: str, file: _File) -> np.ndarray:
        with self._lock:
            if self._whole is None or self._whole[0] != name:
                self._whole = None  # before there is another
                tensor = self.tensors[name]
                data = np.empty(tensor.nbytes, np.uint8)
                file.file.read_into(tensor.start, data)
                self._whole = name, data
            return self._whole[1]

    def release(self, name: str) -> None:
        """Give back what is held of tensor `name`; it can be read again. Raises QuantkitError if its file changed."""
        with self._lock:
            if self._whole is not None and self._whole[0] == name:
                self._whole = None
        self._files[self.tensors[name].path].file.check()


def take_rows(view: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of `view`, counted through all axes but the last, contiguous."""
    if view.ndim == 2:
        return np.ascontiguousarray(view[start:stop])
    rows: np.ndarray = view[np.unravel_index(np.arange(start, stop), view.shape[:-1])]
    return rows
