"""What a model holds, for reading: metadata, tensors, and how much of it is in which type."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, Value, ValueType
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.pipeline.plan import plan_copy
from quantkit.sources.source import GGUFSource, TensorSource, open_model
from quantkit.wording import count_text, printable, size_text

SHOWN = 6  # items of an array
SHORT = 64  # arrays of up to this many items are given whole
LONGEST_KEY = 44  # characters of a key or a tensor's name in a table
WIDTH = 90  # characters of a value outside of tables

# Names of enum values, by the end of their key. Source: enums of llama.h and llama-hparams.h.
ENUMS: dict[str, dict[int, str]] = {
    "general.file_type": {file.number: name for name, file in FILE_TYPES.items()},
    ".pooling_type": {0: "none", 1: "mean", 2: "first token", 3: "last token", 4: "rank"},
    ".expert_gating_func": {1: "softmax", 2: "sigmoid", 3: "softmax of the chosen"},
}


@dataclass(frozen=True)
class TypeShare:
    """The tensors, weights and bytes of a model that are in one type."""

    type: str
    n_tensors: int
    n_weights: int
    size: int


@dataclass(frozen=True)
class Contents:
    """Metadata, tensors and sizes of a model: a GGUF model, or a checkpoint seen as one."""

    source: TensorSource

    @property
    def size(self) -> int:
        """Bytes of the file or of all shards; for a checkpoint, of the file that it converts to."""
        if isinstance(self.source, GGUFSource):
            return sum(file.nbytes for file in self.source.shards)
        return plan_copy(self.source).file_size

    @property
    def n_weights(self) -> int:
        """Weights in the model."""
        return sum(info.n_elements for info in self.source.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Average bits of storage for a weight."""
        return sum(info.nbytes for info in self.source.tensors.values()) * 8 / max(1, self.n_weights)

    @property
    def types(self) -> list[TypeShare]:
        """The types in the model, the one with most bytes first."""
        infos: dict[GGMLType, list[TensorInfo]] = {}
        for info in self.source.tensors.values():
            infos.setdefault(info.type, []).append(info)
        shares = [
            TypeShare(kind.name, len(own), sum(i.n_elements for i in own), sum(i.nbytes for i in own))
            for kind, own in infos.items()
        ]
        return sorted(shares, key=lambda share: -share.size)

    def __str__(self) -> str:
        """Tables of 80 columns."""
        return self.text()

    def text(self, width: int = 80, full: bool = False) -> str:
        """Metadata, tensors, sums by type, and a summary, in `width` columns; `full` cuts no value short."""
        tensors, types = list(self.source.tensors.values()), self.types
        total = max(1, sum(share.size for share in types))
        return "\n\n".join(
            [
                _metadata_table(self.source.metadata, width, full),
                _columns(
                    ["tensor", "shape", "type", "size"],
                    [
                        [_cut(info.name), " x ".join(map(str, info.shape)), info.type.name, size_text(info.nbytes)]
                        for info in tensors
                    ],
                    "<>>>",
                ),
                _columns(
                    ["type", "tensors", "weights", "size", "share"],
                    [
                        [s.type, str(s.n_tensors), f"{s.n_weights:,}", size_text(s.size), f"{s.size / total:.1%}"]
                        for s in types
                    ],
                    "<>>>>",
                ),
                f"{_one_line(self.source.label)}: {self._kind()}\n"
                f"{size_text(self.size)}, {count_text(len(tensors), 'tensor')}, "
                f"{count_text(self.n_weights, 'weight')}, {self.bits_per_weight:.2f} bits per weight",
            ]
        )

    def _kind(self) -> str:
        if not isinstance(self.source, GGUFSource):
            return "a checkpoint, shown as the GGUF file that it converts to"
        shards = f", {count_text(len(self.source.shards), 'shard')}" if len(self.source.shards) > 1 else ""
        return f"GGUF version {self.source.shards[0].version}{shards}"

    def as_dict(self, full: bool = False) -> dict[str, Any]:
        """The contents as plain data. Unless `full`, long arrays are given by type, length and first items."""
        return {
            "model": self.source.label,
            "size": self.size,
            "n_weights": self.n_weights,
            "bits_per_weight": self.bits_per_weight,
            "by_type": self.types,
            "metadata": {key: plain(value, full) for key, value in self.source.metadata.items()},
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "type": t.type.name, "size": t.nbytes}
                for t in self.source.tensors.values()
            ],
        }


def describe(model: TensorSource | str | os.PathLike[str]) -> Contents:
    """The contents of a model: a source, or what `open_model` takes."""
    return Contents(open_model(model))


def _metadata_table(metadata: Metadata, width: int, full: bool) -> str:
    keys = [_cut(key) for key in metadata]
    kinds = [value_type(value) for value in metadata.values()]
    left = width - max(map(len, ["key", *keys])) - max(map(len, ["type", *kinds])) - 4
    values = [_named(key, brief(value, None if full else max(8, left)), value, left) for key, value in metadata.items()]
    return _columns(["key", "type", "value"], list(zip(keys, kinds, values, strict=True)), "<<<")


def _named(key: str, text: str, value: Value, left: int) -> str:
    """`text`, a value, followed by its name if it is an enum value and the name fits."""
    names = next((names for end, names in ENUMS.items() if key.endswith(end)), {})
    if value.type in (ValueType.ARRAY, ValueType.STRING) or value.value not in names:
        return text
    both = f"{text} ({names[value.value]})"
    return both if len(both) <= max(8, left) else text


def _columns(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A table whose columns are `align`ed to the left (<) or to the right (>)."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        for row in [headers, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str) -> str:
    shown = _one_line(text)
    return shown if len(shown) <= LONGEST_KEY else shown[: LONGEST_KEY - 1] + "…"


def value_type(value: Value) -> str:
    """A value's type, as `uint32`, `string` or `[string]`."""
    return f"[{value.item.name.lower()}]" if value.type == ValueType.ARRAY else value.type.name.lower()


def first_items(value: Value, count: int | None) -> list[Any]:
    """The first items of an array, all if `count` is None, without decoding the others."""
    if value.item == ValueType.STRING:
        return list(islice(value.strings(), count))
    return [item.item() for item in value.value[:count]]


def brief(value: Value, width: int | None = WIDTH) -> str:
    """A value in one line of at most `width` characters, or whole: an array by its length and its first items."""
    if value.type == ValueType.ARRAY:
        count = None if width is None else SHOWN
        more = ", …" if count is not None and len(value) > count else ""
        text = f"{len(value):,}: {', '.join(map(_literal, first_items(value, count)))}{more}"
    else:
        text = _literal(value.value)
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def _one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _literal(value: Any) -> str:
    if isinstance(value, str):
        escaped = _one_line(value).replace('"', '\\"')
        return f'"{escaped}"'
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def plain(value: Value, full: bool = False) -> Any:
    """A value for JSON: unless `full`, long arrays are given by type, length and first items."""
    if value.type != ValueType.ARRAY:
        return value.value
    if full or len(value) <= SHORT:
        return first_items(value, None)
    return {"type": value.item.name.lower(), "length": len(value), "first": first_items(value, SHOWN)}
