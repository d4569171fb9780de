"""Plans: what a run will write, tensor by tensor, decided before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType, encode_header, padded
from quantkit.pipeline.mixtures import FILE_TYPES, FileType, ModelFacts
from quantkit.pipeline.recipe import Options, Recipe, needs_imatrix
from quantkit.pipeline.source import TensorSource

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass
class PlannedTensor:
    """One line of a plan: tensor `source_name` of the source becomes `info`, and why, where it is not the default.

    `weights` are its importance weights: float32 of n_per_row for each matrix, or None. `needs_weights` says that
    it would come out as noise without them.
    """

    source_name: str
    source_type: GGMLType
    info: TensorInfo
    reason: str = ""
    weights: np.ndarray | None = None
    needs_weights: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.source_type == self.info.type


@dataclass
class Plan:
    """A file to be: its metadata, and what each tensor becomes, in file order.

    It can be printed, edited (`plan.set_type(name, type)`) and given to `execute`.
    """

    name: str
    metadata: Metadata
    tensors: list[PlannedTensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[PlannedTensor]:
        """The lines, in file order."""
        return iter(self.tensors)

    def set_type(self, name: str, kind: GGMLType | str) -> None:
        """Make tensor `name` a `kind`. Raises QuantkitError when there is no such tensor, or the blocks do not fit."""
        kind = kind if isinstance(kind, GGMLType) else GGMLType.parse(kind)
        for tensor in self.tensors:
            if tensor.info.name == name:
                _check_blocks(tensor.info, kind)
                tensor.info, tensor.reason = replace(tensor.info, type=kind), "edited"
                return
        raise QuantkitError(f"the plan has no tensor {name!r}")

    def check(self) -> None:
        """Raise QuantkitError, naming the tensor, when a type needs importance weights that it lacks."""
        for tensor in self.tensors:
            if tensor.needs_weights and tensor.weights is None:
                raise QuantkitError(
                    f"{self.name} needs an importance matrix: without one, {tensor.info.name!r} as "
                    f"{tensor.info.type.name} would be noise; make one with `quantkit imatrix`, pass it with --imatrix"
                )

    @property
    def n_elements(self) -> int:
        """Weights in the file."""
        return sum(t.info.n_elements for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without padding and header."""
        return sum(t.info.nbytes for t in self.tensors)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        alignment = self.metadata.alignment
        header = encode_header(self.metadata, (t.info for t in self.tensors), alignment)
        return len(header) + sum(padded(t.info.nbytes, alignment) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Average bits of storage for a weight."""
        return self.nbytes * 8 / max(1, self.n_elements)

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "type": self.name,
            "size": self.file_size,
            "n_weights": self.n_elements,
            "bits_per_weight": self.bits_per_weight,
            "tensors": [
                {
                    "name": t.info.name,
                    "shape": list(t.info.shape),
                    "from": t.source_type.name,
                    "to": t.info.type.name,
                    "size": t.info.nbytes,
                    "note": t.reason,
                }
                for t in self.tensors
            ],
        }

    def __str__(self) -> str:
        """A table of every tensor, its shape, its types and sizes."""
        lines = [f"{'tensor':40} {'shape':>20} {'from':>7} {'to':>7} {'MiB':>9}  note"]
        for t in self.tensors:
            shape = " x ".join(map(str, t.info.shape))
            size = t.info.nbytes / 2**20
            types = f"{t.source_type.name:>7} {t.info.type.name:>7}"
            lines.append(f"{t.info.name:40} {shape:>20} {types} {size:9.2f}  {t.reason}".rstrip())
        lines.append(f"{self.name}: {self.nbytes / 2**20:.2f} MiB, {self.bits_per_weight:.2f} bits per weight")
        return "\n".join(lines)


def plan_copy(source: TensorSource, name: str = "COPY") -> Plan:
    """Every tensor as the source has it, in the source's order: what `convert` writes."""
    lines = [PlannedTensor(t.name, t.type, t) for t in source.tensors.values()]
    return Plan(name, Metadata(source.metadata), lines)


def plan_quantize(
    source: TensorSource,
    file: FileType,
    options: Options | None = None,
    imatrix: Mapping[str, np.ndarray] | None = None,
    overrides: Sequence[tuple[str, ValueType, object]] = (),
    allow_requantize: bool = False,
) -> Plan:
    """What llama-quantize would write from `source` as `file`.

    `imatrix` are importance weights by tensor name; `overrides` are metadata values (key, type, value) to set.
    Raises QuantkitError when a tensor is quantized already (unless `allow_requantize`), or when importance weights do
    not fit their tensor. A type that needs an importance matrix is planned without one, but `execute` refuses it.
    """
    tensors = sorted(source.tensors.values(), key=_file_order)
    recipe = Recipe(file, ModelFacts.of(source.metadata), options or Options(), has_imatrix=imatrix is not None)
    lines = []
    for info, choice in zip(tensors, recipe.choose(tensors), strict=True):
        if choice.type != info.type:
            _check_blocks(info, choice.type)
            if info.type.is_quantized and not allow_requantize:
                raise QuantkitError(
                    f"{source.label}: tensor {info.name!r} is {info.type.name} already, and quantizing twice adds the "
                    "errors of both; start from the F16, BF16 or F32 model, or pass --allow-requantize"
                )
        becomes = replace(info, type=choice.type)
        weights = None if imatrix is None or choice.type == info.type else _weights_for(info, imatrix, source.label)
        needs = choice.type != info.type and needs_imatrix(info.name, choice.type, file)
        lines.append(PlannedTensor(info.name, info.type, becomes, choice.reason, weights, needs))
    metadata = Metadata(source.metadata)
    metadata.set("general.quantization_version", ValueType.UINT32, QUANTIZATION_VERSION)
    metadata.set("general.file_type", ValueType.UINT32, _number(file, source.metadata))
    for key, kind, value in overrides:
        metadata.set(key, kind, value)
    return Plan(file.name, metadata, lines)


def _file_order(info: TensorInfo) -> tuple[int, bytes]:
    """llama.cpp keeps tensors sorted: those without a layer first, then layer by layer, each by name."""
    layer = re.match(r"blk\.(\d+)", info.name)
    return (int(layer[1]) if layer else -1, info.name.encode())


def _number(file: FileType, metadata: Metadata) -> int:
    if not file.copies:
        return file.number
    return int(metadata.lookup("general.file_type", FILE_TYPES["F32"].number))


def _check_blocks(info: TensorInfo, kind: GGMLType) -> None:
    if info.n_per_row % kind.block_size:
        raise QuantkitError(
            f"tensor {info.name!r} has rows of {info.n_per_row} weights, not a multiple of {kind.name}'s "
            f"{kind.block_size}; choose another type for it"
        )


def _weights_for(info: TensorInfo, imatrix: Mapping[str, np.ndarray], label: str) -> np.ndarray | None:
    weights = imatrix.get(info.name)
    n_matrices = info.shape[2] if len(info.shape) > 2 else 1
    if weights is None:
        log.info("no importance weights for %s", info.name)
    elif weights.size == info.n_per_row * n_matrices:
        return weights.reshape(n_matrices, info.n_per_row)
    elif info.name not in ("token_embd.weight", "per_layer_token_embd.weight"):
        raise QuantkitError(
            f"the importance matrix has {weights.size} weights for {info.name!r}, which needs "
            f"{info.n_per_row * n_matrices}: it was made for another model than {label}"
        )
    return None
