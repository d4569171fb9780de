"""LFM2-VL's projector: SigLIP 2 without its head, and an MLP over shuffled patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.architectures.base import Transform
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import patches

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SIDE = 256  # what the reference writes; images of any size are read
_USUAL_LAYER = -1
_TOWER = "vision_tower."


class Lfm2VlProjector(Projector):
    """Lfm2VlForConditionalGeneration's."""

    kind = "lfm2"
    checkpoints = {  # noqa: RUF012
        "Lfm2VlForConditionalGeneration": {"vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "patch_size": 16, "layer_norm_eps": 1e-6,
        }}
    }  # fmt: skip
    beginnings = ("multi_modal_projector.", _TOWER)
    # Published files have a level more in the tower's names than transformers 5 saves.
    renames = {  # noqa: RUF012
        f"{_TOWER}{part}": f"{_TOWER}vision_model.{part}" for part in ("embeddings.", "encoder.", "post_layernorm.")
    }
    transforms = {"patch_embedding.weight": Transform(patches, n_axes=4)}  # noqa: RUF012
    required = (
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight", "v.post_ln.weight", "v.post_ln.bias",
        "mm.1.weight", "mm.1.bias", "mm.2.weight", "mm.2.bias",
    )  # fmt: skip

    @property
    def image_size(self) -> int:
        """See Projector."""
        return _SIDE

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, how many patches a side are shuffled into one, GELU, and the blocks that are run."""
        super().write_kind(writer)
        writer.add_vision_attention_layernorm_eps(self.config.required_number("layer_norm_eps"))
        writer.add_vision_projector_scale_factor(self.root.integer("downsample_factor") or 2)
        writer.add_vision_use_gelu(True)
        name, depth = "vision_feature_layer", self.depths["v"]
        found = self.root.find(name)
        layer = _USUAL_LAYER if found is None else found
        if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < 0:
            raise self.root.wrong((name,), found, f"one of the {depth} blocks, from the end")
        writer.add_vision_block_count(depth + 1 + layer)
