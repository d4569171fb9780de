"""Nemotron-H and Nemotron 3: layers that are a state space, attention without rotary, or a feed-forward block alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.experts import Stack
from quantkit.architectures.feed_forward import Activation, Experts, FeedForward, Gating
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.llama import INTERLEAVED
from quantkit.architectures.parameters import (
    EXPERT_FEED_FORWARD,
    EXPERT_NORM,
    EXPERT_SCALE,
    SHARED,
    SHARED_EXPERTS,
    VOCABULARY_SIZE,
    Field,
    rope_dimensions,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.state_space import CONTEXT, STEP_BIAS, mamba2, padded_vocabulary
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe", "linear_attention": "mamba",
          "full_attention": "attention"}  # fmt: skip


def _kinds(architecture: Architecture) -> list[str]:
    """What each layer is: mamba, attention, mlp or moe."""
    config = architecture.config
    pattern = config.find("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != architecture.n_layers:
        pattern = config.listed("layers_block_type", architecture.n_layers)
    kinds = [_KINDS.get(kind, kind) if isinstance(kind, str) else "" for kind in pattern]
    if unknown := set(kinds) - set(_KINDS.values()):
        raise config.wrong(("layers_block_type",), min(unknown), f"layers of {', '.join(sorted(set(_KINDS.values())))}")
    return kinds


def _write_layers(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The sizes of the state spaces and of attention, and which layers are what."""
    config, kinds = architecture.config, _kinds(architecture)
    heads = config.require("mamba_num_heads")
    writer.add_context_length(CONTEXT)
    writer.add_ssm_conv_kernel(config.require("conv_kernel"))
    writer.add_ssm_state_size(config.require("ssm_state_size"))
    writer.add_ssm_group_count(config.require("n_groups"))
    writer.add_ssm_inner_size(heads * config.require("mamba_head_dim"))
    writer.add_ssm_time_step_rank(heads)
    groups = config.require("num_key_value_heads")
    writer.add_head_count_kv([groups if kind == "attention" else 0 for kind in kinds])
    writer.add_rope_scaling_finetuned(False)
    writer.add_key_length(config.require("attention_head_dim"))
    writer.add_value_length(config.require("attention_head_dim"))
    wide = {"mlp": "intermediate_size", "moe": "moe_intermediate_size"}
    writer.add_feed_forward_length([config.require(wide[kind]) if kind in wide else 0 for kind in kinds])


class NemotronH(Architecture):
    """NemotronHForCausalLM. Multi-token-prediction layers are left out."""

    gguf_name = "nemotron_h"
    checkpoints = {  # noqa: RUF012
        "NemotronHForCausalLM": {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "layer_norm_epsilon": 1e-05,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "conv_kernel": 4,
        },
    }
    parameters = (*SHARED, VOCABULARY_SIZE, rope_dimensions, _write_layers)
    pieces = STEP_BIAS
    transforms = {**INTERLEAVED, **mamba2("mixer", "n_groups")}  # noqa: RUF012
    skipped_beginnings = ("mtp.",)
    vocabulary = "bpe"
    notes = "layers of Mamba 2, attention or feed-forward blocks"

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """With experts it has another name in GGUF."""
        return (NemotronHMoe if config.find("num_experts_per_tok") is not None else cls)(config)

    def complete(self, config: Config) -> Config:
        """The number of layers follows from their list, and that of tokens is a multiple of 8.

        The size of a head is not what is rotated, since nothing is.
        """
        config = super().complete(config)
        kinds = config.find("layers_block_type")
        if isinstance(kinds, list):
            config = config.changed(num_hidden_layers=len(kinds))
        head = config.integer("head_dim", "attention_head_dim") or 128
        return padded_vocabulary(config.changed(attention_head_dim=head).without("head_dim"), 8)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """A layer is one of three kinds, after the one norm that it has."""
        return _forward(metadata, tensors)


class NemotronHMoe(NemotronH):
    """NemotronHForCausalLM with experts: Nemotron 3."""

    gguf_name = "nemotron_h_moe"
    checkpoints = NemotronH.checkpoints
    parameters = (
        *NemotronH.parameters,
        EXPERT_FEED_FORWARD,
        Field("add_expert_shared_feed_forward_length", ("moe_shared_expert_intermediate_size",)),
        SHARED_EXPERTS,
        EXPERT_NORM,
        EXPERT_SCALE,
        Field("add_moe_latent_size", ("moe_latent_size",)),
    )
    stacks = (
        Stack(
            count=("n_routed_experts",),
            part="backbone.layers.{layer}.mixer.experts.{item}.{projection}.weight",
            merged="model.layers.{layer}.mlp.experts.{projection}.weight",
            projections=("down_proj", "up_proj"),
        ),
    )
    notes = "Nemotron 3; layers of Mamba 2, attention or experts"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """With experts, which have no gates, beside what they share."""
        return _forward(metadata, tensors)


def _forward(metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
    model = ModelReader(metadata, tensors, eps_key="layer_norm_epsilon")
    model.refuse_keys("moe_latent_size")

    def feed_forward(i: int) -> FeedForward | Experts:
        if f"blk.{i}.ffn_gate_inp.weight" not in tensors:
            return model.feed_forward(i, Activation.RELU_SQUARED, gated=False)
        return model.experts(
            i,
            model.expert_sizes()[i],
            gate=None,
            activation=Activation.RELU_SQUARED,
            gating=Gating.SIGMOID,
            normalised=model.flag("expert_weights_norm", False),
            scale=model.number("expert_weights_scale", 0.0) or 1.0,
            shared=FeedForward(
                model.integer("expert_shared_feed_forward_length"),
                up=model.linear(f"blk.{i}.ffn_up_shexp"),
                down=model.linear(f"blk.{i}.ffn_down_shexp"),
                activation=Activation.RELU_SQUARED,
            ),
        )

    def layer(i: int) -> Layer:
        if model.feed_forward_sizes[i]:
            norm = model.norm(f"blk.{i}.attn_norm")
            return model.layer(i, (), feed_forward(i), attention_norm=None, feed_forward_norm=norm)
        mixer = model.attention(i, None, scale=model.scale) if model.heads_kv[i] else model.mamba2(i)
        return model.layer(i, mixer, None, feed_forward_norm=None)

    return model.spec(layer(i) for i in range(model.n_layer))
