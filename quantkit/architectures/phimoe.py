"""Phi-3.5-MoE: Phi-3's layers with LayerNorms and biases, separate projections, and experts."""

from __future__ import annotations

from quantkit.architectures.mixtral import MIXTRAL_EXPERTS
from quantkit.architectures.parameters import EXPERTS, EXPERTS_USED
from quantkit.architectures.phi3 import Phi3


class PhiMoe(Phi3):
    """PhiMoEForCausalLM, as its checkpoints call it, and PhimoeForCausalLM, as transformers does."""

    gguf_name = "phimoe"
    checkpoints = {  # noqa: RUF012
        "PhiMoEForCausalLM": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "rope_theta": 1000000.0,
        },
        "PhimoeForCausalLM": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "rope_theta": 1000000.0,
        },
    }
    parameters = (*Phi3.parameters, EXPERTS_USED, EXPERTS)
    stacks = (MIXTRAL_EXPERTS,)
    notes = "experts, LayerNorms, LongRoPE"
