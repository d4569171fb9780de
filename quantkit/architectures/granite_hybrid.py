"""Granite 4: layers of Mamba 2, and every few layers attention without rotary; dense or with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.granite import GraniteMoe
from quantkit.architectures.rearrangements import decay_rates, kernel

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTEXT = 1 << 20  # of models that do not know positions


def _column(_config: Config, stored: np.ndarray) -> np.ndarray:
    """A number in each row."""
    return stored.reshape(-1, 1)


def _groups(config: Config, stored: np.ndarray) -> np.ndarray:
    """The numbers of each group in a row."""
    return stored.reshape(config.require("mamba_n_groups"), -1)


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
        writer.add_context_length(_CONTEXT)


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
    pieces = {**GraniteMoe.pieces, ".dt_bias": {".dt_proj.bias": Transform()}}  # noqa: RUF012
    transforms = {  # noqa: RUF012
        **GraniteMoe.transforms,
        ".A_log": Transform(_column, decay_rates, n_axes=2),
        ".mamba.D": Transform(_column, n_axes=2),
        ".mamba.norm.weight": Transform(_groups, n_axes=2),
        ".conv1d.weight": Transform(kernel, n_axes=2),
    }
    notes = "Mamba 2 and attention; multipliers"

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """Where all layers are attention it is Granite, or Granite with experts, with rotary."""
        hybrid = cls(config)
        if config.find("layer_types") is None or not all(_is_attention(hybrid)):
            return hybrid
        return (_AllAttentionMoe if config.integer("num_experts_per_tok") else _AllAttention)(config)


class _AllAttention(GraniteHybrid):
    gguf_name = "granite"


class _AllAttentionMoe(GraniteHybrid):
    gguf_name = "granitemoe"
