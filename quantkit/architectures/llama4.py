"""Llama 4's text model: every fourth layer without rotary, chunks in the others, sigmoid-weighted experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Experts, FeedForward, Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import Attention, RopeStyle, Temperature
from quantkit.architectures.parameters import Field
from quantkit.architectures.products import Norm
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import TRANSPOSED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What llama.cpp knows of the family and no key says.
_CHUNK, _GROWTH, _EXPERTS_WITHOUT_NORMS = 8192, Temperature(0.1, 8192, offset=1), 128


def _no_window(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """A window of 0 says that all layers see everything, as in the models without experts."""
    kinds = architecture.config.find("layer_types")
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        writer.add_sliding_window(0)


_TEXT = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1,
    "rope_theta": 500000.0,
}


class Llama4(Llama):
    """Llama4ForCausalLM, and the text model of Llama4ForConditionalGeneration. The rotary layout is GGUF's already."""

    gguf_name = "llama4"
    checkpoints = {"Llama4ForCausalLM": _TEXT}  # noqa: RUF012
    wrappers = {"Llama4ForConditionalGeneration": {"llama4_text": _TEXT}}  # noqa: RUF012
    parameters = (
        *Llama.parameters,
        Field("add_interleave_moe_layer_step", ("interleave_moe_layer_step",)),
        Field("add_expert_feed_forward_length", ("intermediate_size_moe",)),
        _no_window,
    )
    transforms = {}  # noqa: RUF012
    pieces = TRANSPOSED_EXPERTS
    vocabulary = "bpe"
    usual_pre = "llama4"
    notes = "text part; experts, chunked attention"

    def complete(self, config: Config) -> Config:
        """What the config calls its size is the experts'; the dense blocks have a size of their own."""
        config = super().complete(config)
        return config.changed(
            intermediate_size_moe=config.find("intermediate_size"),
            intermediate_size=config.find("intermediate_size_mlp"),
        )

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Rotary layers attend within chunks, with QK norms after the rotation; in the others queries grow."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        whole = model.integer("attention.sliding_window", _CHUNK) == 0
        normed = model.integer("expert_count", 0) != _EXPERTS_WITHOUT_NORMS
        step = model.integer("interleave_moe_layer_step", 1)
        norm = Norm(None, model.eps)
        n_ff = model.per_layer("expert_feed_forward_length")

        def feed_forward(i: int) -> FeedForward | Experts:
            if step == 0 or (i + 1) % step:
                return model.feed_forward(i)
            return model.experts(
                i, n_ff[i], gating=Gating.SIGMOID, normalised=False, weigh_input=True,
                shared=model.shared_experts(i, n_ff[i]),
            )  # fmt: skip

        def attention(i: int) -> Attention:
            if not whole and i % 4 == 3:
                return model.attention(i, None, scale=model.scale, temperature=_GROWTH)
            norms = {"q_norm": norm, "k_norm": norm, "norm_rotated": True} if normed else {}
            return model.attention(i, rope, scale=model.scale, chunk=None if whole else _CHUNK, **norms)

        return model.spec(model.layer(i, attention(i), feed_forward(i)) for i in range(model.n_layer))
