"""Two models compared: metadata, tensors, and the differences between their weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from quantkit import blocks
from quantkit.pipeline.execute import BITE, Progress
from quantkit.report.contents import brief
from quantkit.report.tables import table
from quantkit.sources.source import TensorSource, open_model

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster


@dataclass(frozen=True)
class TensorError:
    """The difference between a tensor of the second model and the first's.

    `source_type` is its type in the first, `type` in the second. `rmse` is the root mean square difference,
    `relative_rmse` that over the root mean square of the first's weights, `max_error` the largest difference, `cosine`
    the cosine of the angle between the two (nan where one is all zero).
    """

    name: str
    source_type: str
    type: str
    rmse: float
    relative_rmse: float
    max_error: float
    cosine: float


@dataclass
class Comparison:
    """What differs between two models.

    `metadata` holds (key, first, second), with "" for what is missing; `tensors` are those whose weights differ,
    `n_equal` counts those whose weights are equal. The others are names.
    """

    models: tuple[str, str]
    metadata: list[tuple[str, str, str]] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    other_shapes: list[str] = field(default_factory=list)
    tensors: list[TensorError] = field(default_factory=list)
    n_equal: int = 0

    def __str__(self) -> str:
        """Tables of the metadata and the tensors that differ, and a summary."""
        parts = []
        if self.metadata:
            parts.append(table(["key", *self.models], self.metadata, left=3))
        for title, names in (
            (f"only in {self.models[0]}", self.only_first),
            (f"only in {self.models[1]}", self.only_second),
            ("with different shapes", self.other_shapes),
        ):
            if names:
                parts.append(f"tensors {title}: {', '.join(names)}")
        if self.tensors:
            rows = [
                [
                    e.name,
                    f"{e.source_type} → {e.type}",
                    f"{e.rmse:.3e}",
                    f"{e.relative_rmse:.4f}",
                    f"{e.max_error:.3e}",
                    f"{e.cosine:.6f}",
                ]
                for e in self.tensors
            ]
            parts.append(table(["tensor", "types", "RMSE", "relative RMSE", "max", "cosine"], rows, left=2))
        parts.append(f"{self.n_equal} tensors with equal weights, {len(self.tensors)} that differ")
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data."""
        metadata = [{"key": key, "first": first, "second": second} for key, first, second in self.metadata]
        return {**asdict(self), "metadata": metadata}


def compare(
    first: TensorSource | str | os.PathLike[str],
    second: TensorSource | str | os.PathLike[str],
    progress: Progress | None = None,
    cluster: Cluster | None = None,
) -> Comparison:
    """Compare two models, sources or what `open_model` takes: metadata, tensors, and the error of each.

    Weights are decoded to float32 piece by piece. `progress(tensor, nbytes)` counts bytes of the second model. With
    `cluster`, its workers compare tensors.
    """
    first, second = open_model(first), open_model(second)
    result = Comparison((first.label, second.label))
    for key in dict.fromkeys([*first.metadata, *second.metadata]):
        a, b = first.metadata.get(key), second.metadata.get(key)
        if a != b:
            result.metadata.append((key, brief(a) if a is not None else "", brief(b) if b is not None else ""))
    result.only_first = [name for name in first.tensors if name not in second.tensors]
    alike = []
    for name, info in second.tensors.items():
        mine = first.tensors.get(name)
        if mine is None:
            result.only_second.append(name)
        elif mine.shape != info.shape:
            result.other_shapes.append(name)
        else:
            alike.append(name)
            continue
        if progress is not None:
            progress(name, info.nbytes)
    for name, error in _errors(first, second, alike, cluster):
        if error.max_error == 0:
            result.n_equal += 1
        else:
            result.tensors.append(error)
        if progress is not None:
            progress(name, second.tensors[name].nbytes)
    order = {name: at for at, name in enumerate(second.tensors)}
    result.tensors.sort(key=lambda error: order[error.name])
    return result


def _errors(
    first: TensorSource, second: TensorSource, names: Sequence[str], cluster: Cluster | None
) -> Iterator[tuple[str, TensorError]]:
    """The errors of tensors `names`, as they are found."""
    if cluster is None:
        for name in names:
            yield name, _tensor_error(first, second, name)
        return
    from quantkit.pipeline.cluster import Task, packed

    both = packed(first), packed(second)
    tasks = [Task(f"compare {name}", compare_tensor, (*both, name)) for name in names]
    for number, error in cluster.run(tasks):
        yield names[number], error


def compare_tensor(first: bytes, second: bytes, name: str) -> TensorError:
    """The error of tensor `name` between two packed sources: what a worker does."""
    from quantkit.pipeline.cluster import opened

    return _tensor_error(opened(first), opened(second), name)


def _tensor_error(first: TensorSource, second: TensorSource, name: str) -> TensorError:
    mine, other = first.tensors[name], second.tensors[name]
    step = max(1, BITE * 4 // max(1, mine.n_per_row))
    square = squares_a = squares_b = product = largest = 0.0
    # The last bits of a sum depend on how many threads share it.
    with threadpool_limits(limits=1, user_api="blas"):
        for start in range(0, mine.n_rows, step):
            stop = min(mine.n_rows, start + step)
            a = blocks.decode(first.read(name, start, stop), mine.type).reshape(-1).astype(np.float64)
            b = blocks.decode(second.read(name, start, stop), other.type).reshape(-1).astype(np.float64)
            difference = a - b
            square += float(difference @ difference)
            squares_a += float(a @ a)
            squares_b += float(b @ b)
            product += float(a @ b)
            largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    first.release(name)
    second.release(name)
    norm = math.sqrt(squares_a * squares_b)
    return TensorError(
        name,
        mine.type.name,
        other.type.name,
        math.sqrt(square / max(1, mine.n_elements)),
        math.sqrt(square / squares_a) if squares_a else (0.0 if square == 0 else math.inf),
        largest,
        product / norm if norm else math.nan,
    )
