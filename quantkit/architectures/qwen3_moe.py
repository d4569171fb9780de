"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from quantkit.architectures.base import Assembly, Rearrange, StackedExperts, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec, RopeStyle
from quantkit.architectures.parameters import SHARED, Field
from quantkit.architectures.qwen3 import Qwen3
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo


def _half(second: bool) -> Rearrange:
    def rearrange(_config: Config, stored: np.ndarray) -> np.ndarray:
        n, rest = divmod(stored.shape[1], 2)
        if stored.ndim != 3 or rest:
            raise ValueError
        return stored[:, n:] if second else stored[:, :n]

    return rearrange


class Qwen3Moe(Qwen3):
    """Qwen3MoeForCausalLM. Experts are stored one by one, or stacked with gate and up projections in one tensor."""

    gguf_name = "qwen3moe"
    checkpoints = {  # noqa: RUF012
        "Qwen3MoeForCausalLM": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
        }
    }
    derived = {  # noqa: RUF012
        **Qwen3.derived,
        "num_local_experts": lambda config: config.integer("num_experts") or 128,
    }
    parameters = (*SHARED, Field("add_expert_feed_forward_length", ("moe_intermediate_size",)))
    experts = StackedExperts(
        count=("num_local_experts",),
        part="model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
        merged="model.layers.{layer}.mlp.experts.{projection}.weight",
        projections=("down_proj", "gate_proj", "up_proj"),
    )
    vocabulary = "bpe"
    notes = "experts in 3-D tensors"

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """Stacked experts come without `.weight`, and their gate and up projections are cut apart."""
        stem = name.removesuffix(".weight")
        if stem.endswith(".experts.gate_up_proj"):
            for projection, second in (("gate_proj", False), ("up_proj", True)):
                part = stem.replace("gate_up_proj", projection) + ".weight"
                yield Assembly(self.gguf_tensor_name(part), (stored_name,), Transform(_half(second)))
        elif stem.endswith(".experts.down_proj"):
            yield from super().assemble(f"{stem}.weight", stored_name)
        else:
            yield from super().assemble(name, stored_name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen3's, with experts; llama.cpp always normalises their weights."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        sizes = model.per_layer("expert_feed_forward_length", 0)
        if min(sizes) < 1:
            sizes = [
                n_ff // n_used
                for n_ff, n_used in zip(
                    model.per_layer("feed_forward_length"), model.per_layer("expert_used_count", low=1), strict=True
                )
            ]
        return model.spec(
            model.layer(i, model.attention(i, rope, **model.qk_norms(i)), model.experts(i, sizes[i]))
            for i in range(model.n_layer)
        )
