"""The projector of Qwen3-VL and Qwen3.5, dense and MoE."""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.projectors.qwen2_vl import PATCHES
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {"vision_config": {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "spatial_merge_size": 2, "deepstack_visual_indexes": [8, 16, 24],
}}  # fmt: skip
# Qwen3.5 gives nothing to text layers.
_SHALLOW = {"vision_config": {**_DEFAULTS["vision_config"], "deepstack_visual_indexes": []}}
# The merger after the last block, as the layers of llama.cpp's projector, and those that text layers are given.
_MERGER = {"linear_fc1": "mm.0", "linear_fc2": "mm.2", "norm": "v.post_ln"}
_DEEP = re.compile(r"visual\.deepstack_merger_list\.(\d{1,4})\.(norm|linear_fc1|linear_fc2)\.(weight|bias)")


class Qwen3VlProjector(Projector):
    """Qwen3VLForConditionalGeneration's and Qwen3_5ForConditionalGeneration's, and those of both with experts."""

    kind = "qwen3vl_merger"
    checkpoints = {  # noqa: RUF012
        "Qwen3VLForConditionalGeneration": _DEFAULTS,
        "Qwen3VLMoeForConditionalGeneration": _DEFAULTS,
        "Qwen3_5ForConditionalGeneration": _SHALLOW,
        "Qwen3_5MoeForConditionalGeneration": _SHALLOW,
    }
    beginnings: ClassVar[tuple[str, ...]] = ("visual.",)
    pieces = PATCHES
    required: ClassVar[tuple[str, ...]] = (
        "v.patch_embd.weight", "v.patch_embd.weight.1", "v.patch_embd.bias", "v.position_embd.weight",
        "v.post_ln.weight", "mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias",
    )  # fmt: skip

    @cached_property
    def deep(self) -> list[int]:
        """The blocks whose outputs are given to text layers."""
        name = "deepstack_visual_indexes"
        blocks = self.config.find(name)
        if not isinstance(blocks, list) or not all(isinstance(i, int) and 0 <= i < self.depths["v"] for i in blocks):
            raise self.config.wrong((name,), blocks, "a list of blocks")
        return blocks

    @property
    def image_size(self) -> int:
        """The side of the grid of positions, in pixels."""
        size = self.config.integer("image_size")
        return size or int(
            math.sqrt(self.config.require("num_position_embeddings")) * self.config.require("patch_size")
        )

    def write_kind(self, writer: GGUFWriter) -> None:
        """GELU, how many patches are merged, the text model's epsilon, and the blocks that text layers are given."""
        super().write_kind(writer)
        self.write_sight(writer)

    def write_sight(self, writer: GGUFWriter) -> None:
        """Add what of these the encoder of images has."""
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(self.config.require("spatial_merge_size"))
        eps = self.text.number("rms_norm_eps")
        writer.add_vision_attention_layernorm_eps(1e-6 if eps is None else eps)
        writer.add_vision_is_deepstack_layers([i in self.deep for i in range(self.depths["v"])])

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        if name.startswith("visual.merger."):
            part, _, kind = name.removeprefix("visual.merger.").partition(".")
            if part in _MERGER:
                return f"{_MERGER[part]}.{kind}"
        if match := _DEEP.fullmatch(name):
            number = int(match[1])
            if number >= len(self.deep):
                raise QuantkitError(
                    f"{self.root.path}: deepstack_visual_indexes has {len(self.deep)} blocks, and there is {name}"
                )
            return f"v.deepstack.{self.deep[number]}.{match[2].removeprefix('linear_')}.{match[3]}"
        return super().gguf_tensor_name(name)
