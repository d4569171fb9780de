"""StarCoder2: LayerNorms and biases, grouped heads, GELU without a gate."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class StarCoder2(Architecture):
    """Starcoder2ForCausalLM. Its config has a window that llama.cpp does not know."""

    gguf_name = "starcoder2"
    checkpoints = {  # noqa: RUF012
        "Starcoder2ForCausalLM": {
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-05,
            "rope_theta": 10000.0,
        },
    }
    usual_pre = "starcoder"
    notes = "LayerNorms, biases"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LayerNorms, rotary attention, GELU without a gate."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(i, model.attention(i, rope), model.feed_forward(i, Activation.GELU, gated=False))
            for i in range(model.n_layer)
        )
