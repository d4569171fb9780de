"""A model's weights as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.sources.source import TensorSource, open_model

if TYPE_CHECKING:
    import numpy as np

_STEP = 1 << 22  # weights decoded at a time, so that little is in memory beside the result
# Plain numbers that no block format decodes, as numpy names them.
_NUMBERS = {
    GGMLType.F64: "<f8",
    GGMLType.I8: "<i1",
    GGMLType.I16: "<i2",
    GGMLType.I32: "<i4",
    GGMLType.I64: "<i8",
}


class DequantizedTensors(Mapping[str, "np.ndarray"]):
    """The tensors of a model by name, each decoded to float32 when it is asked for, and not kept.

    Shapes are numpy's, rows on the last axis: the reverse of a GGUF file's. `source` is the model.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    def __getitem__(self, name: str) -> np.ndarray:
        """Tensor `name`, float32, a new array. Raises KeyError, and QuantkitError for a type that has no decoder."""
        import numpy as np

        info = self.source.tensors[name]
        out = np.empty((info.n_rows, info.n_per_row), np.float32)
        step = max(1, _STEP // max(1, info.n_per_row))
        for start in range(0, info.n_rows, step):
            part = out[start : start + step]
            rows = self.source.read(name, start, start + len(part))
            if info.type in _NUMBERS:
                part[:] = np.ascontiguousarray(rows).view(_NUMBERS[info.type])
            else:
                blocks.decode(rows, info.type, part)
        self.source.release(name)
        return out.reshape(info.shape[::-1])

    def __iter__(self) -> Iterator[str]:
        """The names, in file order."""
        return iter(self.source.tensors)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.source.tensors)

    def __repr__(self) -> str:
        """What it holds, without decoding anything."""
        return f"DequantizedTensors({self.source.label!r}, {len(self)} tensors)"


def dequantize(model: TensorSource | str | os.PathLike[str]) -> DequantizedTensors:
    """A model's weights as float32 numpy arrays by name, decoded one at a time: `dequantize(path)["output.weight"]`.

    `model` is a source, or what `open_model` takes. The values are those of ggml's `dequantize_row_*`, bit for bit.
    Raises QuantkitError when there is no such model.
    """
    return DequantizedTensors(open_model(model))
