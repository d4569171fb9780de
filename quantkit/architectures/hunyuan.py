"""Hunyuan: Llama's layers with QK norms after the rotation, dense or with experts and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import HEAD_SIZE, MULTI_HEAD, SHARED, Field, Parameter
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The context of the models whose rotary base grows with a factor; their config does not say it.
_LONG_CONTEXT = 256 * 1024


def _enlarged_base(alpha: float) -> Parameter:
    """The rotary base that Hunyuan's "dynamic" scaling comes to, with the factor `alpha` where there is none."""

    def add(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        from gguf import RopeScalingType

        rope = architecture.rope
        if rope.type != "dynamic":
            return
        factor, base = rope.number("alpha", default=alpha), rope.number("rope_theta", default=10000.0)
        assert factor is not None and base is not None
        dim = architecture.rope_dimensions
        writer.add_rope_freq_base(base * factor ** (dim / (dim - 2)))
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1)
        writer.add_rope_scaling_orig_ctx_len(_LONG_CONTEXT)
        writer.add_context_length(_LONG_CONTEXT)

    return add


class HunyuanDense(Architecture):
    """HunYuanDenseV1ForCausalLM."""

    gguf_name = "hunyuan-dense"
    checkpoints = {  # noqa: RUF012
        "HunYuanDenseV1ForCausalLM": {
            "vocab_size": 290943,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD | HEAD_SIZE
    parameters = (*SHARED, _enlarged_base(50.0))
    vocabulary = "hunyuan"
    notes = "QK norms after rotary"

    def complete(self, config: Config) -> Config:
        """A single expert counts as none."""
        return super().complete(config.without("num_experts") if config.find("num_experts") == 1 else config)

    def canonical_name(self, name: str) -> str | None:
        """An output matrix that is the embedding is left out."""
        name = super().canonical_name(name) or ""
        tied = name == "lm_head.weight" and self.config.find("tie_word_embeddings")
        return None if tied or not name else name

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with rotary halves; the norms of queries and keys come after the rotation."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(i, model.attention(i, rope, norm_rotated=True, **model.qk_norms(i)), model.feed_forward(i))
            for i in range(model.n_layer)
        )


def _each(add: str, name: str) -> Parameter:
    """A number that the config may give for each layer, in a list: all the same."""

    def write(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        value: Any = architecture.config.find(name)
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                raise architecture.config.wrong((name,), value, "one number for all layers")
            value = value[0]
        if value is not None:
            getattr(writer, add)(Config({name: value}, architecture.config.path).require(name))

    return write


class HunyuanMoe(HunyuanDense):
    """HunYuanMoEV1ForCausalLM."""

    gguf_name = "hunyuan-moe"
    checkpoints = {  # noqa: RUF012
        "HunYuanMoEV1ForCausalLM": {
            "vocab_size": 290943,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "num_experts": 1,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = (
        *SHARED,
        Field("add_expert_shared_feed_forward_length", ("intermediate_size",)),
        _each("add_expert_feed_forward_length", "moe_intermediate_size"),
        _each("add_expert_used_count", "moe_topk"),
        _each("add_expert_shared_count", "num_shared_expert"),
        _enlarged_base(1000.0),
    )
    stacks = (EXPERTS,)
    pieces = STACKED_EXPERTS
    vocabulary = "hunyuan-moe"
    notes = "experts and a shared expert; QK norms after rotary"

    def complete(self, config: Config) -> Config:
        """A single expert counts as one here."""
        return Architecture.complete(self, config)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """The dense model's, with experts and a shared expert."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        n_ff, shared = (
            model.per_layer("expert_feed_forward_length"),
            model.integer("expert_shared_feed_forward_length", 0),
        )
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, norm_rotated=True, **model.qk_norms(i)),
                model.experts(i, n_ff[i], shared=model.shared_experts(i, shared or model.feed_forward_sizes[i])),
            )
            for i in range(model.n_layer)
        )
