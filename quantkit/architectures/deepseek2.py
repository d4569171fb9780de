"""DeepSeek V2, V3 and R1, and Kimi K2: latent attention (MLA), dense layers first, experts in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.feed_forward import Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import LatentAttention, Rope, RopeStyle
from quantkit.architectures.parameters import (
    EXPERT_SCALE,
    SHARED,
    VOCABULARY_SIZE,
    Field,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _latent(keys: bool) -> Rearrange:
    """Of what makes keys and values of the latent, head by head: the keys' part, transposed, or the values'."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        heads, size = config.require("num_attention_heads"), config.require("qk_nope_head_dim")
        if stored.shape[0] != heads * (size + config.require("v_head_dim")):
            raise ValueError
        parts = stored.reshape(heads, -1, stored.shape[-1])
        return np.swapaxes(parts[:, :size], 1, 2) if keys else parts[:, size:]

    return rearrange


def _sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many layers are dense, and the sizes of the latents and of what heads are made of."""
    config = architecture.config
    dense = config.integer("first_k_dense_replace")
    if dense is None:
        dense = 0 if config.integer("n_routed_experts") else config.require("num_hidden_layers")
    writer.add_leading_dense_block_count(dense)
    VOCABULARY_SIZE(architecture, writer, file_type)
    if (rank := config.integer("q_lora_rank")) is not None:
        writer.add_q_lora_rank(rank)
    rank, rotary = config.integer("kv_lora_rank") or 512, config.require("qk_rope_head_dim")
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotary)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.require("qk_nope_head_dim") + rotary)
    writer.add_value_length_mla(config.require("v_head_dim"))
    writer.add_expert_feed_forward_length(config.require("moe_intermediate_size", "intermediate_size"))
    Field("add_expert_count", ("n_routed_experts",))(architecture, writer, file_type)
    writer.add_expert_shared_count(config.integer("n_shared_experts") or 0)
    EXPERT_SCALE(architecture, writer, file_type)
    if config.find("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    writer.add_rope_dimension_count(rotary)
    if (scale := architecture.rope.number("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)


class DeepSeek2(Architecture):
    """DeepseekV2ForCausalLM and DeepseekV3ForCausalLM. Multi-token-prediction layers are left out.

    GGUF holds what makes keys of the latent transposed, so that queries can meet the latent itself.
    """

    gguf_name = "deepseek2"
    checkpoints = {  # noqa: RUF012
        "DeepseekV2ForCausalLM": {
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 64,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-06,
            "n_routed_experts": 64,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "rope_theta": 10000.0,
        },
        "DeepseekV3ForCausalLM": {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-06,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "rope_theta": 10000.0,
        },
    }
    derived = {"head_dim": lambda config: config.require("qk_rope_head_dim")}  # noqa: RUF012
    parameters = (*SHARED, _sizes)
    pieces = {  # noqa: RUF012
        **STACKED_EXPERTS,
        ".kv_b_proj.weight": {
            ".k_b_proj.weight": Transform(_latent(keys=True), n_axes=3),
            ".v_b_proj.weight": Transform(_latent(keys=False), n_axes=3),
        },
    }
    stacks = (EXPERTS,)
    keeps_next_layers = False
    usual_pre = "deepseek-v3"
    vocabulary = "kimi"
    notes = "V3 and R1 too; latent attention, experts in groups"

    def complete(self, config: Config) -> Config:
        """All heads share one latent."""
        return super().complete(config).changed(num_key_value_heads=1)

    def canonical_name(self, name: str) -> str | None:
        """An output matrix that is the embedding is left out."""
        found = super().canonical_name(name)
        return None if found == "lm_head.weight" and self.config.find("tie_word_embeddings") else found

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Latent attention; dense blocks first, then experts beside shared ones."""
        model = ModelReader(metadata, tensors)
        if "blk.0.attn_kv_b.weight" in tensors:
            raise QuantkitError(
                "evaluating deepseek2 models with attn_kv_b tensors is not supported: convert the checkpoint again, "
                "which splits them into attn_k_b and attn_v_b"
            )
        latent, size = model.integer("attention.kv_lora_rank"), model.integer("attention.key_length_mla")
        rope, scale = _scaled(model, model.rope(RopeStyle.NORMAL), 1.0 / math.sqrt(max(1, size)))
        model.refuse_keys("attention.temperature_scale")
        gating = model.gating(Gating.SOFTMAX)

        def attention(i: int) -> LatentAttention:
            at = f"blk.{i}."
            whole = f"{at}attn_q.weight" in tensors
            return LatentAttention(
                n_head=model.heads[i],
                head_k=size - rope.n_dims,
                head_v=model.integer("attention.value_length_mla"),
                n_latent=latent,
                scale=scale,
                rope=rope,
                kv_down=model.linear(f"{at}attn_kv_a_mqa"),
                kv_norm=model.norm(f"{at}attn_kv_a_norm"),
                k_up=f"{at}attn_k_b.weight",
                v_up=f"{at}attn_v_b.weight",
                out=model.linear(f"{at}attn_output"),
                q=model.linear(f"{at}attn_q") if whole else None,
                n_latent_q=0 if whole else model.integer("attention.q_lora_rank"),
                q_down=None if whole else model.linear(f"{at}attn_q_a"),
                q_norm=None if whole else model.norm(f"{at}attn_q_a_norm"),
                q_up=None if whole else model.linear(f"{at}attn_q_b"),
            )

        return model.spec(
            model.layer(i, attention(i), model.feed_forward_or_experts(i, gating=gating)) for i in range(model.n_layer)
        )


def _scaled(model: ModelReader, rope: Rope, scale: float) -> tuple[Rope, float]:
    """`rope` and the scale of scores with what YaRN multiplies both with, as llama.cpp applies it to this family.

    The key `yarn_log_multiplier` is a tenth of the config's mscale_all_dim. llama.cpp takes mscale to be the same.
    """
    log = math.log(1.0 / rope.freq_scale)
    all_dims = model.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    own = model.number("rope.scaling.attn_factor", 1.0)
    if rope.yarn is not None:
        own *= 1.0 if all_dims else 1.0 + max(0.0, 0.1 * log)
        rope = replace(rope, magnitude=own)
    else:
        own *= 1.0 + 0.1 * log
    return rope, scale * (own * (1.0 + 0.1 * all_dims * log)) ** 2
