"""Importance matrices for tests that need one of any model."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.sources.source import TensorSource


def make_matrix(source: TensorSource, seed: int = 0) -> ImportanceMatrix:
    """Uneven importance for every matrix of a model, with a column of zeros, and an expert that saw nothing."""
    rng = np.random.default_rng(seed)
    matrix = ImportanceMatrix(datasets=["calibration.txt"], chunk_count=7, chunk_size=512)
    for name, info in source.tensors.items():
        if len(info.shape) > 1 and info.n_per_row > 4 and "norm" not in name and "token_embd" not in name:
            n_matrices = info.shape[2] if len(info.shape) > 2 else 1
            sums = np.exp(rng.standard_normal((n_matrices, info.n_per_row)) * 2).astype(np.float32)
            sums[:, 3] = 0
            counts = rng.integers(1, 5000, n_matrices)
            counts[-1] = 0 if n_matrices > 1 else counts[-1]
            matrix.entries[name] = Importance(sums, counts)
    return matrix


def keys_of(matrix: ImportanceMatrix) -> list[tuple[str, int, Any]]:
    return [
        ("quantize.imatrix.dataset", 3, b"calibration.txt"),
        ("quantize.imatrix.entries_count", 0, len(matrix.entries)),
        ("quantize.imatrix.chunks_count", 0, matrix.chunk_count),
    ]
