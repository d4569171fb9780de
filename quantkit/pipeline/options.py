"""The options of quantizing, besides the file type."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import ValueType

if TYPE_CHECKING:
    from quantkit.formats.imatrix import ImportanceMatrix

Override = tuple[str, ValueType, object]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """llama-quantize's options. Types may be given by name. Raises QuantkitError for options that do not go together.

    `imatrix` is an importance matrix or its file, whose entries `include_weights` and `exclude_weights`, parts of
    tensor names, select; `calibrated` says that a calibration will supply the weights instead. `tensor_types` are
    (regular expression, type) pairs: the first that matches a tensor's name decides its type, for file types with
    blocks. `output_tensor_type` and `token_embedding_type` are those tensors' types, `leave_output_tensor` keeps the
    first as it is, and `pure` gives all others the file type's default. `allow_requantize` accepts tensors that are
    quantized already. `override_kv` are metadata values (key, type, value) to set. The layers `prune_layers` are left
    out, and those after them renumbered. `keep_split` writes the shards that the source has, `split_max_size` (bytes)
    and `split_max_tensors` bound new ones.
    """

    imatrix: ImportanceMatrix | str | os.PathLike[str] | None = None
    include_weights: Sequence[str] = ()
    exclude_weights: Sequence[str] = ()
    calibrated: bool = False
    tensor_types: Sequence[tuple[str, GGMLType | str]] = ()
    output_tensor_type: GGMLType | str | None = None
    token_embedding_type: GGMLType | str | None = None
    leave_output_tensor: bool = False
    pure: bool = False
    allow_requantize: bool = False
    override_kv: Sequence[Override] = ()
    prune_layers: Sequence[int] = ()
    keep_split: bool = False
    split_max_size: int | None = None
    split_max_tensors: int | None = None

    def __post_init__(self) -> None:
        for pattern, kind in self.tensor_types:
            compiled(pattern)
            encodable(kind)
        for named in (self.output_tensor_type, self.token_embedding_type):
            if named is not None:
                encodable(named)
        if self.include_weights and self.exclude_weights:
            raise QuantkitError("importance weights to include and to exclude cannot be used together")
        if (self.include_weights or self.exclude_weights) and self.imatrix is None and not self.calibrated:
            raise QuantkitError("without an importance matrix there are no weights to choose", option="imatrix")
        if self.output_tensor_type is not None and self.leave_output_tensor:
            raise QuantkitError("the output tensor can be left as it is or get a type, not both")
        if self.keep_split and (self.split_max_size or self.split_max_tensors):
            raise QuantkitError("the source's shards can be kept or new ones made, not both")

    @property
    def output_type(self) -> GGMLType | None:
        """`output_tensor_type` as a type."""
        return None if self.output_tensor_type is None else encodable(self.output_tensor_type)

    @property
    def embedding_type(self) -> GGMLType | None:
        """`token_embedding_type` as a type."""
        return None if self.token_embedding_type is None else encodable(self.token_embedding_type)

    @property
    def patterns(self) -> list[tuple[re.Pattern[str], GGMLType]]:
        """`tensor_types` as compiled expressions and types."""
        return [(compiled(pattern), encodable(kind)) for pattern, kind in self.tensor_types]


def encodable(kind: GGMLType | str) -> GGMLType:
    """`kind` as a type. Raises QuantkitError for an unknown type, and for one that cannot be encoded."""
    found = kind if isinstance(kind, GGMLType) else GGMLType.parse(kind)
    if not found.has_codec:
        known = ", ".join(each.name for each in GGMLType if each.has_codec)
        raise QuantkitError(f"weights cannot be encoded in {found.name}; choose one of {known}")
    return found


def compiled(pattern: str) -> re.Pattern[str]:
    """`pattern`, a regular expression. Raises QuantkitError when it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise QuantkitError(f"tensor type {pattern!r} is not a regular expression: {error}") from None
