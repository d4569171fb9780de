"""ERNIE 4.5: Llama's layers, and experts and a shared expert in the larger models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from quantkit.architectures.base import Architecture, Pieces, Transform
from quantkit.architectures.experts import Stack
from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import EXPERT_FEED_FORWARD, SHARED, Field
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import HALVES, STACKED_EXPERTS, fused_heads, part
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


class Ernie(Architecture):
    """Ernie4_5ForCausalLM, and Ernie4_5_ForCausalLM, which fuses projections. Neighbouring pairs are rotated."""

    gguf_name = "ernie4_5"
    checkpoints = dict.fromkeys(("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"), _DEFAULTS)
    pieces: ClassVar[Mapping[str, Pieces]] = {
        ".qkv_proj.weight": {f".{name}_proj.weight": Transform(fused_heads(name)) for name in "qkv"},
        ".up_gate_proj.weight": {f".{half}_proj.weight": Transform(part(i, 2)) for i, half in enumerate(HALVES)},
    }
    renames = {**Architecture.renames, "ernie.": "model."}  # noqa: RUF012
    vocabulary = "spm-prefix"
    notes = "dense"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        return model.spec(model.layer(i, model.attention(i, rope), model.feed_forward(i)) for i in range(model.n_layer))


def _shared(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The shared experts; their length is not in the config, and is worked out as the reference does."""
    config = architecture.config
    count = config.integer("moe_num_shared_experts")
    if count is None:
        return
    writer.add_expert_shared_count(count)
    if count > 0:
        length = config.require("intermediate_size") // config.require("num_key_value_heads")
        writer.add_expert_shared_feed_forward_length(length)


class ErnieMoe(Ernie):
    """Ernie4_5_MoeForCausalLM. Multi-token-prediction layers are left out."""

    gguf_name = "ernie4_5-moe"
    checkpoints = {  # noqa: RUF012
        "Ernie4_5_MoeForCausalLM": {
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "moe_intermediate_size": 1536,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 2,
            "rope_theta": 500000.0,
        },
    }
    parameters = (
        *SHARED,
        Field("add_expert_count", ("moe_num_experts",)),
        Field("add_expert_used_count", ("moe_k",)),
        Field("add_interleave_moe_layer_step", ("moe_layer_interval",)),
        Field("add_leading_dense_block_count", ("moe_layer_start_index",)),
        EXPERT_FEED_FORWARD,
        _shared,
    )
    stacks = (
        Stack(
            count=("moe_num_experts",),
            part="model.layers.{layer}.mlp.experts.{item}.{projection}.weight",
            merged="model.layers.{layer}.mlp.experts.{projection}.weight",
            projections=("gate_proj", "up_proj", "down_proj"),
        ),
    )
    pieces = STACKED_EXPERTS
    skipped_beginnings = ("model.mtp_",)
    notes = "experts and a shared expert"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Experts in every so many layers after the first, whose choice has a bias, beside a shared expert."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        first, step = model.integer("leading_dense_block_count", 0), max(1, model.integer("interleave_moe_layer_step"))
        n_ff, shared = (
            model.per_layer("expert_feed_forward_length"),
            model.integer("expert_shared_feed_forward_length", 0),
        )

        def feed_forward(i: int) -> FeedForward | Experts:
            if i < first or (i + 1) % step:
                return model.feed_forward(i)
            beside = model.shared_experts(i, shared) if shared else None
            return model.experts(i, n_ff[i], shared=beside)

        return model.spec(model.layer(i, model.attention(i, rope), feed_forward(i)) for i in range(model.n_layer))
