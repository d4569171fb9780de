"""Qwen2-MoE and Qwen1.5-MoE: Qwen2's attention, experts, and a block beside them with a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import EXPERT_FEED_FORWARD, SHARED, Field
from quantkit.architectures.products import Linear
from quantkit.architectures.qwen2 import Qwen2
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo


class Qwen2Moe(Qwen2):
    """Qwen2MoeForCausalLM."""

    gguf_name = "qwen2moe"
    checkpoints = {  # noqa: RUF012
        "Qwen2MoeForCausalLM": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "sliding_window": 0,
            "rope_theta": 10000.0,
        },
    }
    parameters = (
        *SHARED,
        EXPERT_FEED_FORWARD,
        Field("add_expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
    )
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    vocabulary = "bpe"
    notes = "experts beside a gated block"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen2's, with experts whose weights are not normalised, and a gated block beside them."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        sizes = model.expert_sizes()
        shared = model.integer("expert_shared_feed_forward_length", 0)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope),
                model.experts(
                    i,
                    sizes[i],
                    normalised=False,
                    scale=model.number("expert_weights_scale", 0.0) or 1.0,
                    shared=model.shared_experts(i, shared or model.feed_forward_sizes[i]),
                    shared_gate=Linear(f"blk.{i}.ffn_gate_inp_shexp.weight"),
                ),
            )
            for i in range(model.n_layer)
        )
