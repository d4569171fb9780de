"""OLMoE: experts, with norms of whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, SHARED, Constant
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo


class Olmoe(Architecture):
    """OlmoeForCausalLM. Whatever its config says, the norms' epsilon is 1e-5."""

    gguf_name = "olmoe"
    checkpoints = {  # noqa: RUF012
        "OlmoeForCausalLM": {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, Constant("add_layer_norm_rms_eps", 1e-5))
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    notes = "experts, whole QK norms"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms of whole queries and keys; experts whose weights are not normalised."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, norm_whole=True, **model.qk_norms(i)),
                model.experts(i, normalised=False, scale=model.number("expert_weights_scale", 0.0) or 1.0),
            )
            for i in range(model.n_layer)
        )
