"""What the gguf package 0.19 lacks of families that the llama.cpp we match has.

Delete what a newer gguf brings, and this module with the last of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gguf

_NEXT = (
    "NEXTN_EH_PROJ", "NEXTN_EMBED_TOKENS", "NEXTN_ENORM", "NEXTN_HNORM", "NEXTN_SHARED_HEAD_HEAD",
    "NEXTN_SHARED_HEAD_NORM",
)  # fmt: skip
# By `general.architecture`, members of gguf.MODEL_TENSOR that its layers can have beside those of the package's list.
_MORE_TENSORS = {"qwen3next": _NEXT, "qwen35": _NEXT, "qwen35moe": _NEXT}


def more_names(architecture: str, n_layers: int) -> Mapping[str, tuple[gguf.MODEL_TENSOR, str]]:
    """Entries for gguf's map of names: tensors of `architecture` that it leaves out, by what checkpoints call them."""
    import gguf

    return {
        key.format(bid=layer): (tensor, gguf.TENSOR_NAMES[tensor].format(bid=layer))
        for tensor in (getattr(gguf.MODEL_TENSOR, member) for member in _MORE_TENSORS.get(architecture, ()))
        for key in gguf.TensorNameMap.block_mappings_cfg[tensor]
        for layer in range(n_layers)
    }
