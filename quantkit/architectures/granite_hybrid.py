"""Granite 4: layers of Mamba 2, and every few layers attention without rotary; dense or with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.granite import GraniteMoe, forward
from quantkit.architectures.state_space import CONTEXT, STEP_BIAS, mamba2
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _inner(config: Config) -> int:
    return config.require("mamba_expand") * config.require("hidden_size")


def _is_attention(architecture: Architecture) -> list[bool]:
    """Which layers are attention."""
    kinds = architecture.config.listed("layer_types", architecture.n_layers)
    return [kind in ("attention", "full_attention") for kind in kinds]


def _write_hybrid(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config, attention = architecture.config, _is_attention(architecture)
    writer.add_ssm_conv_kernel(config.require("mamba_d_conv"))
    writer.add_ssm_state_size(config.require("mamba_d_state"))
    writer.add_ssm_group_count(config.require("mamba_n_groups"))
    writer.add_ssm_inner_size(_inner(config))
    writer.add_ssm_time_step_rank(config.require("mamba_n_heads"))
    heads = config.require("num_key_value_heads")
    writer.add_head_count_kv([heads if on else 0 for on in attention])
    writer.add_rope_scaling_finetuned(all(attention))
    if not all(attention):
        writer.add_context_length(CONTEXT)


class GraniteHybrid(GraniteMoe):
    """GraniteMoeHybridForCausalLM with layers of Mamba 2."""

    gguf_name = "granitehybrid"
    checkpoints = {  # noqa: RUF012
        "GraniteMoeHybridForCausalLM": {
            **GraniteMoe.checkpoints["GraniteMoeForCausalLM"],
            "num_attention_heads": 32,
            "shared_intermediate_size": 1024,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        },
    }
    parameters = (*GraniteMoe.parameters, _write_hybrid)
    pieces = {**GraniteMoe.pieces, **STEP_BIAS}  # noqa: RUF012
    transforms = {**GraniteMoe.transforms, **mamba2("mamba", "mamba_n_groups")}  # noqa: RUF012
    notes = "Mamba 2 and attention; multipliers"

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """Where all layers are attention it is Granite, or Granite with experts, with rotary."""
        hybrid = cls(config)
        if config.find("layer_types") is None or not all(_is_attention(hybrid)):
            return hybrid
        return (_AllAttentionMoe if config.integer("num_experts_per_tok") else _AllAttention)(config)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Granite's, with state spaces in most layers."""
        return forward(metadata, tensors, hybrid=True)


class _AllAttention(GraniteHybrid):
    gguf_name = "granite"
    checkpoints = GraniteHybrid.checkpoints


class _AllAttentionMoe(GraniteHybrid):
    gguf_name = "granitemoe"
    checkpoints = GraniteHybrid.checkpoints
