"""Llama, and the dense Mistral models, which share its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Assembly, Rearrange, Transform
from quantkit.architectures.config import Config

if TYPE_CHECKING:
    from gguf import GGUFWriter


def interleave_rotary(heads: str) -> Rearrange:
    """Rows of each head from two halves (transformers' rotary layout) to adjacent pairs (GGUF's).

    `heads` is the config field with the number of heads.
    """

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        n_heads = config.require(heads)
        halves = stored.reshape(n_heads, 2, stored.shape[0] // n_heads // 2, *stored.shape[1:])
        return np.swapaxes(halves, 1, 2)

    return rearrange


class Llama(Architecture):
    """LlamaForCausalLM and MistralForCausalLM: RMS norms, rotary attention with grouped heads, a gated MLP."""

    gguf_name = "llama"
    checkpoints = {  # noqa: RUF012
        "LlamaForCausalLM": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
        "MistralForCausalLM": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
    }
    transforms = {  # noqa: RUF012
        f"{projection}.{kind}": Transform(rearrange=interleave_rotary(heads))
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
        for kind in ("weight", "bias")
    }
    vocabulary = "auto"

    def complete(self, config: Config) -> Config:
        """One key-value head for each head, and heads that share the hidden size, unless the config says otherwise."""
        heads = config.require("num_attention_heads")
        derived = {"num_key_value_heads": heads, "head_dim": config.require("hidden_size") // heads}
        missing = {key: value for key, value in derived.items() if config.find(key) is None}
        return Config({**config.values, **missing}, config.path)

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """The shared hyper-parameters, then the vocabulary's size and the rotary dimensions."""
        super().write_parameters(writer, file_type)
        writer.add_vocab_size(self.config.require("vocab_size"))
        writer.add_rope_dimension_count(self.config.require("head_dim"))

    def computed_tensors(self) -> Iterator[Assembly]:
        """Llama 3's rope scaling is a tensor of divisors in GGUF."""
        factors = self.rope.llama3_factors(self.config.require("head_dim"))
        if factors is not None:
            yield Assembly("rope_freqs.weight", values=factors)
