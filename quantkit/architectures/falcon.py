"""Falcon: parallel attention and MLP, one or few heads of keys and values, fused attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import EMBEDDING, Constant, Field, block_count, file_type
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_HEADS = ("num_attention_heads", "n_head")


def _n_groups(config: Config) -> int:
    return config.integer("num_kv_heads", "n_head_kv") or 1


def _heads_of(start: int, stop: int | None) -> Rearrange:
    """Of each group's heads (queries, then a key and a value) those from `start` to `stop`."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        groups, head = _n_groups(config), config.require("hidden_size") // config.require(*_HEADS)
        heads = stored.reshape(groups, stored.shape[0] // groups // head, head, *stored.shape[1:])
        return heads[:, start:stop]

    return rearrange


def _key_value_heads(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_head_count_kv(_n_groups(architecture.config))


def _feed_forward(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    writer.add_feed_forward_length(4 * architecture.config.require("hidden_size"))


class Falcon(Architecture):
    """FalconForCausalLM. Its context is 2,048 tokens, which its config does not say."""

    gguf_name = "falcon"
    checkpoints = {  # noqa: RUF012
        "FalconForCausalLM": {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-05,
            "rope_theta": 10000.0,
        },
    }
    parameters = (
        Constant("add_context_length", 2048),
        Constant("add_tensor_data_layout", "jploski"),
        EMBEDDING,
        _feed_forward,
        block_count,
        Field("add_head_count", _HEADS),
        _key_value_heads,
        Field("add_layer_norm_eps", ("layer_norm_epsilon",), number=True),
        file_type,
    )
    transforms = {  # noqa: RUF012
        f".query_key_value.{kind}": Transform((_heads_of(0, -2), _heads_of(-2, -1), _heads_of(-1, None)))
        for kind in ("weight", "bias")
    }
    notes = "parallel residual, grouped or single keys and values"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Both parts read the input, each through a norm of its own where there are two."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NEOX)

        def attention_norm(i: int) -> str:
            second = f"blk.{i}.attn_norm_2"
            return second if f"{second}.weight" in tensors else f"blk.{i}.attn_norm"

        return model.spec(
            model.layer(
                i,
                model.attention(i, rope),
                model.feed_forward(i, Activation.GELU, gated=False),
                attention_norm=model.norm(attention_norm(i)),
                feed_forward_norm=model.norm(f"blk.{i}.attn_norm"),
                parallel=True,
            )
            for i in range(model.n_layer)
        )
