"""Qwen3: queries and keys are normalised head by head, and the head size is explicit."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.qwen2 import Qwen2
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class Qwen3(Qwen2):
    """Qwen3ForCausalLM."""

    gguf_name = "qwen3"
    checkpoints = {  # noqa: RUF012
        "Qwen3ForCausalLM": {**Qwen2.checkpoints["Qwen2ForCausalLM"], "head_dim": 128},
    }
    notes = "QK norms, explicit head size; Qwen3-Embedding with its pooling, Qwen3-Reranker"

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """See Architecture: rerankers have the same class."""
        from quantkit.architectures.qwen3_reranker import Qwen3Reranker, is_reranker

        return Qwen3Reranker(config) if cls is Qwen3 and is_reranker(config) else cls(config)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen2's, with QK norms; a reranker's scores are probabilities."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        layers = [
            model.layer(i, model.attention(i, rope, **model.qk_norms(i)), model.feed_forward(i))
            for i in range(model.n_layer)
        ]
        return model.spec(layers, head=model.head(softmax=True))
