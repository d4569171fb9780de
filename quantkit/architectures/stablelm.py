"""StableLM: LayerNorms and a gated MLP, partial rotary embedding; the largest with QK norms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.experts import Stack
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KEY_VALUE_HEADS,
    Field,
    block_count,
    file_type,
    rope_dimensions,
)
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _parallel_residual(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_parallel_residual(architecture.config.find("use_parallel_residual") is not False)


class StableLm(Architecture):
    """StableLmForCausalLM. The norms of heads are stored one by one, and stacked as experts are elsewhere."""

    gguf_name = "stablelm"
    checkpoints = {  # noqa: RUF012
        "StableLmForCausalLM": {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-05,
            "use_parallel_residual": False,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    parameters = (
        CONTEXT,
        EMBEDDING,
        block_count,
        FEED_FORWARD,
        rope_dimensions,
        HEADS,
        KEY_VALUE_HEADS,
        _parallel_residual,
        Field("add_layer_norm_eps", ("layer_norm_eps", "norm_eps"), number=True),
        file_type,
    )
    stacks = tuple(
        Stack(
            count=(heads,),
            part=f"model.layers.{{layer}}.self_attn.{name}_layernorm.norms.{{item}}.weight",
            merged=f"model.layers.{{layer}}.self_attn.{name}_layernorm.weight",
            projections=("",),
        )
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    )
    notes = "LayerNorms, partial rotary"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated."""
        return int(self.rope.required("partial_rotary_factor") * super().rope_dimensions)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Where there is no norm before the MLP, it reads what attention reads."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)

        def changes(i: int) -> dict[str, object]:
            if f"blk.{i}.ffn_norm.weight" in tensors:
                return {}
            return {"parallel": True, "feed_forward_norm": model.norm(f"blk.{i}.attn_norm")}

        return model.spec(
            model.layer(
                i,
                model.attention(i, rope),
                model.feed_forward(i),
                **changes(i),
            )
            for i in range(model.n_layer)
        )
