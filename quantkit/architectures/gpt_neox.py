"""GPT-NeoX and Pythia: parallel attention and MLP, partial rotary embedding, fused attention with biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    LAYER_NORM_EPSILON,
    block_count,
    rope_dimensions,
)
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ASSUMED_BASE = 10000.0  # llama.cpp's where the metadata names none


def _queries_keys_values(config: Config, stored: np.ndarray) -> np.ndarray:
    """Rows from (head, which of the three) to (which of the three, head)."""
    n_heads = config.require("num_attention_heads")
    return np.swapaxes(stored.reshape(n_heads, 3, stored.shape[0] // n_heads // 3, *stored.shape[1:]), 0, 1)


def _parallel_residual(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_parallel_residual(architecture.config.find("use_parallel_residual") is not False)


def _rope_base(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    if (base := architecture.rope.number("rope_theta")) not in (None, _ASSUMED_BASE):
        writer.add_rope_freq_base(base)


class GPTNeoX(Architecture):
    """GPTNeoXForCausalLM."""

    gguf_name = "gptneox"
    checkpoints = {  # noqa: RUF012
        "GPTNeoXForCausalLM": {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
        }
    }
    parameters = (
        CONTEXT,
        EMBEDDING,
        block_count,
        FEED_FORWARD,
        rope_dimensions,
        HEADS,
        _parallel_residual,
        LAYER_NORM_EPSILON,
        _rope_base,
    )
    transforms = {  # noqa: RUF012
        f".attention.query_key_value.{kind}": Transform(rearrange=_queries_keys_values) for kind in ("weight", "bias")
    }
    notes = "Pythia too; parallel residual, partial rotary"

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated."""
        part = self.config.number("rotary_pct")
        if part is None:
            part = self.rope.number("partial_rotary_factor", default=0.25) or 0.0
        return int(part * (self.config.require("hidden_size") // self.config.require("num_attention_heads")))

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LayerNorms, partial rotary embedding, GELU without a gate; usually both parts read the same."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)
        parallel = model.flag("use_parallel_residual")
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope),
                model.feed_forward(i, Activation.GELU, gated=False),
                parallel=parallel,
            )
            for i in range(model.n_layer)
        )
