"""InternLM 2 and 3: Llama's layers; the second with fused attention, group by group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantkit.architectures.base import Architecture, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

_DEFAULTS = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def _heads_of(start: int, stop: int | None, swapped: bool) -> Rearrange:
    """Of each group's heads (queries, then a key and a value) those from `start` to `stop`, halves to pairs."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        heads, groups = config.require("num_attention_heads"), config.require("num_key_value_heads")
        head = config.require("hidden_size") // heads
        each = stored.reshape(groups, heads // groups + 2, 2, head // 2, *stored.shape[1:])[:, start:stop]
        return np.swapaxes(each, 2, 3) if swapped else each

    return rearrange


class InternLM2(Architecture):
    """InternLM2ForCausalLM, a class of its checkpoints' own code."""

    gguf_name = "internlm2"
    checkpoints = {"InternLM2ForCausalLM": _DEFAULTS}  # noqa: RUF012
    derived = MULTI_HEAD
    pieces = {  # noqa: RUF012
        f".attention.wqkv.{kind}": {
            f".self_attn.q_proj.{kind}": Transform(_heads_of(0, -2, True)),
            f".self_attn.k_proj.{kind}": Transform(_heads_of(-2, -1, True)),
            f".self_attn.v_proj.{kind}": Transform(_heads_of(-1, None, False)),
        }
        for kind in ("weight", "bias")
    }
    vocabulary = "internlm2"
    notes = "fused attention, group by group"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        return model.spec(model.layer(i, model.attention(i, rope), model.feed_forward(i)) for i in range(model.n_layer))


class InternLM3(Llama):
    """InternLM3ForCausalLM, a class of its checkpoints' own code. llama.cpp takes it for a Llama."""

    checkpoints = {"InternLM3ForCausalLM": {**_DEFAULTS, "vocab_size": 128512}}  # noqa: RUF012
    derived = MULTI_HEAD
    vocabulary = "internlm3"
    notes = "a Llama with a vocabulary of its own"
