"""EuroBERT: Llama's layers, in which every token sees all others."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.bert import classifier_pooling
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import SHARED, Constant, pooling, rope_unscaled
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


class EuroBert(Architecture):
    """EuroBertModel, as EuroBERT and jina-embeddings-v5-text-nano publish it."""

    gguf_name = "eurobert"
    checkpoints = dict.fromkeys(("EuroBertModel", "JinaEmbeddingsV5Model"), _DEFAULTS)
    parameters = (*SHARED, Constant("add_causal_attention", False), rope_unscaled, pooling, classifier_pooling)
    vocabulary = "eurobert"
    usual_pre = "llama-bpe"
    notes = "encoder; Llama's layers"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """RMS norms, rotary attention with grouped heads, gated SiLU."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(model.layer(i, model.attention(i, rope), model.feed_forward(i)) for i in range(model.n_layer))
