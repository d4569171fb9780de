"""Falcon-H1: attention and a state space side by side in each layer, and multipliers that conversion takes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Factors, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEAD_SIZE,
    HEADS,
    KEY_LENGTH,
    KEY_VALUE_HEADS,
    VALUE_LENGTH,
    VOCABULARY_SIZE,
    block_count,
    file_type,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.state_space import STEP_BIAS, mamba2
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _times(*names: str, of: int | None = None) -> Factors:
    """The multipliers of these names, one after the other; `of` is which one of a list."""

    def factors(config: Config) -> list[float | np.ndarray]:
        found: list[float | np.ndarray] = []
        for name in names:
            value = config.find(name)
            if of is not None and isinstance(value, list) and len(value) > of:
                value = value[of]
            found.append(config.finite(value, (name,)))
        return found

    return factors


def _projected(config: Config) -> list[float | np.ndarray]:
    """What the rows of a state space's first product are multiplied with: all, and then each part."""
    inner = config.require("mamba_d_ssm")
    keys = config.require("mamba_n_groups") * config.require("mamba_d_state")
    sizes = inner, inner, keys, keys, config.require("mamba_n_heads")
    each = [config.finite(value, ("ssm_multipliers",)) for value in config.listed("ssm_multipliers", len(sizes))]
    return [*_times("ssm_in_multiplier")(config), np.repeat(np.array(each, np.float32), sizes)]


def _write_state_space(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    inner = config.require("mamba_d_ssm")
    writer.add_ssm_conv_kernel(config.require("mamba_d_conv"))
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.require("mamba_d_state"))
    writer.add_ssm_time_step_rank(inner // config.require("mamba_d_head"))
    writer.add_ssm_group_count(config.require("mamba_n_groups"))
    writer.add_layer_norm_rms_eps(config.required_number("rms_norm_eps"))


def _write_rope_base(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_rope_freq_base(architecture.rope.required("rope_theta"))


class FalconH1(Architecture):
    """FalconH1ForCausalLM."""

    gguf_name = "falcon-h1"
    checkpoints = {  # noqa: RUF012
        "FalconH1ForCausalLM": {
            "vocab_size": 128000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 128,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "lm_head_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "mlp_multipliers": [1.0, 1.0],
            "key_multiplier": 1.0,
            "attention_out_multiplier": 1.0,
            "attention_in_multiplier": 1.0,
            "ssm_multipliers": [1.0] * 5,
            "ssm_in_multiplier": 1.0,
            "ssm_out_multiplier": 1.0,
        },
    }
    derived = HEAD_SIZE
    parameters = (
        CONTEXT,
        EMBEDDING,
        FEED_FORWARD,
        HEADS,
        block_count,
        _write_state_space,
        file_type,
        VOCABULARY_SIZE,
        KEY_VALUE_HEADS,
        KEY_LENGTH,
        VALUE_LENGTH,
        _write_rope_base,
    )
    pieces = STEP_BIAS
    transforms = {  # noqa: RUF012
        **mamba2("mamba", "mamba_n_groups"),
        "down_proj.weight": Transform(factors=_times("mlp_multipliers", of=1)),
        "gate_proj.weight": Transform(factors=_times("mlp_multipliers", of=0)),
        "k_proj.weight": Transform(factors=_times("key_multiplier", "attention_in_multiplier")),
        "q_proj.weight": Transform(factors=_times("attention_in_multiplier")),
        "v_proj.weight": Transform(factors=_times("attention_in_multiplier")),
        "o_proj.weight": Transform(factors=_times("attention_out_multiplier")),
        ".out_proj.weight": Transform(factors=_times("ssm_out_multiplier")),
        ".in_proj.weight": Transform(factors=_projected),
        "lm_head.weight": Transform(factors=_times("lm_head_multiplier")),
        "embed_tokens.weight": Transform(factors=_times("embedding_multiplier")),
    }
    vocabulary = "bpe"
    notes = "attention beside Mamba 2; multipliers"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Both mixers read the same, and their sum is added; the multipliers are in the tensors."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                (model.attention(i, rope, scale=model.scale), model.mamba2(i)),
                model.feed_forward(i),
                feed_forward_norm=replace(model.norm(f"blk.{i}.ffn_norm"), weight=f"blk.{i}.ffn_norm"),
            )
            for i in range(model.n_layer)
        )
