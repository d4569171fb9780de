"""Jamba: state spaces, and every few layers attention without rotary; dense blocks and experts in turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import EXPERTS, Stack
from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, Field, block_count, file_type
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.architectures.state_space import MAMBA
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _write_sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    heads, hidden = config.require("num_key_value_heads"), config.require("hidden_size", "mamba_d_model")
    offset, period = config.require("attn_layer_offset"), config.require("attn_layer_period")
    layers = range(architecture.n_layers)
    writer.add_head_count_kv([heads if i >= offset and (i - offset) % period == 0 else 0 for i in layers])
    writer.add_ssm_conv_kernel(config.integer("mamba_d_conv") or 4)
    writer.add_ssm_inner_size(config.require("mamba_expand") * hidden)
    writer.add_ssm_state_size(config.integer("mamba_d_state") or 16)
    writer.add_ssm_time_step_rank(config.integer("mamba_dt_rank") or -(-hidden // 16))
    writer.add_layer_norm_rms_eps(config.number("layer_norm_epsilon", "rms_norm_eps") or 1e-6)


class Jamba(Architecture):
    """JambaForCausalLM."""

    gguf_name = "jamba"
    checkpoints = {  # noqa: RUF012
        "JambaForCausalLM": {
            "vocab_size": 65536,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-06,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        },
    }
    parameters = (
        block_count,
        CONTEXT,
        EMBEDDING,
        FEED_FORWARD,
        HEADS,
        _write_sizes,
        Field("add_expert_count", ("num_local_experts", "num_experts")),
        Field("add_expert_used_count", ("num_experts_per_tok", "num_experts_per_token")),
        file_type,
    )
    transforms = MAMBA
    pieces = STACKED_EXPERTS
    stacks = (
        Stack(
            count=("num_local_experts", "num_experts"),
            part="model.layers.{layer}.feed_forward.experts.{item}.{projection}.weight",
            merged=EXPERTS.merged,
            projections=("down_proj", "gate_proj", "up_proj"),
        ),
    )
    renames = {**Architecture.renames, ".moe.": ".feed_forward."}  # noqa: RUF012
    vocabulary = "jamba"
    notes = "state spaces and attention; experts"

    def canonical_name(self, name: str) -> str | None:
        """Layers without experts have one, which is their block."""
        found = super().canonical_name(name)
        match = None if found is None else _LAYER.match(found)
        if found is None or match is None:
            return found
        offset, period = self.config.require("expert_layer_offset"), self.config.require("expert_layer_period")
        routed = int(match[1]) >= offset and (int(match[1]) - offset) % period == 0
        return found if routed else found.replace(".experts.0.", ".")

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Layers without heads of keys are state spaces; those with a router have experts."""
        model = ModelReader(metadata, tensors)
        scale = model.number("expert_weights_scale", 0.0) or 1.0

        def feed_forward(i: int) -> Experts | FeedForward:
            if f"blk.{i}.ffn_gate_inp.weight" in tensors:
                return model.experts(i, normalised=False, scale=scale)
            return model.feed_forward(i)

        return model.spec(
            model.layer(i, model.attention(i, None) if model.heads_kv[i] else model.mamba(i), feed_forward(i))
            for i in range(model.n_layer)
        )
