"""Ling (Bailing): fused attention, experts and a shared expert; the second generation with QK norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from quantkit.architectures.base import Architecture, Pieces, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.feed_forward import Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    EXPERT_FEED_FORWARD,
    EXPERT_NORM,
    EXPERT_SCALE,
    LEADING_DENSE,
    MULTI_HEAD,
    NEXT_LAYERS,
    SHARED,
    SHARED_EXPERTS,
    VOCABULARY_SIZE,
    Constant,
    Parameter,
    rope_dimensions,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import fused_heads, in_turn, interleave_rotary
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {
    "vocab_size": 126464,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000.0,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
}


class Bailing(Architecture):
    """BailingMoeForCausalLM, a class of its checkpoints' own code."""

    gguf_name = "bailingmoe"
    checkpoints = {"BailingMoeForCausalLM": _DEFAULTS}  # noqa: RUF012
    derived = MULTI_HEAD
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *SHARED,
        rope_dimensions,
        LEADING_DENSE,
        VOCABULARY_SIZE,
        EXPERT_FEED_FORWARD,
        Constant("add_expert_weights_scale", 1.0),
        SHARED_EXPERTS,
        EXPERT_NORM,
    )
    pieces: ClassVar[Mapping[str, Pieces]] = {
        ".attention.query_key_value.weight": {
            ".self_attn.q_proj.weight": Transform(in_turn(fused_heads("q"), interleave_rotary("num_attention_heads"))),
            ".self_attn.k_proj.weight": Transform(in_turn(fused_heads("k"), interleave_rotary("num_key_value_heads"))),
            ".self_attn.v_proj.weight": Transform(fused_heads("v")),
        },
        ".attention.dense.weight": {".self_attn.o_proj.weight": Transform()},
    }
    stacks = (EXPERTS,)
    usual_pre = "bailingmoe"
    notes = "Ling; experts and a shared expert"

    def complete(self, config: Config) -> Config:
        """An output matrix whose columns are normalised is none that GGUF can say."""
        if config.find("norm_head"):
            raise QuantkitError(f"{config.path}: norm_head, an output matrix with normalised columns, is not supported")
        return super().complete(config)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's attention; experts and a shared expert."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        return model.spec(
            model.layer(i, model.attention(i, rope), model.feed_forward_or_experts(i, gating=Gating.SOFTMAX))
            for i in range(model.n_layer)
        )


def _shared_length(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    length = config.integer("moe_shared_expert_intermediate_size")
    if length is None:
        length = config.require("moe_intermediate_size") * config.require("num_shared_experts")
    writer.add_expert_shared_feed_forward_length(length)


class Bailing2(Bailing):
    """BailingMoeV2ForCausalLM, a class of its checkpoints' own code."""

    gguf_name = "bailingmoe2"
    checkpoints = {"BailingMoeV2ForCausalLM": _DEFAULTS}  # noqa: RUF012
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *SHARED,
        rope_dimensions,
        LEADING_DENSE,
        VOCABULARY_SIZE,
        EXPERT_FEED_FORWARD,
        _shared_length,
        EXPERT_SCALE,
        SHARED_EXPERTS,
        EXPERT_NORM,
        NEXT_LAYERS,
    )
    rotary_part = 0.5
    pieces: ClassVar[Mapping[str, Pieces]] = {".expert_bias": {".expert_bias.bias": Transform()}}
    keeps_next_layers = True
    notes = "Ling 2; experts and a shared expert, QK norms, partial rotary"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """QK norms; dense layers first, then experts and a shared expert."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, **model.qk_norms(i)),
                model.feed_forward_or_experts(i, gating=model.gating()),
            )
            for i in range(model.n_layer)
        )
