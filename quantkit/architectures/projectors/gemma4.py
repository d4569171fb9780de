"""Gemma 4's projector: what sees, and in the smaller models what hears."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import kernel
from quantkit.blocks.types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter

_UNUSED_SIZE = 224  # llama.cpp asks for the side of an image, and reads images of any
_EPSILON = 1e-6
# What the numbers that go into and come out of a matrix are clipped to: a number each, beside its weights.
_LIMITS = (".input_max", ".input_min", ".output_max", ".output_min")


def _patches(_config: Config, stored: np.ndarray) -> np.ndarray:
    """The first matrix, over the pixels of a patch and the colours of each, as a convolution over both directions."""
    side = math.isqrt(stored.shape[1] // 3)
    return np.moveaxis(stored.reshape(stored.shape[0], side, side, 3), 3, 1)


def _softplus(rows: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), rounded correctly, which the reference's is not quite: that depends on the machine."""
    found: np.ndarray = np.logaddexp(0, rows.astype(np.float64)).astype(rows.dtype)
    return found


class Gemma4Projector(Projector):
    """Gemma4ForConditionalGeneration's."""

    kind = "gemma4v"
    checkpoints = {  # noqa: RUF012
        "Gemma4ForConditionalGeneration": {
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                "patch_size": 16,
            },
            "audio_config": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8},
        }
    }  # fmt: skip
    beginnings = ("vision_model.model.", "vision_tower.", "conformer.", "embed_vision.", "embed_audio.")
    renames = {  # noqa: RUF012
        "model.embed_": "embed_",
        "vision_tower.encoder.": "vision_model.model.",
        "audio_tower.": "conformer.",
        # Matrices whose inputs and outputs are clipped are a level deeper.
        ".linear.": ".",
    }
    transforms = {  # noqa: RUF012
        "patch_embedder.input_proj.weight": Transform(_patches, n_axes=4),
        "lconv1d.depthwise_conv1d.weight": Transform(kernel, n_axes=2),
        ".per_dim_scale": Transform(arithmetic=_softplus),
        **{limit: Transform(lambda _config, stored: stored.reshape(1)) for limit in _LIMITS},
    }
    forced = {r"^a\.(conv1d|input_projection)\.|\.conv_dw\.": GGMLType.F32}  # noqa: RUF012
    required = (
        "v.patch_embd.weight", "v.position_embd.weight", "mm.input_projection.weight", "a.conv1d.0.weight",
        "a.conv1d.1.weight", "a.input_projection.weight", "mm.a.input_projection.weight",
    )  # fmt: skip

    @property
    def image_size(self) -> int:
        """See Projector."""
        return _UNUSED_SIZE

    def write_audio(self, writer: GGUFWriter, audio: Config) -> None:
        """See Projector: the feed-forward blocks are four times as wide as the encoder."""
        super().write_audio(writer, audio.changed(intermediate_size=4 * audio.require("hidden_size")))

    def write_kind(self, writer: GGUFWriter) -> None:
        """The types of the projectors, the epsilons, and the bands of a spectrogram."""
        writer.add_clip_vision_projector_type(self.kind)
        eps = self.config.number("layer_norm_eps")
        writer.add_vision_attention_layernorm_eps(_EPSILON if eps is None else eps)
        if self.audio is not None:
            writer.add_clip_audio_projector_type("gemma4a")
            writer.add_audio_num_mel_bins(self.audio.integer("input_feat_size") or 128)
            eps = self.audio.number("layer_norm_eps")
            writer.add_audio_attention_layernorm_eps(_EPSILON if eps is None else eps)

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        if name.endswith(_LIMITS):
            stem, _, limit = name.rpartition(".")
            return super().gguf_tensor_name(f"{stem}.weight").removesuffix("weight") + limit
        if name.startswith("embed_") or name.startswith("vision_tower."):
            name = f"model.{name}"
        bare = name.endswith(("layer_scalar", "position_embedding_table", "per_dim_scale"))
        return super().gguf_tensor_name(f"{name}.weight" if bare else name)
