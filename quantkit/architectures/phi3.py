"""Phi-3 and Phi-4: fused projections that stay fused, and LongRoPE's two lists of frequency factors as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.feed_forward import FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KEY_VALUE_HEADS,
    MULTI_HEAD,
    RMS_EPSILON,
    SLIDING_WINDOW,
    Field,
    Parameter,
    block_count,
    file_type,
    rope_dimensions,
)
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTEXT = Field("add_context_length", ("n_positions", "max_position_embeddings"))


def _original_context(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_rope_scaling_orig_ctx_len(int(architecture.rope.required("original_max_position_embeddings")))


def _rope_base(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_rope_freq_base(architecture.rope.required("rope_theta"))


class Phi3(Architecture):
    """Phi3ForCausalLM."""

    gguf_name = "phi3"
    checkpoints = {  # noqa: RUF012
        "Phi3ForCausalLM": {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        }
    }
    derived = {  # noqa: RUF012
        **MULTI_HEAD,
        "sliding_window": lambda config: 0,  # llama.cpp tells Phi-4 by this
    }
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _CONTEXT,
        _original_context,
        EMBEDDING,
        FEED_FORWARD,
        block_count,
        HEADS,
        KEY_VALUE_HEADS,
        RMS_EPSILON,
        rope_dimensions,
        _rope_base,
        file_type,
        SLIDING_WINDOW,
    )
    vocabulary = "phi3"
    notes = "Phi-3.5 and Phi-4 too; fused projections, LongRoPE"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated."""
        part = self.rope.number("partial_rotary_factor", default=1.0) or 0.0
        return int(part * self.config.require("hidden_size")) // self.config.require("num_attention_heads")

    def write_first(self, writer: GGUFWriter) -> None:
        """How much LongRoPE enlarges the scores. Source: LongRoPE, and YaRN's for the type that bears its name."""
        if self.rope.frequency_factors("long_factor", self.rope_dimensions) is None:
            return
        original = self.rope.required("original_max_position_embeddings")
        if original <= 1:
            raise QuantkitError(f"{self.config.path}: original_max_position_embeddings is {original}, too small")
        scale = self.config.require("n_positions", "max_position_embeddings") / original
        if self.rope.type not in ("su", "longrope", "yarn"):
            raise QuantkitError(f"{self.config.path}: the rope scaling {self.rope.type!r} is not supported")
        if scale <= 1:
            attention = 1.0
        elif self.rope.type == "yarn":
            attention = 0.1 * math.log(scale) + 1
        else:
            attention = math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_attn_factors(attention)

    def computed_tensors(self) -> Iterator[Assembly]:
        """LongRoPE's frequency factors, for long texts and for short ones."""
        for name, factors in self.rope.longrope_factors(self.rope_dimensions).items():
            yield Assembly(name, values=factors)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Fused products, LongRoPE's frequency factors by the length of the text; no window, as in llama.cpp."""
        model = ModelReader(metadata, tensors)
        model.refuse_keys("expert_count")
        rope = model.rope(RopeStyle.NEOX)

        def feed_forward(i: int) -> FeedForward:
            gate_up, down = model.linear(f"blk.{i}.ffn_up"), model.linear(f"blk.{i}.ffn_down")
            return FeedForward(model.feed_forward_sizes[i], gate_up=gate_up, down=down)

        return model.spec(model.layer(i, model.attention(i, rope), feed_forward(i)) for i in range(model.n_layer))
