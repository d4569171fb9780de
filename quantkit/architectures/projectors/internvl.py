"""InternVL's projector: InternViT, and an MLP over shuffled patches."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import part

if TYPE_CHECKING:
    from gguf import GGUFWriter


class InternVlProjector(Projector):
    """InternVLChatModel's, as its repositories publish it with code of their own."""

    kind = "internvl"
    checkpoints = {"InternVLChatModel": {"vision_config": {}}}  # noqa: RUF012
    beginnings = ("vision_tower.", "mlp1.")
    renames = {"vision_model.": "vision_tower.vision_model."}  # noqa: RUF012
    pieces = {  # noqa: RUF012
        f".attn.qkv.{kind}": {f".self_attn.{which}_proj.{kind}": Transform(part(i, 3)) for i, which in enumerate("qkv")}
        for kind in ("weight", "bias")
    }
    required = (
        "v.patch_embd.weight", "v.patch_embd.bias", "v.class_embd", "v.position_embd.weight",
        "mm.model.mlp.0.weight", "mm.model.mlp.1.weight", "mm.model.mlp.3.weight",
    )  # fmt: skip

    @cached_property
    def text(self) -> Config:
        """The text model's hyper-parameters, under a name of their own."""
        return Config(self.root.table("llm_config", "text_config") or {}, self.root.path)

    def complete(self, config: Config) -> Config:
        """Sizes that are given for both directions, which are the same."""
        both = {name: config.find(name) for name in ("image_size", "patch_size")}
        return (
            super()
            .complete(config)
            .changed(**{name: size[0] for name, size in both.items() if isinstance(size, list) and size})
        )

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        bare = name.endswith((".ls1", ".ls2", "position_embedding"))
        return super().gguf_tensor_name(f"{name}.weight" if bare else name)

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, the activation, how many patches a side are shuffled into one, and how images are cut."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("layer_norm_eps"))
        self.write_activation(writer)
        ratio = self.root.required_number("downsample_ratio")
        if not 0 < ratio <= 1:
            raise self.root.wrong(("downsample_ratio",), ratio, "above 0, at most 1")
        writer.add_vision_projector_scale_factor(int(1.0 / ratio))
        if fewest := self.root.integer("min_dynamic_patch"):
            writer.add_vision_preproc_min_tiles(fewest)
        if most := self.root.integer("max_dynamic_patch"):
            writer.add_vision_preproc_max_tiles(most)
