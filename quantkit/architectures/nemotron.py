"""Nemotron 3 and Minitron: LayerNorms stored off by one, partial rotary, squared ReLU without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.gemma2 import plus_one
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import HEAD_SIZE, MULTI_HEAD, SHARED, VOCABULARY_SIZE, Field, rope_dimensions
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _scaling(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    from gguf import RopeScalingType

    factor = architecture.config.number("factor") or architecture.rope.number("factor")
    writer.add_rope_scaling_type(RopeScalingType.NONE if factor is None else RopeScalingType.LINEAR)
    if factor is not None:
        writer.add_rope_scaling_factor(factor)


class Nemotron(Architecture):
    """NemotronForCausalLM."""

    gguf_name = "nemotron"
    checkpoints = {  # noqa: RUF012
        "NemotronForCausalLM": {
            "vocab_size": 256000,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 32,
            "num_attention_heads": 48,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    derived = MULTI_HEAD | HEAD_SIZE
    parameters = (
        *SHARED,
        VOCABULARY_SIZE,
        Field("add_layer_norm_eps", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"), number=True),
        rope_dimensions,
        _scaling,
    )
    transforms = {"norm.weight": Transform(arithmetic=plus_one)}  # noqa: RUF012
    vocabulary = "nemotron"
    notes = "Minitron too; LayerNorms stored off by one, squared ReLU"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated."""
        part = self.rope.required("partial_rotary_factor")
        return int(part * self.config.require("hidden_size")) // self.config.require("num_attention_heads")

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LayerNorms, partial rotary embedding, squared ReLU without a gate."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)
        return model.spec(
            model.layer(i, model.attention(i, rope), model.feed_forward(i, Activation.RELU_SQUARED, gated=False))
            for i in range(model.n_layer)
        )
