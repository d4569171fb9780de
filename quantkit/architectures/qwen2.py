"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, SHARED, pooling
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


class Qwen2(Architecture):
    """Qwen2ForCausalLM. The rotary halves stay as they are: llama.cpp rotates them as transformers does."""

    gguf_name = "qwen2"
    checkpoints = {"Qwen2ForCausalLM": _DEFAULTS}  # noqa: RUF012
    wrappers = {  # noqa: RUF012
        "Qwen2AudioForConditionalGeneration": {"qwen2": _DEFAULTS},
        "AudioFlamingo3ForConditionalGeneration": {"qwen2": _DEFAULTS},
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, pooling)
    vocabulary = "spm-or-bpe"
    notes = "Qwen2.5 too; attention biases"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with rotary halves; the biases are where the file has them."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(model.layer(i, model.attention(i, rope), model.feed_forward(i)) for i in range(model.n_layer))
