"""Mistral 3: Mistral's layers; Ministral 3 adds YaRN and scores that grow with the position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import RopeStyle, Temperature, Yarn
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

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

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with YaRN's own parameters and queries that grow with their position."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        if rope.yarn is not None:
            yarn = Yarn(
                beta_fast=model.number("rope.scaling.yarn_beta_fast", rope.yarn.beta_fast),
                beta_slow=model.number("rope.scaling.yarn_beta_slow", rope.yarn.beta_slow),
            )
            all_dims = model.number("rope.scaling.yarn_log_multiplier", 0.0)
            shrinking = 1.0 + 0.1 * all_dims * max(0.0, -math.log(rope.freq_scale))
            if shrinking <= 0.0:
                raise QuantkitError(
                    f"the metadata's mistral3.rope.scaling.yarn_log_multiplier is {all_dims}, too small"
                )
            rope = replace(rope, yarn=yarn, magnitude=rope.magnitude / shrinking)
        scale = model.number("attention.temperature_scale", 0.0)
        growth = Temperature(scale, rope.n_ctx_orig) if scale else None
        experts = model.integer("expert_count", 0) > 0
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, scale=model.scale, temperature=growth),
                model.experts(i) if experts else model.feed_forward(i),
            )
            for i in range(model.n_layer)
        )
