"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import EXPERT_FEED_FORWARD, SHARED
from quantkit.architectures.qwen3 import Qwen3
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM. Experts are stored one by one, or stacked with gate and up projections in one tensor."""

    gguf_name = "qwen3moe"
    checkpoints = {  # noqa: RUF012
        "Qwen3MoeForCausalLM": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        }
    }
    derived = {  # noqa: RUF012
        **Qwen3.derived,
        "num_local_experts": lambda config: config.integer("num_experts") or 128,
    }
    parameters = (*SHARED, EXPERT_FEED_FORWARD)
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    vocabulary = "bpe"
    notes = "experts in 3-D tensors"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen3's, with experts; llama.cpp always normalises their weights."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        sizes = model.expert_sizes()
        return model.spec(
            model.layer(i, model.attention(i, rope, **model.qk_norms(i)), model.experts(i, sizes[i]))
            for i in range(model.n_layer)
        )
