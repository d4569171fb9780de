"""The projectors of LLaVA 1.5 and 1.6 (LLaVA-NeXT): CLIP, one of its last layers, and an MLP.

llama.cpp's converter does not know them; its older scripts do (tools/mtmd/legacy-models), and these write the same
tensors and the same `clip.` keys.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CLIP = {"vision_config": {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 512, "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}}  # fmt: skip
_USUAL_LAYER = -2
_MAX_POINTS = 1024
_TOWER = "vision_tower.vision_model."
_LAYERS = f"{_TOWER}encoder.layers."
# What llama.cpp takes for granted of the projector and the choice of outputs.
_GRANTED = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}


class LlavaProjector(Projector):
    """LlavaForConditionalGeneration's and LlavaNextForConditionalGeneration's, where the tower is CLIP.

    Blocks after the last one whose output is projected are left out, and so is the norm after them.
    """

    kind = "mlp"
    towers = ("clip_vision_model",)
    checkpoints = {  # noqa: RUF012
        "LlavaForConditionalGeneration": _CLIP,
        "LlavaNextForConditionalGeneration": _CLIP,
    }
    beginnings = ("multi_modal_projector.", _TOWER, "image_newline")
    # Published files have a level more in the tower's names than transformers 5 saves.
    renames = {  # noqa: RUF012
        "model.image_newline": "image_newline",
        **{f"vision_tower.{part}": f"{_TOWER}{part}" for part in ("embeddings.", "encoder.", "pre_layrnorm.")},
    }
    skipped = (*Projector.skipped, "embeddings.position_ids")
    required = (
        "v.class_embd", "v.patch_embd.weight", "v.position_embd.weight", "v.pre_ln.weight", "v.pre_ln.bias",
        "mm.0.weight", "mm.2.weight",
    )  # fmt: skip

    @cached_property
    def feature_layers(self) -> list[int]:
        """The states that are projected: each is what that many blocks make."""
        name, depth = "vision_feature_layer", super().depths["v"]
        found = self.root.find(name)
        layers = [_USUAL_LAYER] if found is None else found if isinstance(found, list) else [found]
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
        if not layers or not whole or len(layers) > depth or not all(-depth <= i <= depth for i in layers):
            raise self.root.wrong((name,), found, f"one of the states of {depth} blocks")
        states = [i if i >= 0 else depth + 1 + i for i in layers]
        if not max(states):
            raise self.root.wrong((name,), found, "what a block makes")
        return states

    @cached_property
    def depths(self) -> dict[str, int]:
        """See Projector: the blocks that are needed."""
        return {"v": max(self.feature_layers)}

    def canonical_name(self, name: str) -> str | None:
        """See Projector."""
        found = super().canonical_name(name)
        if found is None or found.startswith(f"{_TOWER}post_layernorm."):
            return None
        if found.startswith(_LAYERS):
            number = found.removeprefix(_LAYERS).partition(".")[0]
            if number.isdecimal() and len(number) < 10 and int(number) >= self.depths["v"]:
                return None
        return found

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture. What widens is called `down` in files of LLaVA, and llama.cpp knows that."""
        if name == "image_newline":
            return f"model.{name}"
        for i, layer in ((0, "linear_1"), (2, "linear_2")):
            if name in (f"multi_modal_projector.{layer}.{kind}" for kind in ("weight", "bias")):
                return f"mm.{i}.{name.rpartition('.')[2]}"
        found = super().gguf_tensor_name(name)
        for before, after in ((".ffn_up.", ".ffn_down."), (".ffn_down.", ".ffn_up.")):
            if before in found:
                return found.replace(before, after)
        return found

    def forced_type(self, name: str, file_type: GGMLType) -> GGMLType | None:
        """See Projector."""
        if name == "v.patch_embd.weight" or (name.startswith("mm.") and file_type == GGMLType.F32):
            return GGMLType.F16
        return GGMLType.F32 if name == "v.position_embd.weight" and file_type != GGMLType.F16 else None

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """Add the keys of LLaVA's files, in the order of the scripts. Raises QuantkitError for other projectors."""
        for name, wanted in _GRANTED.items():
            if (found := self.root.find(name)) not in (wanted, None):
                raise self.root.wrong((name,), found, wanted)
        vision = self.config
        activation = vision.find("hidden_act")
        if activation not in ("gelu", "quick_gelu"):
            raise vision.wrong(("hidden_act",), activation, "gelu or quick_gelu")
        writer.add_bool("clip.has_text_encoder", False)
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_file_type(file_type)
        self.write_kind(writer)
        writer.add_vision_image_size(self.image_size)
        writer.add_vision_patch_size(vision.require("patch_size"))
        width, wide = self.sizes
        writer.add_vision_embedding_length(width)
        writer.add_vision_feed_forward_length(wide)
        writer.add_vision_projection_dim(vision.require("projection_dim"))
        writer.add_vision_head_count(vision.require("num_attention_heads"))
        writer.add_vision_attention_layernorm_eps(vision.required_number("layer_norm_eps"))
        writer.add_vision_block_count(self.depths["v"])
        if points := self.grid_points():
            writer.add_array("clip.vision.image_grid_pinpoints", points)
            writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_array("clip.vision.feature_layer", self.feature_layers)
        writer.add_vision_image_mean(self._channels("image_mean"))
        writer.add_vision_image_std(self._channels("image_std"))
        writer.add_vision_use_gelu(activation == "gelu")

    def grid_points(self) -> list[int]:
        """The sizes that LLaVA 1.6 brings an image to, both sides of each below each other; LLaVA 1.5 has none."""
        name = "image_grid_pinpoints"
        found = self.root.find(name)
        if found is None:
            return []
        if not isinstance(found, list) or not 0 < len(found) <= _MAX_POINTS:
            raise self.root.wrong((name,), found, f"a list of at most {_MAX_POINTS} sizes")
        pairs = [Config({name: side}, self.root.path) for pair in found for side in _pair(self.root, pair)]
        return [side.require(name) for side in pairs]


def _pair(config: Config, value: object) -> list[object]:
    """Both sides of a size."""
    if not isinstance(value, list) or len(value) != 2:
        raise QuantkitError(f"{config.path}: image_grid_pinpoints has {str(value)[:80]!r}, not two sides")
    return value
