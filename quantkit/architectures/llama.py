"""Llama, and the dense Mistral models, which share its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import HEAD_SIZE, MULTI_HEAD, SHARED, VOCABULARY_SIZE, rope_dimensions
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import interleave_rotary
from quantkit.formats.gguf import Metadata, TensorInfo

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


# Queries and keys whose rotary halves become pairs.
INTERLEAVED = {
    f"{projection}.{kind}": Transform(rearrange=interleave_rotary(heads))
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
    for kind in ("weight", "bias")
}


class Llama(Architecture):
    """LlamaForCausalLM and MistralForCausalLM: RMS norms, rotary attention with grouped heads, a gated MLP."""

    gguf_name = "llama"
    # VLlama3 is what SmolVLM's config calls its text model.
    checkpoints = {  # noqa: RUF012
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _MISTRAL,
        "VLlama3ForCausalLM": _LLAMA,
    }
    wrappers = {  # noqa: RUF012
        "LlavaForConditionalGeneration": {"llama": _LLAMA, "mistral": _MISTRAL},
        "LlavaNextForConditionalGeneration": {"llama": _LLAMA, "mistral": _MISTRAL},
        "VoxtralForConditionalGeneration": {"llama": _LLAMA},
    }
    derived = MULTI_HEAD | HEAD_SIZE
    parameters = (*SHARED, VOCABULARY_SIZE, rope_dimensions)
    transforms = INTERLEAVED
    renames = {**Architecture.renames, "text_model.": ""}  # noqa: RUF012
    vocabulary = "auto"
    notes = "dense Mistral too"

    def computed_tensors(self) -> Iterator[Assembly]:
        """Llama 3's rope scaling is a tensor of frequency factors in GGUF."""
        factors = self.rope.llama3_factors(self.rope_dimensions)
        if factors is not None:
            yield Assembly("rope_freqs.weight", values=factors)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """RMS norms, rotary attention with grouped heads, gated SiLU or experts; biases where the file has them."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        experts = model.integer("expert_count", 0) > 0
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, scale=model.scale),
                model.experts(i) if experts else model.feed_forward(i),
            )
            for i in range(model.n_layer)
        )
