"""Granite: Llama's layers with four multipliers: of scores, embeddings, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec, RopeStyle
from quantkit.architectures.llama import Llama
from quantkit.architectures.parameters import Field
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo


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
    wrappers = {}  # noqa: RUF012
    derived = {"num_key_value_heads": Llama.derived["num_key_value_heads"]}  # noqa: RUF012
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
        model = ModelReader(metadata, tensors)
        model.refuse_keys("expert_count", "expert_shared_feed_forward_length", "deepstack_mapping")
        rope = model.rope(RopeStyle.NORMAL) if model.flag("rope.scaling.finetuned", True) else None
        logit_scale = model.number("logit_scale")
        if logit_scale == 0.0:
            raise QuantkitError("the metadata's granite.logit_scale is 0, and logits are divided by it")
        return model.spec(
            (
                model.layer(
                    i,
                    model.attention(i, rope, scale=model.scale),
                    model.feed_forward(i),
                    branch_scale=model.number("residual_scale", 0.0) or 1.0,
                )
                for i in range(model.n_layer)
            ),
            embedding_scale=model.number("embedding_scale", 0.0) or 1.0,
            logit_scale=1.0 / logit_scale,
        )
