"""GLM-4.5 and 4.6: dense layers first, then experts with a biased choice beside a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.feed_forward import Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    EXPERT_FEED_FORWARD,
    EXPERT_NORM,
    EXPERT_SCALE,
    LEADING_DENSE,
    NEXT_LAYERS,
    SHARED,
    SHARED_EXPERTS,
    rope_dimensions,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The special tokens of GLM's vocabularies.
GLM_TOKENS = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}


def sigmoid(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """That scores of experts are sigmoids, each by itself."""
    from gguf import ExpertGatingFuncType

    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


class Glm4Moe(Architecture):
    """Glm4MoeForCausalLM. Multi-token-prediction layers are kept, and not run."""

    gguf_name = "glm4moe"
    checkpoints = {  # noqa: RUF012
        "Glm4MoeForCausalLM": {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    parameters = (
        *SHARED,
        rope_dimensions,
        EXPERT_FEED_FORWARD,
        SHARED_EXPERTS,
        LEADING_DENSE,
        sigmoid,
        EXPERT_SCALE,
        EXPERT_NORM,
        NEXT_LAYERS,
    )
    rotary_part = 0.5
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    keeps_next_layers = True
    special_tokens = GLM_TOKENS
    usual_pre = "glm4"
    notes = "GLM-4.6 too; experts and a shared expert"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """QK norms where there are any; the norm before the feed-forward block is named after attention."""
        model = ModelReader(metadata, tensors)
        model.refuse_keys("rope.dimension_sections")
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, **(model.qk_norms(i) if f"blk.{i}.attn_q_norm.weight" in tensors else {})),
                model.feed_forward_or_experts(i, gating=model.gating(Gating.SIGMOID)),
                feed_forward_norm=model.norm(f"blk.{i}.post_attention_norm"),
            )
            for i in range(model.n_layer)
        )
