"""The projector of Idefics 3 and SmolVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.architectures.projectors.base import Projector
from quantkit.blocks.types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {"vision_config": {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6,
}}  # fmt: skip


class SmolVlmProjector(Projector):
    """Idefics3ForConditionalGeneration's and SmolVLMForConditionalGeneration's."""

    kind = "idefics3"
    checkpoints = {  # noqa: RUF012
        "Idefics3ForConditionalGeneration": _DEFAULTS,
        "SmolVLMForConditionalGeneration": _DEFAULTS,
    }
    beginnings = ("model.vision_model.", "model.connector.")
    required = (
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight", "v.post_ln.weight", "v.post_ln.bias",
        "mm.model.fc.weight",
    )  # fmt: skip
    forced = {"patch_embd": GGMLType.F32}  # noqa: RUF012

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, how many patches are shuffled into one, GELU, and the longest edge of an image."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("layer_norm_eps"))
        writer.add_vision_projector_scale_factor(self.root.integer("scale_factor") or 2)
        writer.add_vision_use_gelu(True)
        size = self.preprocessor.table("size") or {}
        edge = self.preprocessor.changed(longest_edge=size.get("longest_edge", self.image_size))
        writer.add_vision_preproc_image_size(edge.require("longest_edge"))
