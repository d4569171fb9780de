"""MiniMax-M2: partly rotated heads with norms over all of them, and experts of which a biased choice is made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import Stack
from quantkit.architectures.feed_forward import Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import SHARED, Field, rope_dimensions
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class MiniMaxM2(Architecture):
    """MiniMaxM2ForCausalLM. Layers for multi-token prediction are left out."""

    gguf_name = "minimax-m2"
    checkpoints = {  # noqa: RUF012
        "MiniMaxM2ForCausalLM": {
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "rms_norm_eps": 1e-06,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "rope_theta": 5000000.0,
        },
    }
    parameters = (*SHARED, Field("add_expert_feed_forward_length", ("intermediate_size",)), rope_dimensions)
    stacks = (
        Stack(
            count=("num_local_experts", "num_experts"),
            part="model.layers.{layer}.block_sparse_moe.experts.{item}.{projection}.weight",
            merged="model.layers.{layer}.block_sparse_moe.experts.{projection}.weight",
            projections=("w1", "w2", "w3"),
        ),
    )
    keeps_next_layers = False
    rotary_part = 1.0
    notes = "experts, QK norms over all heads"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated: published configs call it `rotary_dim`."""
        return self.config.integer("rotary_dim") or super().rope_dimensions

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms of all queries and all keys; shares are sigmoids, chosen with a bias and made to sum to one."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        sizes = model.expert_sizes()
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, norm_whole=True, **model.qk_norms(i)),
                model.experts(
                    i,
                    sizes[i],
                    gating=model.gating(Gating.SIGMOID),
                    scale=model.number("expert_weights_scale", 0.0) or 1.0,
                ),
            )
            for i in range(model.n_layer)
        )
