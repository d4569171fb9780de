"""Llama 4's projector: patches shuffled into fewer, wider ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.architectures.projectors.base import Projector

if TYPE_CHECKING:
    from gguf import GGUFWriter


class Llama4Projector(Projector):
    """Llama4ForConditionalGeneration's."""

    kind = "llama4"
    checkpoints = {  # noqa: RUF012
        "Llama4ForConditionalGeneration": {"vision_config": {
            "hidden_size": 768, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16,
            "image_size": 448, "patch_size": 14, "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5, "hidden_act": "gelu",
        }}
    }  # fmt: skip
    beginnings = ("multi_modal_projector.", "vision_model.")
    renames = {"model.vision_model.": "vision_model."}  # noqa: RUF012
    required = (
        "v.patch_embd.weight", "v.class_embd", "v.position_embd.weight", "v.pre_ln.weight", "v.post_ln.weight",
        "mm.model.mlp.1.weight", "mm.model.mlp.2.weight", "mm.model.fc.weight",
    )  # fmt: skip

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        if name == "multi_modal_projector.linear_1.weight":
            return "mm.model.fc.weight"
        whole = f"{name}.weight" if name.endswith("positional_embedding_vlm") else name
        return super().gguf_tensor_name(whole)

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, how many patches a side are shuffled into one, and GELU."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("norm_eps"))
        ratio = self.config.required_number("pixel_shuffle_ratio")
        if not 0 < ratio <= 1:
            raise self.config.wrong(("pixel_shuffle_ratio",), ratio, "above 0, at most 1")
        writer.add_vision_projector_scale_factor(int(1.0 / ratio))
        if (activation := self.config.find("hidden_act")) != "gelu":
            raise self.config.wrong(("hidden_act",), activation, "gelu")
        writer.add_vision_use_gelu(True)
