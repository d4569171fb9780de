"""Gemma 1: norms stored off by one, scaled embeddings, gated GELU."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.gemma2 import GEMMA, plus_one
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


class Gemma(Architecture):
    """GemmaForCausalLM. The embeddings are the output too; an output matrix of its own is left out."""

    gguf_name = "gemma"
    checkpoints = {  # noqa: RUF012
        "GemmaForCausalLM": {
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = GEMMA
    transforms = {"norm.weight": Transform(arithmetic=plus_one)}  # noqa: RUF012
    skipped = (*Architecture.skipped, "lm_head.weight")
    vocabulary = "gemma1"
    notes = "CodeGemma too; norms stored off by one"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with scaled embeddings and gated GELU."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            (
                model.layer(i, model.attention(i, rope), model.feed_forward(i, Activation.GELU))
                for i in range(model.n_layer)
            ),
            embedding_scale=math.sqrt(model.n_embd),
        )
