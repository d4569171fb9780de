"""dots.llm1: Qwen3's attention; after the first layers experts with a biased choice, beside a shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    EXPERT_FEED_FORWARD,
    EXPERT_NORM,
    EXPERT_SCALE,
    LEADING_DENSE,
    MULTI_HEAD,
    SHARED,
    SHARED_EXPERTS,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo


class Dots1(Architecture):
    """Dots1ForCausalLM."""

    gguf_name = "dots1"
    checkpoints = {  # noqa: RUF012
        "Dots1ForCausalLM": {
            "vocab_size": 152064,
            "hidden_size": 4608,
            "intermediate_size": 10944,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-06,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, EXPERT_FEED_FORWARD, LEADING_DENSE, SHARED_EXPERTS, EXPERT_SCALE, EXPERT_NORM)
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    notes = "experts and a shared expert"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """QK norms; dense blocks first, then experts and a shared expert."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, **model.qk_norms(i)),
                model.feed_forward_or_experts(i, gating=model.gating()),
            )
            for i in range(model.n_layer)
        )
