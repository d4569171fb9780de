"""What rounds matrices with error feedback: the processor, or the GPU that computes the model."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import Curvature
from quantkit.calibration.feedback import Rounded, round_with_feedback
from quantkit.evaluate.inputs import on_host
from quantkit.evaluate.model import Model


class Rounder(Protocol):
    """Makes curvatures of moments, and rounds by them.

    One that is not `shared` rounds one matrix at a time, and is best given `rows` of it together. Of its curvatures
    `host()` is the processor's.
    """

    shared: bool
    rows: int

    def curvature(self, moments: Any, damping: float) -> Any:
        """The curvature of `moments` [n, n]: see `Curvature.of`."""
        ...

    def round(
        self,
        weights: np.ndarray,
        curvature: Any,
        kind: GGMLType,
        *,
        outputs: np.ndarray | None = None,
        threads: int | None = None,
    ) -> Rounded:
        """See `feedback.round_with_feedback`."""
        ...

    def losses(self, errors: np.ndarray, curvature: Any) -> np.ndarray:
        """What `errors`, float32 [n_rows, n], cost under `curvature`: float64 [n_rows]."""
        ...

    def note(self, kind: GGMLType) -> str:
        """What is to be said of how tensors of `kind` are rounded; "" for nothing."""
        ...


class _Processor:
    """Rounds on the processor."""

    shared, rows = True, 0

    def losses(self, errors: np.ndarray, curvature: Any) -> np.ndarray:
        found: np.ndarray = curvature.loss(errors)
        return found

    def note(self, kind: GGMLType) -> str:
        return ""

    def curvature(self, moments: Any, damping: float) -> Curvature:
        return Curvature.of(on_host(moments), damping=damping)

    def round(
        self,
        weights: np.ndarray,
        curvature: Any,
        kind: GGMLType,
        *,
        outputs: np.ndarray | None = None,
        threads: int | None = None,
    ) -> Rounded:
        return round_with_feedback(weights, curvature, kind, outputs=outputs, threads=threads)


def rounder(model: Model) -> Rounder:
    """What rounds the matrices of `model`."""
    if model.gpu is None:
        return _Processor()
    from quantkit.calibration.feedback_torch import TorchRounder

    return TorchRounder(model.gpu)
