"""GLM-4 (0414): norms after each part too, gate and up projections in one product, half of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.feed_forward import FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import SHARED, rope_dimensions
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class Glm4(Architecture):
    """Glm4ForCausalLM. Neighbouring pairs are rotated, as in the checkpoint."""

    gguf_name = "glm4"
    checkpoints = {  # noqa: RUF012
        "Glm4ForCausalLM": {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    parameters = (*SHARED, rope_dimensions)
    rotary_part = 0.5
    special_tokens = {  # noqa: RUF012
        "eos": "<|endoftext|>",
        "eot": "<|user|>",
        "unk": "<|endoftext|>",
        "bos": "<|endoftext|>",
    }
    usual_pre = "glm4"
    notes = "norms around each part, partial rotary"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms before and after each part; gate and up projections in one product."""
        model = ModelReader(metadata, tensors)
        model.refuse_keys("rope.dimension_sections")
        rope = model.rope(RopeStyle.NORMAL)

        def feed_forward(i: int) -> FeedForward:
            return FeedForward(
                model.feed_forward_sizes[i],
                gate_up=model.linear(f"blk.{i}.ffn_up"),
                down=model.linear(f"blk.{i}.ffn_down"),
            )

        return model.spec(
            model.layer(i, model.attention(i, rope), feed_forward(i), **model.post_norms(i))
            for i in range(model.n_layer)
        )
