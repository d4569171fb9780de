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

    from quantkit.calibration.run import choose_types, quantize
    from quantkit.evaluate.divergence import DivergenceResult, divergence, divergences
    from quantkit.evaluate.embeddings import embed
    from quantkit.evaluate.generate import Generation, generate
    from quantkit.evaluate.importance import importance_matrix
    from quantkit.evaluate.perplexity import PerplexityResult, perplexity
    from quantkit.evaluate.ranking import rank
    from quantkit.evaluate.settings import Chunking, Compute, Estimate
    from quantkit.evaluate.tasks import TasksResult, read_tasks, tasks
    from quantkit.formats.imatrix import ImportanceMatrix
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.plan import Plan
    from quantkit.pipeline.run import convert, convert_lora, plan
    from quantkit.report.comparison import Comparison, compare
    from quantkit.sources.dequantized import dequantize
    from quantkit.sources.merged import merge_lora
    from quantkit.sources.source import TensorSource, open_model
    from quantkit.sources.source import open_source as open_source

__version__ = "0.1.0"
# What `help(quantkit)` shows. The old name open_source is not among it.
__all__ = [
    "Chunking",
    "Comparison",
    "Compute",
    "DivergenceResult",
    "Estimate",
    "GGMLType",
    "Generation",
    "ImportanceMatrix",
    "PerplexityResult",
    "Plan",
    "QuantizeOptions",
    "QuantkitError",
    "TasksResult",
    "TensorSource",
    "choose_types",
    "compare",
    "convert",
    "convert_lora",
    "dequantize",
    "dequantize_rows",
    "divergence",
    "divergences",
    "embed",
    "execute",
    "generate",
    "importance_matrix",
    "merge_lora",
    "open_model",
    "perplexity",
    "plan",
    "quantize",
    "quantize_rows",
    "rank",
    "read_tasks",
    "tasks",
]

# numpy has not been loaded yet, in a command or where quantkit is imported first.
choose_openblas_kernels(Processor.here(), os.environ, "numpy" in sys.modules)

# Loaded when first asked for, so that `import quantkit` is quick.
_ELSEWHERE = {
    "calibration.run": ("choose_types", "quantize"),
    "evaluate.divergence": ("DivergenceResult", "divergence", "divergences"),
    "evaluate.embeddings": ("embed",),
    "evaluate.generate": ("Generation", "generate"),
    "evaluate.importance": ("importance_matrix",),
    "evaluate.perplexity": ("PerplexityResult", "perplexity"),
    "evaluate.ranking": ("rank",),
    "evaluate.settings": ("Chunking", "Compute", "Estimate"),
    "evaluate.tasks": ("TasksResult", "read_tasks", "tasks"),
    "formats.imatrix": ("ImportanceMatrix",),
    "pipeline.execute": ("execute",),
    "pipeline.options": ("QuantizeOptions",),
    "pipeline.plan": ("Plan",),
    "pipeline.run": ("convert", "convert_lora", "plan"),
    "report.comparison": ("Comparison", "compare"),
    "sources.dequantized": ("dequantize",),
    "sources.merged": ("merge_lora",),
    "sources.source": ("TensorSource", "open_model", "open_source"),
}
_MODULE_OF = {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quantkit.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"})


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
