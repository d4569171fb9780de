"""Quantize models to GGUF, byte for byte as llama-quantize does, and measure what it costs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.machine import Processor, choose_openblas_kernels

if TYPE_CHECKING:
    import numpy as np

    from quantkit.calibration.run import quantize
    from quantkit.evaluate.divergence import DivergenceResult, divergence, divergences
    from quantkit.evaluate.generate import Generation, generate
    from quantkit.evaluate.importance import importance_matrix
    from quantkit.evaluate.perplexity import PerplexityResult, perplexity
    from quantkit.evaluate.settings import Chunking, Compute, Estimate
    from quantkit.evaluate.tasks import TasksResult, read_tasks, tasks
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.run import plan
    from quantkit.sources.source import open_source

__version__ = "0.1.0"
__all__ = [
    "Chunking",
    "Compute",
    "DivergenceResult",
    "Estimate",
    "GGMLType",
    "Generation",
    "PerplexityResult",
    "QuantizeOptions",
    "QuantkitError",
    "TasksResult",
    "dequantize_rows",
    "divergence",
    "divergences",
    "execute",
    "generate",
    "importance_matrix",
    "open_source",
    "perplexity",
    "plan",
    "quantize",
    "quantize_rows",
    "read_tasks",
    "tasks",
]

# numpy has not been loaded yet, in a command or where quantkit is imported first.
choose_openblas_kernels(Processor.here(), os.environ, "numpy" in sys.modules)

# Loaded when first asked for, so that `import quantkit` is quick.
_ELSEWHERE = {
    "Chunking": "quantkit.evaluate.settings",
    "Compute": "quantkit.evaluate.settings",
    "DivergenceResult": "quantkit.evaluate.divergence",
    "Estimate": "quantkit.evaluate.settings",
    "Generation": "quantkit.evaluate.generate",
    "PerplexityResult": "quantkit.evaluate.perplexity",
    "QuantizeOptions": "quantkit.pipeline.options",
    "TasksResult": "quantkit.evaluate.tasks",
    "divergence": "quantkit.evaluate.divergence",
    "divergences": "quantkit.evaluate.divergence",
    "generate": "quantkit.evaluate.generate",
    "read_tasks": "quantkit.evaluate.tasks",
    "tasks": "quantkit.evaluate.tasks",
    "execute": "quantkit.pipeline.execute",
    "importance_matrix": "quantkit.evaluate.importance",
    "open_source": "quantkit.sources.source",
    "perplexity": "quantkit.evaluate.perplexity",
    "plan": "quantkit.pipeline.run",
    "quantize": "quantkit.calibration.run",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ELSEWHERE[name]), name)


def quantize_rows(array: Any, type: str | GGMLType, weights: Any = None) -> np.ndarray:
    """Quantize the rows (the last axis) of a float array to GGML type `type`, as ggml's `ggml_quantize_chunk` does.

    `weights`, one number a column, say how much each column matters. Returns uint8 of shape
    (..., bytes of a row). Raises QuantkitError for an unknown type or rows that its blocks do not divide.
    """
    import numpy as np

    from quantkit import blocks

    kind = type if isinstance(type, GGMLType) else GGMLType.parse(type)
    rows = np.asarray(array, np.float32)
    if rows.ndim == 0 or rows.shape[-1] == 0:
        raise QuantkitError("quantize_rows needs rows: an array of at least one dimension, not empty")
    if weights is not None and np.shape(weights) != rows.shape[-1:]:
        raise QuantkitError(f"{np.shape(weights)} importance weights for rows of {rows.shape[-1]}")
    encoded = blocks.encode(rows.reshape(-1, rows.shape[-1]), kind, weights)
    return encoded.reshape(*rows.shape[:-1], -1)


def dequantize_rows(data: Any, type: str | GGMLType, n_per_row: int | None = None) -> np.ndarray:
    """Dequantize bytes of GGML type `type`, rows on the last axis, as ggml's `dequantize_row_*` do.

    `n_per_row` cuts flat bytes into rows; left out, the last axis of `data` is a row. Returns float32 of shape
    (..., n_per_row). Raises QuantkitError for an unknown type or bytes that do not make whole rows.
    """
    import numpy as np

    from quantkit import blocks

    kind = type if isinstance(type, GGMLType) else GGMLType.parse(type)
    raw = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, bytearray, memoryview)) else np.asarray(data)
    if raw.dtype != np.uint8:
        raise QuantkitError(f"dequantize_rows needs bytes (uint8), not {raw.dtype}")
    if n_per_row is not None:
        nbytes = kind.row_nbytes(n_per_row)
        if (raw.ndim > 1 and raw.shape[-1] != nbytes) or raw.size % nbytes:
            raise QuantkitError(f"{raw.shape} bytes do not make {kind.name} rows of {n_per_row} weights, {nbytes} each")
        raw = raw.reshape(*raw.shape[:-1], -1) if raw.ndim > 1 else raw.reshape(-1, nbytes)
    decoded = blocks.decode(raw.reshape(-1, raw.shape[-1]), kind)
    return decoded.reshape(*raw.shape[:-1], -1)
