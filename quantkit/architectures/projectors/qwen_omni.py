"""The projectors of Qwen2.5-Omni and Qwen3-Omni, which see and hear, and of Qwen3-ASR, which hears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from quantkit.architectures.base import Assembly
from quantkit.architectures.config import Config
from quantkit.architectures.projectors.base import Projector
from quantkit.architectures.projectors.qwen2_vl import Qwen25VlProjector
from quantkit.architectures.projectors.qwen3_vl import Qwen3VlProjector
from quantkit.architectures.projectors.whisper import over_time, write_mel
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_POSITIONS = 1500  # of half a minute
_SLOWEST = 10000
_MAX_WIDTH = 1 << 13
_AUDIO = {
    "d_model": 1280, "encoder_ffn_dim": 5120, "encoder_layers": 32, "encoder_attention_heads": 20, "num_mel_bins": 128,
}  # fmt: skip
# Qwen3-Omni's names of the layers of mergers are those of Qwen2.5-VL.
_MERGERS = {".ln_q.": ".norm.", ".mlp.0.": ".linear_fc1.", ".mlp.2.": ".linear_fc2."}


def sinusoids(width: int) -> np.ndarray:
    """Whisper's positions [1500, width], float32: sines of ever slower frequencies, then cosines.

    Rounded correctly, which the reference's are not quite: their last bit depends on the machine.
    """
    half = width // 2
    step = np.float32(-np.log(_SLOWEST) / (half - 1)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(step.astype(np.float64)).astype(np.float32)
    angles = (np.arange(_POSITIONS, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class _OmniProjector(Projector):
    """What hears in these models: positions are computed, and the thinker has the encoders of all of its senses."""

    renames = {"thinker.": ""}  # noqa: RUF012
    transforms = {  # noqa: RUF012
        **{f"conv{i}.bias": over_time(2) for i in (1, 2)},
        **{f"conv2d{i}.bias": over_time(3) for i in (1, 2, 3)},
    }
    forced = {r"^a\.conv": GGMLType.F16}  # noqa: RUF012

    def opened(self, config: Config) -> Config:
        """See Projector."""
        return Config({**config.values, **(config.table("thinker_config") or {})}, config.path)

    def write_audio(self, writer: GGUFWriter, audio: Config) -> None:
        """See Projector."""
        super().write_audio(writer, audio)
        write_mel(writer, audio)

    def computed_tensors(self) -> Iterator[Assembly]:
        """The positions. See Architecture. Raises QuantkitError for a model that sees alone."""
        if self.audio is None:
            raise QuantkitError(f"{self.root.path}: it has no audio_config")
        width = self.audio.require("d_model")
        if width % 2 or not 2 < width <= _MAX_WIDTH:
            raise self.audio.wrong(("d_model",), width, f"an even number from 4 to {_MAX_WIDTH}")
        yield Assembly("a.position_embd.weight", values=sinusoids(width))


class Qwen25OmniProjector(_OmniProjector, Qwen25VlProjector):
    """Qwen2_5OmniModel's."""

    kind = "qwen2.5o"
    checkpoints = {  # noqa: RUF012
        "Qwen2_5OmniModel": {
            **Qwen25VlProjector.checkpoints["Qwen2_5_VLForConditionalGeneration"], "audio_config": _AUDIO
        }
    }  # fmt: skip
    beginnings = ("visual.", "audio_tower.")
    skipped_beginnings = ("audio_tower.audio_bos_eos_token.",)  # transformers does not use it either
    required = (
        *Qwen25VlProjector.required, "a.conv1d.1.weight", "a.conv1d.1.bias", "a.conv1d.2.weight", "a.conv1d.2.bias",
        "a.post_ln.weight", "a.post_ln.bias", "mm.a.fc.weight", "mm.a.fc.bias",
    )  # fmt: skip


class _Qwen3Hearing(_OmniProjector):
    # As transformers saves Qwen3-ASR.
    renames = {  # noqa: RUF012
        **_OmniProjector.renames,
        **{f"multi_modal_projector.linear_{i}.": f"audio_tower.proj{i}." for i in (1, 2)},
    }
    beginnings: ClassVar[tuple[str, ...]] = ("audio_tower.",)
    required: ClassVar[tuple[str, ...]] = (
        *(f"a.conv2d.{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")), "a.conv_out.weight",
        "a.post_ln.weight", "a.post_ln.bias", "mm.a.mlp.1.weight", "mm.a.mlp.1.bias", "mm.a.mlp.2.weight",
        "mm.a.mlp.2.bias",
    )  # fmt: skip

    def write_kind(self, writer: GGUFWriter) -> None:
        """See Projector."""
        writer.add_clip_audio_projector_type("qwen3a")


class Qwen3AsrProjector(_Qwen3Hearing):
    """Qwen3ASRForConditionalGeneration's, with the names of its first repositories and with transformers'."""

    kind = "qwen3a"
    checkpoints = {  # noqa: RUF012
        "Qwen3ASRForConditionalGeneration": {
            "audio_config": {
                **_AUDIO, "d_model": 1024, "encoder_ffn_dim": 4096, "encoder_layers": 24,
                "encoder_attention_heads": 16,
            }
        }
    }  # fmt: skip


class Qwen3OmniProjector(_Qwen3Hearing, Qwen3VlProjector):
    """Qwen3OmniMoeForConditionalGeneration's."""

    checkpoints = {  # noqa: RUF012
        "Qwen3OmniMoeForConditionalGeneration": {
            **Qwen3VlProjector.checkpoints["Qwen3VLForConditionalGeneration"], "audio_config": _AUDIO
        }
    }  # fmt: skip
    beginnings = ("visual.", "audio_tower.")
    required = (*Qwen3VlProjector.required, *_Qwen3Hearing.required)

    def canonical_name(self, name: str) -> str | None:
        """See Projector."""
        found = super().canonical_name(name)
        if found is None or not found.startswith(("visual.merger.", "visual.merger_list.")):
            return found
        for part, instead in _MERGERS.items():
            found = found.replace(part, instead)
        return found.replace("visual.merger_list.", "visual.deepstack_merger_list.")

    def write_kind(self, writer: GGUFWriter) -> None:
        """What Qwen3-VL has, and the types of two projectors."""
        self.write_sight(writer)
        writer.add_clip_vision_projector_type(Qwen3VlProjector.kind)
        super().write_kind(writer)
