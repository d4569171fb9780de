"""Mixtral: Mistral with experts in place of the MLP."""

from __future__ import annotations

from quantkit.architectures.experts import Stack
from quantkit.architectures.llama import Llama
from quantkit.architectures.parameters import MULTI_HEAD

MIXTRAL_EXPERTS = Stack(
    count=("num_local_experts", "num_experts"),
    part="model.layers.{layer}.block_sparse_moe.experts.{item}.{projection}.weight",
    merged="layers.{layer}.feed_forward.experts.{projection}.weight",
    projections=("w1", "w2", "w3"),
)


class Mixtral(Llama):
    """MixtralForCausalLM. llama.cpp takes it for a Llama with experts."""

    checkpoints = {  # noqa: RUF012
        "MixtralForCausalLM": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    }
    derived = MULTI_HEAD
    stacks = (MIXTRAL_EXPERTS,)
    notes = "experts in 3-D tensors"
