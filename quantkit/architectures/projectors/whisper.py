"""Projectors of models that hear with Whisper's encoder: Qwen2-Audio, Ultravox, Voxtral and Audio Flamingo 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from gguf import GGUFWriter

USUAL_EPSILON = 1e-5  # of torch's LayerNorm, which configs of these encoders do not name
# Whisper's large encoder, which configs need not describe.
_LARGE = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "num_mel_bins": 128,
}  # fmt: skip
_VOXTRAL_STACK = 4  # the encoder's feed-forward length by its width, which VoxtralConfig takes for granted


def over_time(n_axes: int) -> Transform:
    """A convolution's bias, with an axis of one for each that its outputs have after the channels."""

    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(-1, *(1,) * (n_axes - 1))

    return Transform(rearrange, n_axes=n_axes)


def write_mel(writer: GGUFWriter, audio: Config) -> None:
    """Add the number of bands of a spectrogram, and the epsilon of the encoder's norms."""
    writer.add_audio_num_mel_bins(audio.require("num_mel_bins"))
    eps = audio.number("layer_norm_eps")
    writer.add_audio_attention_layernorm_eps(USUAL_EPSILON if eps is None else eps)


class _WhisperProjector(Projector):
    beginnings = ("audio_tower.", "audio.multi_modal_projector.")
    # llama.cpp keeps what maps sound apart from what maps images.
    renames = {"multi_modal_projector.": "audio.multi_modal_projector."}  # noqa: RUF012
    transforms = {"conv1.bias": over_time(2), "conv2.bias": over_time(2)}  # noqa: RUF012
    encoder = (
        "a.conv1d.1.weight", "a.conv1d.1.bias", "a.conv1d.2.weight", "a.conv1d.2.bias", "a.position_embd.weight",
        "a.post_ln.weight", "a.post_ln.bias",
    )  # fmt: skip
    forced = {r"^a\.conv": GGMLType.F16}  # noqa: RUF012

    def write_kind(self, writer: GGUFWriter) -> None:
        """The bands of a spectrogram, and the epsilon."""
        super().write_kind(writer)
        assert self.audio is not None
        write_mel(writer, self.audio)
        if (stack := self.stack()) is not None:
            writer.add_audio_stack_factor(stack)

    def stack(self) -> int | None:
        """How many outputs of the encoder, one after the other, become one of the projector's inputs."""
        return None


class Qwen2AudioProjector(_WhisperProjector):
    """Qwen2AudioForConditionalGeneration's."""

    kind = "qwen2a"
    checkpoints = {  # noqa: RUF012
        "Qwen2AudioForConditionalGeneration": {"audio_config": {
            "d_model": 1280, "encoder_ffn_dim": 5120, "encoder_layers": 32, "encoder_attention_heads": 20,
            "num_mel_bins": 128,
        }}
    }  # fmt: skip
    required = (*_WhisperProjector.encoder, "mm.a.fc.weight", "mm.a.fc.bias")


class UltravoxProjector(_WhisperProjector):
    """UltravoxModel's, as its repositories publish it with code of their own.

    Some of them hold the projector alone, and name Whisper's repository for the rest: there the encoder is missing.
    """

    kind = "ultravox"
    checkpoints = {"UltravoxModel": {"audio_config": {}}}  # noqa: RUF012
    required = (
        *_WhisperProjector.encoder, "mm.a.norm_pre.weight", "mm.a.mlp.1.weight", "mm.a.norm_mid.weight",
        "mm.a.mlp.2.weight",
    )  # fmt: skip

    def stack(self) -> int:
        """See _WhisperProjector."""
        return self.root.require("stack_factor")


class VoxtralProjector(_WhisperProjector):
    """VoxtralForConditionalGeneration's."""

    kind = "voxtral"
    checkpoints = {"VoxtralForConditionalGeneration": {"audio_config": _LARGE}}  # noqa: RUF012
    required = (*_WhisperProjector.encoder, "mm.a.mlp.1.weight", "mm.a.mlp.2.weight")

    def stack(self) -> int:
        """See _WhisperProjector. Raises QuantkitError for sizes that do not stack as the reference says they do."""
        width, wide = self.config.require("hidden_size"), self.config.require("intermediate_size")
        if wide != _VOXTRAL_STACK * width:
            raise QuantkitError(
                f"{self.root.path}: intermediate_size is {wide}, not {_VOXTRAL_STACK} times hidden_size ({width})"
            )
        return _VOXTRAL_STACK


class AudioFlamingo3Projector(_WhisperProjector):
    """AudioFlamingo3ForConditionalGeneration's. Its convolutions stay in the range of bfloat16."""

    kind = "musicflamingo"
    checkpoints = {"AudioFlamingo3ForConditionalGeneration": {"audio_config": _LARGE}}  # noqa: RUF012
    required = (
        *_WhisperProjector.encoder, "mm.a.mlp.1.weight", "mm.a.mlp.1.bias", "mm.a.mlp.2.weight", "mm.a.mlp.2.bias",
    )  # fmt: skip
    forced = {r"^a\.conv": GGMLType.F32}  # noqa: RUF012
