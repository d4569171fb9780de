"""ggml itself, as the llama_cpp package ships it, called through ctypes: the reference for bytes and for speed."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

from quantkit import GGMLType

_PLAIN = {GGMLType.F16: "ggml_fp16_to_fp32_row", GGMLType.BF16: "ggml_bf16_to_fp32_row"}


class Ggml:
    """The row encoders and decoders of libggml-base."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("llama_cpp is not installed")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
        self._library = ctypes.CDLL(str(next(folder / name for name in names if (folder / name).exists())))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
        self._requires = self._library.ggml_quantize_requires_imatrix
        self._requires.restype = ctypes.c_bool

    def requires_weights(self, kind: GGMLType) -> bool:
        """Whether ggml refuses to encode `kind` without importance weights."""
        return bool(self._requires(ctypes.c_int(kind)))

    def encode(
        self, rows: np.ndarray, kind: GGMLType, weights: np.ndarray | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """`ggml_quantize_chunk` of contiguous float32 rows."""
        assert rows.flags.c_contiguous and rows.dtype == np.float32
        n_rows, n_per_row = rows.shape
        if out is None:
            out = np.zeros((n_rows, kind.row_nbytes(n_per_row)), np.uint8)
        at = None if weights is None else weights.ctypes.data
        self._quantize(int(kind), rows.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, at)
        return out

    def decode(self, data: np.ndarray, kind: GGMLType, out: np.ndarray | None = None) -> np.ndarray:
        """`dequantize_row_*` of contiguous rows of bytes."""
        assert data.flags.c_contiguous and data.dtype == np.uint8
        n_rows, nbytes = data.shape
        if out is None:
            out = np.zeros((n_rows, nbytes // kind.type_size * kind.block_size), np.float32)
        if kind == GGMLType.F32:
            out[:] = data.view(np.float32)
        else:
            name = _PLAIN.get(kind) or "dequantize_row_" + kind.name.lower().replace("_k", "_K")
            decoder = getattr(self._library, name)
            decoder.restype = None
            decoder(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
        return out
