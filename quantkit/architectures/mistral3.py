"""Mistral 3: Mistral's layers; Ministral 3 adds YaRN and scores that grow with the position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.llama import Llama

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _temperature(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    if architecture.config.find("model_type") == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(architecture.rope.required("mscale_all_dim"))
        writer.add_attn_temperature_scale(architecture.rope.required("llama_4_scaling_beta"))


_MINISTRAL = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}


class Mistral3(Llama):
    """Ministral3ForCausalLM, and the text model of Mistral3ForConditionalGeneration."""

    gguf_name = "mistral3"
    checkpoints = {"Ministral3ForCausalLM": _MINISTRAL}  # noqa: RUF012
    wrappers = {  # noqa: RUF012
        "Mistral3ForConditionalGeneration": {
            "mistral": Llama.checkpoints["MistralForCausalLM"],
            "ministral3": _MINISTRAL,
        }
    }
    parameters = (*Llama.parameters, _temperature)
    notes = "text part"
