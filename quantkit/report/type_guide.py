"""A guide to the file types: bits per weight, size, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.pipeline.mixtures import ALIASES, COPY, FILE_TYPES, FileType
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.source import TensorSource
from quantkit.wording import size_text

# One line for each, with the table 80 columns wide.
USES = {
    "F32": "32-bit floats; for tools that read nothing else",
    "F16": "16-bit floats; a source to quantize from",
    "BF16": "16-bit floats; holds BF16 checkpoints exactly",
    "Q8_0": "hardly any loss, fast; where memory is plenty",
    "Q6_K": "very little loss",
    "Q5_K_M": "little loss; more bits for sensitive tensors",
    "Q5_K_S": "little loss; nearly all tensors alike",
    "Q5_1": "older 5-bit format with a minimum; prefer Q5_K_M",
    "Q5_0": "older 5-bit format; prefer Q5_K_S",
    "Q4_K_M": "the usual choice; more bits for sensitive tensors",
    "Q4_K_S": "a little smaller than Q4_K_M",
    "Q4_1": "older 4-bit format with a minimum; prefer Q4_K_M",
    "Q4_0": "older 4-bit format; fast on CPUs",
    "IQ4_NL": "4 bits, uneven steps; for rows in blocks of 32",
    "IQ4_XS": "4 bits, uneven steps; smaller than Q4_K_S",
    "MXFP4_MOE": "4-bit floats for experts, Q8_0 for the rest",
    "Q3_K_L": "3 bits; 5 for sensitive tensors",
    "Q3_K_M": "3 bits; 4 and 5 for sensitive tensors",
    "Q3_K_S": "3 bits; noticeable loss",
    "IQ3_M": "3 bits from a grid; the largest mixture",
    "IQ3_S": "3 bits from a grid",
    "IQ3_XS": "3 bits from grids",
    "IQ3_XXS": "3 bits from a grid; the smallest",
    "Q2_K": "2 bits; 3 and 4 for sensitive tensors; large loss",
    "Q2_K_S": "2 bits; large loss",
    "IQ2_M": "2 bits from grids; the largest mixture",
    "IQ2_S": "2 bits from grids",
    "IQ2_XS": "2 bits from a grid",
    "IQ2_XXS": "2 bits from a grid; the smallest",
    "Q2_0": "2 bits, one scale; for models trained for it",
    "TQ2_0": "ternary, fast; for models trained for it",
    "TQ1_0": "ternary, small; for models trained for it",
    "IQ1_M": "under 2 bits; where nothing else fits",
    "IQ1_S": "the fewest bits, the largest loss",
    "Q1_0": "1 bit, one scale; for models trained for it",
    "COPY": "every tensor as it is; to edit metadata or split",
}


@dataclass(frozen=True)
class TypeRow:
    """A file type, and what it does to a model.

    `bits_per_weight` and `size`, in bytes, are those of the whole file, and None where the model's shapes do not allow
    the type. `needs_imatrix`: it is refused without an importance matrix. `use` says what it is for.
    """

    type: str
    bits_per_weight: float | None
    size: int | None
    needs_imatrix: bool
    use: str


@dataclass(frozen=True)
class TypeGuide:
    """All file types, for the model whose name is `model`."""

    model: str
    types: list[TypeRow]

    def __str__(self) -> str:
        """A table of 80 columns, and what it shows."""
        lines = [f"{'type':10} {'bits':>5} {'size':>8}  use"]
        for row in self.types:
            name = row.type + ("*" if row.needs_imatrix else "")
            bits = "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
            size = "-" if row.size is None else size_text(row.size)
            lines.append(f"{name:10} {bits:>5} {size:>8}  {row.use}")
        aliases = ", ".join(f"{short} = {long}" for short, long in ALIASES.items())
        return "\n".join(
            [
                *lines,
                "",
                f"bits: average bits per weight; size: of the whole file; both for {self.model}.",
                "*: needs an importance matrix. Most others below 6 bits lose less with one.",
                f"Other names: {aliases}.",
            ]
        )


class _Outline:
    """A model whose shapes alone are known."""

    def __init__(self, label: str, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> None:
        self.label, self.metadata, self.tensors = label, metadata, tensors
        self.files: list[Path] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise QuantkitError(f"{self.label}: only the shapes of {name!r} are known")

    def release(self, name: str) -> None:
        pass


def _llama_3_8b() -> TensorSource:
    """The shapes of Llama 3 8B, a well-known model."""
    n_layer, n_embd, n_kv, n_ff, n_vocab = 32, 4096, 1024, 14336, 128256
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    for key, value in {"block_count": n_layer, "attention.head_count": 32, "attention.head_count_kv": 8}.items():
        metadata.set(f"llama.{key}", ValueType.UINT32, value)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_embd, n_vocab),
        "output.weight": (n_embd, n_vocab),
        "output_norm.weight": (n_embd,),
    }
    for layer in range(n_layer):
        for name, shape in {
            "attn_norm": (n_embd,),
            "attn_q": (n_embd, n_embd),
            "attn_k": (n_embd, n_kv),
            "attn_v": (n_embd, n_kv),
            "attn_output": (n_embd, n_embd),
            "ffn_norm": (n_embd,),
            "ffn_gate": (n_embd, n_ff),
            "ffn_up": (n_embd, n_ff),
            "ffn_down": (n_ff, n_embd),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    tensors = {
        name: TensorInfo(name, shape, GGMLType.BF16 if len(shape) > 1 else GGMLType.F32)
        for name, shape in shapes.items()
    }
    return _Outline("Llama 3 8B", metadata, tensors)


def type_guide(source: TensorSource | None = None) -> TypeGuide:
    """Every file type, with its bits per weight and size for `source`, or else for the shapes of Llama 3 8B."""
    model = source or _llama_3_8b()
    return TypeGuide(model.label, [_row(model, file) for file in (*FILE_TYPES.values(), COPY)])


def _row(model: TensorSource, file: FileType) -> TypeRow:
    try:
        plan = plan_quantize(model, file, QuantizeOptions(allow_requantize=True))
    except QuantkitError:  # blocks that do not divide the rows
        return TypeRow(file.name, None, None, False, USES[file.name])
    return TypeRow(file.name, plan.bits_per_weight, plan.file_size, any(t.needs_weights for t in plan), USES[file.name])
