"""Granite: Llama's layers with four multipliers: of scores, embeddings, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Transform
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, Field
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import HALVES, part
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo


def forward(metadata: Metadata, tensors: Mapping[str, TensorInfo], hybrid: bool = False) -> ForwardSpec:
    """Llama's layers with the multipliers; in a `hybrid` those without heads of keys are state spaces."""
    model = ModelReader(metadata, tensors)
    model.refuse_keys("deepstack_mapping")
    experts = model.integer("expert_count", 0) > 0
    shared = model.integer("expert_shared_feed_forward_length", 0)

    def feed_forward(i: int) -> FeedForward | Experts:
        if not experts:
            return model.feed_forward(i)
        return model.experts(i, shared=model.shared_experts(i, shared) if shared else None)

    rope = model.rope(RopeStyle.NORMAL) if model.flag("rope.scaling.finetuned", True) else None
    logit_scale = model.number("logit_scale")
    if logit_scale == 0.0:
        raise QuantkitError(f"the metadata's {model.arch}.logit_scale is 0, and logits are divided by it")
    return model.spec(
        (
            model.layer(
                i,
                model.attention(i, rope, scale=model.scale) if model.heads_kv[i] or not hybrid else model.mamba2(i),
                feed_forward(i),
                branch_scale=model.number("residual_scale", 0.0) or 1.0,
            )
            for i in range(model.n_layer)
        ),
        embedding_scale=model.number("embedding_scale", 0.0) or 1.0,
        logit_scale=1.0 / logit_scale,
    )


class Granite(Llama):
    """GraniteForCausalLM."""

    gguf_name = "granite"
    usual_pre = "refact"
    checkpoints = {  # noqa: RUF012
        "GraniteForCausalLM": {
            **Llama.checkpoints["LlamaForCausalLM"],
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    }
    derived = MULTI_HEAD
    parameters = (
        *Llama.parameters,
        Field("add_attention_scale", ("attention_multiplier",), number=True, truthy=True),
        Field("add_embedding_scale", ("embedding_multiplier",), number=True, truthy=True),
        Field("add_residual_scale", ("residual_multiplier",), number=True, truthy=True),
        Field("add_logit_scale", ("logits_scaling",), number=True, truthy=True),
    )
    notes = "multipliers"

    def complete(self, config: Config) -> Config:
        """Its heads share the hidden size, whatever `head_dim` says."""
        return super().complete(config).without("head_dim")

    def canonical_name(self, name: str) -> str | None:
        """Granite's speech and vision models have parts of their own names."""
        other = name.startswith("encoder.") or any(part in name for part in ("image_", "_projectors"))
        return None if other else super().canonical_name(name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with four multipliers."""
        return forward(metadata, tensors)


_MOE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "rope_theta": 10000.0,
}


class GraniteMoe(Granite):
    """GraniteMoeForCausalLM and GraniteMoeSharedForCausalLM. Without experts the shared block is the only one."""

    gguf_name = "granitemoe"
    checkpoints = {  # noqa: RUF012
        "GraniteMoeForCausalLM": _MOE,
        "GraniteMoeSharedForCausalLM": {**_MOE, "shared_intermediate_size": 0},
    }
    parameters = (
        *Granite.parameters,
        Field("add_expert_shared_feed_forward_length", ("shared_intermediate_size",), truthy=True),
    )
    pieces = {  # noqa: RUF012
        ".block_sparse_moe.input_linear.weight": {
            f".mlp.experts.{half}_proj.weight": Transform(part(i, 2)) for i, half in enumerate(HALVES)
        },
        ".shared_mlp.input_linear.weight": {
            f".mlp.shared_expert.{half}_proj.weight": Transform(part(i, 2)) for i, half in enumerate(HALVES)
        },
        ".dense_mlp.input_linear.weight": {
            f".mlp.{half}_proj.weight": Transform(part(i, 2)) for i, half in enumerate(HALVES)
        },
        ".dense_mlp.output_linear.weight": {".mlp.down_proj.weight": Transform()},
    }
    notes = "experts, a shared expert; multipliers"

    def canonical_name(self, name: str) -> str | None:
        """Without experts, what they would share is the block of the layer."""
        found = super().canonical_name(name)
        if found is None or self.config.integer("num_local_experts"):
            return found
        return found.replace(".shared_mlp.", ".dense_mlp.")

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Granite's, with experts beside what they share."""
        return forward(metadata, tensors)
