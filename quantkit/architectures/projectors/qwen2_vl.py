"""The projectors of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from quantkit.architectures.base import Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import part

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _frame(i: int) -> Rearrange:
    """What the first convolution, over two frames, does to frame `i`."""

    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        if stored.ndim != 5 or stored.shape[2] != 2:
            raise ValueError
        return stored[:, :, i]

    return rearrange


# The convolution over two frames becomes one for each of them.
PATCHES = {
    "patch_embed.proj.weight": {
        "patch_embed.proj.weight": Transform(_frame(0), n_axes=4),
        "patch_embed.proj.weight.1": Transform(_frame(1), n_axes=4),
    }
}


class _QwenVlProjector(Projector):
    beginnings: ClassVar[tuple[str, ...]] = ("visual.",)
    pieces = {  # noqa: RUF012
        **PATCHES,
        **{
            f".qkv.{kind}": {f".{which}.{kind}": Transform(part(i, 3)) for i, which in enumerate("qkv")}
            for kind in ("weight", "bias")
        },
    }
    required: ClassVar[tuple[str, ...]] = (
        "v.patch_embd.weight", "v.patch_embd.weight.1", "v.post_ln.weight",
        "mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias",
    )  # fmt: skip

    @property
    def image_size(self) -> int:
        """A size that llama.cpp asks for; images of any are read."""
        return self.config.integer("image_size") or 560

    def write_kind(self, writer: GGUFWriter) -> None:
        """The epsilon, which is no part of the tower's config."""
        super().write_kind(writer)
        self.write_windows(writer)
        eps = self.root.number("rms_norm_eps")
        writer.add_vision_attention_layernorm_eps(1e-6 if eps is None else eps)

    def write_windows(self, writer: GGUFWriter) -> None:
        """Add which blocks see windows alone."""


class Qwen2VlProjector(_QwenVlProjector):
    """Qwen2VLForConditionalGeneration's."""

    kind = "qwen2vl_merger"
    checkpoints = {  # noqa: RUF012
        "Qwen2VLForConditionalGeneration": {"vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14,
        }}
    }  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int]:
        """`hidden_size` is the text model's, and what the reference says of the feed-forward blocks."""
        return self.config.require("embed_dim"), self.config.require("hidden_size")


class Qwen25VlProjector(_QwenVlProjector):
    """Qwen2_5_VLForConditionalGeneration's."""

    kind = "qwen2.5vl_merger"
    checkpoints = {  # noqa: RUF012
        "Qwen2_5_VLForConditionalGeneration": {"vision_config": {
            "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "fullatt_block_indexes": [7, 15, 23, 31],
        }}
    }  # fmt: skip

    def write_windows(self, writer: GGUFWriter) -> None:
        """See _QwenVlProjector. Raises QuantkitError where blocks that see all are not evenly apart."""
        name = "fullatt_block_indexes"
        whole = self.config.find(name)
        if not isinstance(whole, list) or not whole or not all(isinstance(i, int) and i >= 0 for i in whole):
            raise self.config.wrong((name,), whole, "a list of blocks")
        step = whole[0] + 1
        if whole != list(range(step - 1, step * len(whole), step)):
            raise self.config.wrong((name,), whole, "evenly apart")
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(step)
