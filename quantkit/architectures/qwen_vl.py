"""Text models of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and of the Omnis: text has one position, where images have three."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import EXPERT_FEED_FORWARD, SHARED
from quantkit.architectures.qwen2 import Qwen2
from quantkit.architectures.qwen3 import Qwen3
from quantkit.architectures.qwen3_moe import Qwen3Moe
from quantkit.architectures.rearrangements import TRANSPOSED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_THINKER = {**Architecture.renames, "thinker.": ""}
_QWEN2 = Qwen2.checkpoints["Qwen2ForCausalLM"]
_QWEN3 = {**Qwen3.checkpoints["Qwen3ForCausalLM"], "max_position_embeddings": 128000, "rope_theta": 500000.0}
_MOE = {
    **Qwen3Moe.checkpoints["Qwen3MoeForCausalLM"],
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128000,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "rope_theta": 500000.0,
}

_ASR = Qwen3.checkpoints["Qwen3ForCausalLM"]
_OMNI = {
    **Qwen3Moe.checkpoints["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "rope_theta": 1000000.0,
}


def _write_deepstack(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many of the first layers take parts of images beside the text."""
    vision = Config(architecture.config.table("vision_config") or {}, architecture.config.path)
    layers: Any = vision.find("deepstack_visual_indexes")
    if layers is not None and not isinstance(layers, list):
        raise vision.wrong(("deepstack_visual_indexes",), layers, "a list")
    writer.add_num_deepstack_layers(len(layers or ()))


class Qwen2Vl(Qwen2):
    """The text model of Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration and Qwen2_5OmniModel."""

    gguf_name = "qwen2vl"
    wrappers = {  # noqa: RUF012
        "Qwen2VLForConditionalGeneration": {"qwen2_vl_text": _QWEN2, "qwen2_vl": _QWEN2},
        "Qwen2_5_VLForConditionalGeneration": {"qwen2_5_vl_text": _QWEN2, "qwen2_5_vl": _QWEN2},
        "Qwen2_5OmniModel": {"qwen2_5_omni_text": {
            **_QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
        }},
    }  # fmt: skip
    renames = _THINKER
    notes = "text part"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen2's: the three positions of a token of text are the same."""
        return Qwen2.forward_spec(metadata, tensors)


class Qwen3Vl(Qwen3):
    """The text model of Qwen3VLForConditionalGeneration."""

    gguf_name = "qwen3vl"
    wrappers = {"Qwen3VLForConditionalGeneration": {"qwen3_vl_text": _QWEN3}}  # noqa: RUF012
    parameters = (*SHARED, _write_deepstack)
    renames = _THINKER
    notes = "text part"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen3's: the three positions of a token of text are the same."""
        return Qwen3.forward_spec(metadata, tensors)


class Qwen3Asr(Qwen3Vl):
    """The text model of Qwen3ASRForConditionalGeneration."""

    wrappers = {"Qwen3ASRForConditionalGeneration": dict.fromkeys(("qwen3", "qwen3_asr_text"), _ASR)}  # noqa: RUF012
    vocabulary = "qwen3-asr"


class Qwen3VlMoe(Qwen3Moe):
    """The text model of Qwen3VLMoeForConditionalGeneration. Its experts are stacked with inputs as rows."""

    gguf_name = "qwen3vlmoe"
    wrappers = {"Qwen3VLMoeForConditionalGeneration": {"qwen3_vl_moe_text": _MOE}}  # noqa: RUF012
    parameters = (*SHARED, EXPERT_FEED_FORWARD, _write_deepstack)
    pieces = TRANSPOSED_EXPERTS
    renames = _THINKER
    notes = "text part; experts in 3-D tensors"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen3-MoE's: the three positions of a token of text are the same."""
        return Qwen3Moe.forward_spec(metadata, tensors)


class Qwen3OmniMoe(Qwen3VlMoe):
    """The text model of Qwen3OmniMoeForConditionalGeneration. Its experts come one by one."""

    wrappers = {"Qwen3OmniMoeForConditionalGeneration": {"qwen3_omni_moe_text": _OMNI}}  # noqa: RUF012
    vocabulary = "qwen3-omni"
    notes = "text part"
