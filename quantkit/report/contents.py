"""What a model file holds, for reading."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from quantkit.formats.gguf import Value, ValueType
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource

SHOWN = 6  # items of an array
WIDTH = 90  # characters of a string


@dataclass(frozen=True)
class Contents:
    """Metadata, tensors and sizes of a model."""

    source: GGUFSource

    @property
    def nbytes(self) -> int:
        """Bytes of the file, or of all shards."""
        return sum(file.nbytes for file in self.source.shards)

    @property
    def n_elements(self) -> int:
        """Weights in the model."""
        return sum(info.n_elements for info in self.source.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Average bits of storage for a weight."""
        return sum(info.nbytes for info in self.source.tensors.values()) * 8 / max(1, self.n_elements)

    def __str__(self) -> str:
        """Metadata and tensors as tables, and a summary by type."""
        source = self.source
        keys = [[key, value_type(value), brief(value)] for key, value in source.metadata.items()]
        tensors = [
            [info.name, " x ".join(map(str, info.shape)), info.type.name, f"{info.nbytes / 2**20:.2f}"]
            for info in source.tensors.values()
        ]
        counts = Counter(info.type.name for info in source.tensors.values())
        types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        shards = f" in {len(source.shards)} shards" if len(source.shards) > 1 else ""
        return "\n\n".join(
            [
                table(["key", "type", "value"], keys, left=3),
                table(["tensor", "shape", "type", "MiB"], tensors),
                f"{source.label}: {self.nbytes / 1e6:.1f} MB{shards}, GGUF version {source.shards[0].version}, "
                f"{len(source.tensors)} tensors ({types}), {self.n_elements:,} weights, "
                f"{self.bits_per_weight:.2f} bits per weight",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for programs. Long arrays are given by their length."""
        return {
            "path": self.source.label,
            "size": self.nbytes,
            "n_weights": self.n_elements,
            "bits_per_weight": self.bits_per_weight,
            "metadata": {key: plain(value) for key, value in self.source.metadata.items()},
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "type": t.type.name, "size": t.nbytes}
                for t in self.source.tensors.values()
            ],
        }


def describe(source: GGUFSource) -> Contents:
    """The contents of a model."""
    return Contents(source)


def value_type(value: Value) -> str:
    """A value's type, as `UINT32` or `STRING[128256]`."""
    return f"{value.item.name}[{len(value)}]" if value.type == ValueType.ARRAY else value.type.name


def first_items(value: Value, count: int) -> list[Any]:
    """The first items of an array, without decoding the others."""
    if value.item == ValueType.STRING:
        from itertools import islice

        return list(islice(value.strings(), count))
    return [item.item() for item in value.value[:count]]


def brief(value: Value) -> str:
    """A value in one short line."""
    if value.type == ValueType.ARRAY:
        more = ", …" if len(value) > SHOWN else ""
        return f"[{', '.join(repr(item) for item in first_items(value, SHOWN))}{more}]"[: 2 * WIDTH]
    text = repr(value.value) if isinstance(value.value, str) else f"{value.value}"
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def plain(value: Value) -> Any:
    """A value for JSON: short arrays whole, long ones by type, length and first items.

    JSON has no NaN and no infinity: they become text.
    """
    if value.type != ValueType.ARRAY:
        return _finite(value.value)
    if len(value) <= 64:
        return list(map(_finite, first_items(value, 64)))
    return {"type": value.item.name, "length": len(value), "first": list(map(_finite, first_items(value, SHOWN)))}


def _finite(item: Any) -> Any:
    return str(item) if isinstance(item, float) and not math.isfinite(item) else item
