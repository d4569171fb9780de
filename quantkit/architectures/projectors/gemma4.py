"""Gemma 4's projector: what sees, and in the smaller models what hears."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.rearrangements import kernel, patches
from quantkit.blocks.types import GGMLType

if TYPE_CHECKING:
    from gguf import GGUFWriter

_UNUSED_SIZE = 224  # llama.cpp asks for the side of an image, and reads images of any
_EPSILON = 1e-6
# What the numbers that go into and come out of a matrix are clipped to: a number each, beside its weights.
_LIMITS = (".input_max", ".input_min", ".output_max", ".output_min")


def _softplus(rows: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), rounded correctly, which the reference's is not quite: that depends on the machine."""
    found: np.ndarray = np.logaddexp(0, rows.astype(np.float64)).astype(rows.dtype)
    return found


class Gemma4Projector(Projector):
    """Gemma4ForConditionalGeneration's."""

    kind = "gemma4v"
    audio_kind = "gemma4a"
    checkpoints = {  # noqa: RUF012
        "Gemma4ForConditionalGeneration": {
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                "patch_size": 16,
            },
            "audio_config": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8},
        }
    }  # fmt: skip
    beginnings: ClassVar[tuple[str, ...]] = (
        "vision_model.model.",
        "vision_tower.",
        "conformer.",
        "embed_vision.",
        "embed_audio.",
    )
    renames = {  # noqa: RUF012
        "model.embed_": "embed_",
        "vision_tower.encoder.": "vision_model.model.",
        "audio_tower.": "conformer.",
        # Matrices whose inputs and outputs are clipped are a level deeper.
        ".linear.": ".",
    }
    transforms = {  # noqa: RUF012
        "patch_embedder.input_proj.weight": Transform(patches, n_axes=4),
        "lconv1d.depthwise_conv1d.weight": Transform(kernel, n_axes=2),
        ".per_dim_scale": Transform(arithmetic=_softplus),
        **{limit: Transform(lambda _config, stored: stored.reshape(1)) for limit in _LIMITS},
    }
    forced = {r"^a\.(conv1d|input_projection)\.|\.conv_dw\.": GGMLType.F32}  # noqa: RUF012
    required: ClassVar[tuple[str, ...]] = (
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
            writer.add_clip_audio_projector_type(self.audio_kind)
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


# Unified: nothing but a matrix, norms and positions before the text model.
_UNIFIED = {
    "patch_dense.": "v.patch_embd.", "patch_ln1.": "v.patch_norm.1.", "patch_ln2.": "v.patch_norm.2.",
    "pos_norm.": "v.patch_norm.3.",
}  # fmt: skip
_MAX_PATCH = 512


def _side(config: Config) -> int:
    """The side in pixels of what becomes one token."""
    side = config.integer("model_patch_size") or config.require("patch_size") * config.require("pooling_kernel_size")
    if side > _MAX_PATCH:
        raise config.wrong(("patch_size",), side, f"at most {_MAX_PATCH} pixels a token")
    return side


def _by_colour(config: Config) -> np.ndarray:
    """Columns in the order of llama.cpp's patches, all pixels in one colour first; they are stored pixel by pixel."""
    side = _side(config)
    order: np.ndarray = np.arange(side * side * 3).reshape(side * side, 3).T.reshape(-1)
    return order


class Gemma4UnifiedProjector(Gemma4Projector):
    """Gemma4UnifiedForConditionalGeneration's, which has no encoders: patches and samples go into the text model."""

    kind = "gemma4uv"
    audio_kind = "gemma4ua"
    checkpoints = {  # noqa: RUF012
        "Gemma4UnifiedForConditionalGeneration": {
            "vision_config": {"patch_size": 16, "pooling_kernel_size": 3, "mm_embed_dim": 3840},
            "audio_config": {"audio_embed_dim": 640},
        }
    }
    beginnings = ("vision_embedder.", "embed_vision.", "embed_audio.")
    renames = {"model.embed_": "embed_", "model.vision_embedder.": "vision_embedder."}  # noqa: RUF012
    transforms = {  # noqa: RUF012
        "pos_embedding": Transform(lambda _config, stored: np.swapaxes(stored, 0, 1)),
        "patch_dense.weight": Transform(columns=_by_colour),
        **{f"patch_ln1.{kind}": Transform(columns=_by_colour) for kind in ("weight", "bias")},
    }
    forced = {}  # noqa: RUF012
    required = (
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight", "mm.input_projection.weight",
        *(f"v.patch_norm.{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")), "mm.a.input_projection.weight",
    )  # fmt: skip

    @property
    def depths(self) -> dict[str, int]:  # type: ignore[override]
        """See Projector: there are no blocks."""
        return {letter: 0 for letter, encoder in (("v", self.vision), ("a", self.audio)) if encoder}

    @property
    def sizes(self) -> tuple[int, int]:
        """See Projector."""
        return self.config.require("mm_embed_dim"), 0

    def n_heads(self, encoder: Config) -> int:
        """See Projector: there are none."""
        return 0

    def write_audio(self, writer: GGUFWriter, audio: Config) -> None:
        """See Projector: what there is of it is as wide as the samples of a token are many."""
        writer.add_clip_has_audio_encoder(True)
        writer.add_audio_projection_dim(self.text.require("hidden_size"))
        writer.add_audio_embedding_length(audio.require("audio_embed_dim"))
        for add in (writer.add_audio_feed_forward_length, writer.add_audio_block_count, writer.add_audio_head_count):
            add(0)

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture."""
        inner = name.removeprefix("vision_embedder.")
        if inner == "pos_embedding":
            return "v.position_embd.weight"
        for part, instead in _UNIFIED.items():
            if inner in (f"{part}weight", f"{part}bias"):
                return inner.replace(part, instead)
        return super().gguf_tensor_name(name)
