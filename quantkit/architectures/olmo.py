"""OLMo 1: norms without weights, and queries, keys and values that are clamped."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import INTERLEAVED
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, SHARED, Constant, Field
from quantkit.architectures.products import Norm, NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class Olmo(Architecture):
    """OlmoForCausalLM."""

    gguf_name = "olmo"
    checkpoints = {  # noqa: RUF012
        "OlmoForCausalLM": {
            "vocab_size": 50304,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, Constant("add_layer_norm_eps", 1e-5), Field("add_clamp_kqv", ("clip_qkv",), number=True))
    transforms = INTERLEAVED
    notes = "norms without weights"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's layers, with LayerNorms that have no weights."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NORMAL)
        norm = Norm(None, model.eps, NormKind.LAYER)
        clamp = model.number("attention.clamp_kqv", 0.0)
        return model.spec(
            (
                model.layer(
                    i,
                    model.attention(i, rope, clamp=clamp if clamp > 0 else None),
                    model.feed_forward(i),
                    attention_norm=norm,
                    feed_forward_norm=norm,
                )
                for i in range(model.n_layer)
            ),
            output_norm=norm,
        )
