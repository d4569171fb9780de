"""Phi-1, 1.5 and 2: parallel attention and MLP after one LayerNorm, biases everywhere, partial rotary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    EMBEDDING,
    HEADS,
    Constant,
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


def _feed_forward(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_feed_forward_length(4 * architecture.config.require("hidden_size", "n_embd"))


class Phi2(Architecture):
    """PhiForCausalLM. Its feed-forward length is four times the embedding, and keys have as many heads as queries."""

    gguf_name = "phi2"
    checkpoints = {  # noqa: RUF012
        "PhiForCausalLM": {
            "vocab_size": 51200,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    parameters = (
        Field("add_context_length", ("n_positions", "max_position_embeddings")),
        EMBEDDING,
        _feed_forward,
        block_count,
        HEADS,
        Field("add_head_count_kv", HEADS.names),
        Field("add_layer_norm_eps", ("layer_norm_epsilon", "layer_norm_eps"), number=True),
        rope_dimensions,
        file_type,
        Constant("add_add_bos_token", False),
    )
    notes = "Phi-1 and 1.5 too; parallel residual, biases, partial rotary"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated."""
        part = self.rope.required("partial_rotary_factor")
        return int(part * self.config.require("hidden_size", "n_embd")) // self.config.require(*HEADS.names)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Both parts read the same normalised input."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope),
                model.feed_forward(i, Activation.GELU, gated=False),
                feed_forward_norm=model.norm(f"blk.{i}.attn_norm"),
                parallel=True,
            )
            for i in range(model.n_layer)
        )
