"""Gemma 3's projector: SigLIP, pooled to 256 tokens an image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantkit.architectures.base import Transform
from quantkit.architectures.gemma2 import plus_one
from quantkit.architectures.projectors.base import Projector
from quantkit.blocks.types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter

_USUAL_SCALE = 4  # what llama.cpp assumes without the key
_TOWER = "vision_tower."


class Gemma3Projector(Projector):
    """Gemma3ForConditionalGeneration's."""

    kind = "gemma3"
    checkpoints = {  # noqa: RUF012
        "Gemma3ForConditionalGeneration": {"vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
        }}
    }  # fmt: skip
    beginnings = ("multi_modal_projector.", "vision_tower.")
    # Published files have a level more in the tower's names than transformers 5 saves.
    renames = {  # noqa: RUF012
        "_weight": ".weight",
        **{
            f"{_TOWER}{part}": f"{_TOWER}vision_model.{part}" for part in ("embeddings.", "encoder.", "post_layernorm.")
        },
    }
    required = (
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight", "v.post_ln.weight", "v.post_ln.bias",
        "mm.input_projection.weight", "mm.soft_emb_norm.weight",
    )  # fmt: skip
    forced = {  # noqa: RUF012
        "input_projection": GGMLType.F16,
        "patch_embd": GGMLType.F32,
    }
    transforms = {"soft_emb_norm.weight": Transform(arithmetic=plus_one)}  # noqa: RUF012

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, GELU, and by how much the grid of patches is pooled where that is not four."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("layer_norm_eps"))
        writer.add_vision_use_gelu(True)
        side = math.isqrt(self.preprocessor.integer("image_seq_length") or 256)
        scale = self.image_size // self.config.require("patch_size") // max(1, side)
        if scale > 0 and scale != _USUAL_SCALE:
            writer.add_vision_projector_scale_factor(scale)

    def canonical_name(self, name: str) -> str | None:
        """See Projector; the tower's head for classification is no part of it."""
        found = super().canonical_name(name)
        return None if found is None or "vision_model.head." in found else found
