"""Seed-OSS: Qwen2's layers, with an explicit head size and the second norm under another name."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.qwen2 import Qwen2
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class SeedOss(Qwen2):
    """SeedOssForCausalLM."""

    gguf_name = "seed_oss"
    checkpoints = {  # noqa: RUF012
        "SeedOssForCausalLM": {
            "vocab_size": 155136,
            "hidden_size": 4096,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
        },
    }
    vocabulary = "bpe"
    notes = "attention biases, explicit head size"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen2's; the norm before the feed-forward block bears the name of one after attention."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, scale=model.scale),
                model.feed_forward(i),
                feed_forward_norm=model.norm(f"blk.{i}.post_attention_norm"),
            )
            for i in range(model.n_layer)
        )
