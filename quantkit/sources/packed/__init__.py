"""Checkpoints whose weights are quantized already, seen as if they were not: rows are dequantized while they are read.

One module for each way of storing them: what `find_*` yields are the matrices of a checkpoint, each a `PackedMatrix`.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.architectures.config import Config
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import SafetensorsCheckpoint, StoredTensor, read_json
from quantkit.sources.packed.bitsandbytes import find_bitsandbytes
from quantkit.sources.packed.compressed import block_size, find_compressed
from quantkit.sources.packed.fp4 import find_modelopt
from quantkit.sources.packed.gptq import find_awq, find_gptq
from quantkit.sources.packed.hqq import find_hqq
from quantkit.sources.packed.matrix import PackedMatrix
from quantkit.sources.packed.quanto import find_quanto
from quantkit.sources.packed.scaled import find_scaled
from quantkit.sources.packed.torchao import find_torchao


def _find_fp8(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    yield from find_scaled(raw, block_size(config, "weight_block_size"))


def _find_modelopt(raw: SafetensorsCheckpoint, config: Config) -> Iterator[PackedMatrix]:
    yield from find_modelopt(raw)
    yield from find_scaled(raw, None)


# By the `quant_method` of quantization_config.
METHODS: Mapping[str, Callable[[SafetensorsCheckpoint, Config], Iterator[PackedMatrix]]] = {
    "fp8": _find_fp8,
    "fbgemm_fp8": _find_fp8,
    "compressed-tensors": find_compressed,
    "modelopt": _find_modelopt,
    "gptq": find_gptq,
    "awq": find_awq,
    "bitsandbytes": lambda raw, _: find_bitsandbytes(raw),
    "torchao": lambda raw, _: find_torchao(raw),
    "hqq": lambda raw, _: find_hqq(raw),
    "quanto": lambda raw, _: find_quanto(raw),
}
# Files that say what quantization_config does, as other tools write them.
OTHER_FILES = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}  # fmt: skip
# What quantized checkpoints hold for activations and caches: the weights do not need it.
_SPARE = (
    "activation_scale", ".input_scale", ".input_scale_ub", ".input_global_scale", ".input_zero_point", ".output_scale",
    ".output_zero_point", ".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".k_zero_point", ".v_zero_point",
    "._weight_act_quant_scale",
)  # fmt: skip
_HELD = 2  # matrices: one that is being read, and one that begins to be


def quantization_of(directory: Path, config: Config) -> Config | None:
    """What the checkpoint says of its quantization, with the method; None where the weights are plain."""
    found = config.find("quantization_config", "compression_config")
    if isinstance(found, dict) and found:
        method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
        return Config({**found, "quant_method": method}, config.path)
    if found:
        raise config.wrong(("quantization_config",), found, "an object")
    for name, method in OTHER_FILES.items():
        if (directory / name).is_file():
            values = read_json(directory / name, 1 << 22)
            values = values["quantization"] if isinstance(values.get("quantization"), dict) else values
            return Config({**values, "quant_method": method}, directory / name)
    return None


class UnpackedCheckpoint:
    """A checkpoint of which some matrices are quantized, with all tensors plain: as SafetensorsCheckpoint.

    What was quantized is F32 here, dequantized row by row while it is read. A view of such a tensor only says which
    numbers are wanted: it must not be looked into.
    """

    def __init__(self, raw: SafetensorsCheckpoint, matrices: Mapping[str, PackedMatrix]) -> None:
        """Take `matrices` in the place of the tensors that they are made of."""
        self.raw, self._matrices = raw, matrices
        parts = {part for matrix in matrices.values() for part in matrix.parts}
        self.tensors: dict[str, StoredTensor] = {}
        for name, tensor in raw.tensors.items():
            if name in matrices:
                self.tensors[name] = self._plain(matrices[name])
            elif name not in parts and not name.endswith(_SPARE):
                self.tensors[name] = tensor
        for name, matrix in matrices.items():
            self.tensors.setdefault(name, self._plain(matrix))
        # Views count positions in memory that is reserved and never touched, the same for all matrices.
        self._space = _reserve(max((self.tensors[name].nbytes for name in matrices), default=0))
        self._start = int(np.frombuffer(self._space, np.uint8).__array_interface__["data"][0])
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _plain(self, matrix: PackedMatrix) -> StoredTensor:
        nbytes = 4 * int(np.prod(matrix.shape, dtype=object))
        return StoredTensor(matrix.name, "F32", matrix.shape, self.raw.tensors[matrix.parts[0]].path, 0, nbytes)

    @property
    def paths(self) -> set[Path]:
        """The files."""
        return self.raw.paths

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many matrices are stored how."""
        return Counter(matrix.kind for matrix in self._matrices.values())

    def kind_of(self, name: str) -> str:
        """How tensor `name` is stored where it is quantized, in words; empty for others."""
        return self._matrices[name].kind if name in self._matrices else ""

    def data(self, name: str) -> np.ndarray:
        """See SafetensorsCheckpoint."""
        if name not in self._matrices:
            return self.raw.data(name)
        shape = self._matrices[name].shape
        return np.frombuffer(self._space, np.float32, count=self.tensors[name].nbytes // 4).reshape(shape)

    def bits(self, name: str) -> np.ndarray:
        """See SafetensorsCheckpoint."""
        return self.raw.bits(name)

    def read(self, name: str, view: np.ndarray, start: int, stop: int) -> np.ndarray:
        """See SafetensorsCheckpoint."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self.raw.read(name, view, start, stop)
        width, n_columns = view.shape[-1], matrix.shape[-1]
        if start >= stop:
            return np.empty((0, width), np.float32)
        places = np.unravel_index(np.arange(start, stop), view.shape[:-1])
        first = np.int64(view.__array_interface__["data"][0] - self._start)
        offsets = sum((place * step for place, step in zip(places, view.strides, strict=False)), first)
        at, step = offsets // view.itemsize, view.strides[-1] // view.itemsize
        if int(at.min()) < 0 or (int(at.max()) + step * (width - 1)) * 4 >= self.tensors[name].nbytes:
            raise QuantkitError(f"{self.raw.directory}: tensor {name!r} cannot be rearranged while it is quantized")
        prepared = self._prepared(name, matrix)
        rows, column = np.divmod(at, n_columns)
        if (step == 1 or width == 1) and (column == column[0]).all() and column[0] + width <= n_columns:
            return np.ascontiguousarray(_take(matrix, prepared, rows)[:, column[0] : column[0] + width])
        # Rows that lie across stored ones, as in a transposed matrix.
        wanted = at[:, None] + step * np.arange(width)
        lines, inverse = np.unique(wanted // n_columns, return_inverse=True)
        gathered: np.ndarray = _take(matrix, prepared, lines)[inverse.reshape(wanted.shape), wanted % n_columns]
        return gathered

    def _prepared(self, name: str, matrix: PackedMatrix) -> Any:
        with self._lock:
            if name not in self._held:
                while len(self._held) >= _HELD:
                    self._held.popitem(last=False)
                self._held[name] = matrix.prepare()
            return self._held[name]

    def release(self, name: str) -> None:
        """See SafetensorsCheckpoint."""
        with self._lock:
            self._held.pop(name, None)
        for part in self._matrices[name].parts if name in self._matrices else (name,):
            self.raw.release(part)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # whoever reads weights looks for what is not finite
def _take(matrix: PackedMatrix, prepared: Any, rows: np.ndarray) -> np.ndarray:
    """The rows of these numbers, in this order. Those between are dequantized too where they are few."""
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= 4 * len(rows):
        part = matrix.rows(prepared, low, high)
        return part if len(rows) == high - low and (np.diff(rows) == 1).all() else part[rows - low]
    out = np.empty((len(rows), matrix.shape[-1]), np.float32)
    done = 0
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        out[done : done + len(run)] = matrix.rows(prepared, int(run[0]), int(run[-1]) + 1)
        done += len(run)
    return out


def _reserve(nbytes: int) -> mmap.mmap:
    """Addresses for so many bytes, which take no memory as long as nothing is read there."""
    size = max(1, nbytes)
    with contextlib.suppress(AttributeError):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    return mmap.mmap(-1, size, access=mmap.ACCESS_READ)


def unpacked(raw: SafetensorsCheckpoint, quantization: Config) -> UnpackedCheckpoint:
    """The checkpoint with plain weights, of one that is quantized as `quantization` says.

    Raises QuantkitError for a method that is not supported, and for tensors that contradict it.
    """
    method = quantization.find("quant_method")
    find = METHODS.get(method) if isinstance(method, str) else None
    if find is None:
        raise QuantkitError(
            f"{quantization.path}: the weights are quantized already ({str(method)[:80]}), which is not supported; "
            "take the original checkpoint"
        )
    matrices: dict[str, PackedMatrix] = {}
    for matrix in find(raw, quantization):
        if matrix.name in matrices or (matrix.name in raw.tensors and matrix.name not in matrix.parts):
            raise QuantkitError(f"{raw.directory}: tensor {matrix.name!r} is there twice, once quantized")
        matrices[matrix.name] = matrix
    return UnpackedCheckpoint(raw, matrices)
