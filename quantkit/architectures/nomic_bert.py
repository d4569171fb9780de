"""Nomic BERT: BERT with rotary embedding, and either a gate and hardly a bias, or experts in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.bert import Bert, encoder_spec
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import Field
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import in_turn, transpose
from quantkit.formats.gguf import Metadata, TensorInfo

# How many positions were trained, by how many the model is said to have and to be trained for.
_TRAINED = {(8192, 2048): 2048, (2048, 2048): 512}
# What the forward pass takes for granted.
_FIXED = {
    "causal": False, "prenorm": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}  # fmt: skip
_BIASES = ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")


class NomicBert(Bert):
    """NomicBertModel as its authors publish it: nomic-embed-text v1 and v1.5."""

    gguf_name = "nomic-bert"
    checkpoints = {  # noqa: RUF012
        "NomicBertModel": {
            "vocab_size": 30528,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": 3072,
            "n_positions": 8192,
            "type_vocab_size": 2,
            "layer_norm_epsilon": 1e-12,
        }
    }
    vocabulary = "wordpiece-or-xlm-roberta"
    notes = "encoder; rotary embedding, a gate"
    fixed: ClassVar[dict[str, Any]] = _FIXED | {"activation_function": "swiglu"} | dict.fromkeys(_BIASES, False)

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """With experts it has another name in GGUF."""
        return (NomicBertMoe if config.find("moe_every_n_layers") else cls)(config)

    def complete(self, config: Config) -> Config:
        """See Architecture: the positions that were trained are those that count."""
        for name, value in self.fixed.items():
            if config.find(name) not in (value, None):
                raise config.wrong((name,), config.find(name), f"{value}")
        said = config.require("n_positions"), config.integer("max_trained_positions") or 2048
        if said not in _TRAINED:
            raise config.wrong(("n_positions",), said[0], "8192 or 2048, with 2048 trained positions")
        return super().complete(config).changed(n_positions=_TRAINED[said])

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """BERT's, with rotary embedding in the place of learned positions."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope, layers = model.rope(RopeStyle.NEOX), range(model.n_layer)
        return encoder_spec(model, [model.attention(i, rope) for i in layers], [model.feed_forward(i) for i in layers])


def _by_expert(config: Config, stored: np.ndarray) -> np.ndarray:
    """Experts' matrices, stored below each other, one behind the other."""
    return stored.reshape(config.require("num_experts", "num_local_experts"), -1, stored.shape[-1])


class NomicBertMoe(NomicBert):
    """NomicBertModel with experts: nomic-embed-text v2.

    A bias that the experts of a layer share is left out, as by the reference converter: llama.cpp has no place for one.
    """

    gguf_name = "nomic-bert-moe"
    checkpoints = NomicBert.checkpoints
    parameters = (
        *NomicBert.parameters,
        Field("add_moe_every_n_layers", ("moe_every_n_layers",)),
        Field("add_expert_used_count", ("moe_top_k",)),
    )
    pieces = {  # noqa: RUF012
        ".mlp.experts.mlp.w1": {".mlp.experts.mlp.w1.weight": Transform(_by_expert, n_axes=3)},
        ".mlp.experts.mlp.w2": {".mlp.experts.mlp.w2.weight": Transform(in_turn(_by_expert, transpose), n_axes=3)},
    }
    notes = "nomic-embed-text v2; experts in every other layer"
    fixed = _FIXED | {"activation_function": "gelu"} | dict.fromkeys(_BIASES, True)

    def canonical_name(self, name: str) -> str | None:
        """See Architecture: without the experts' biases."""
        return None if name.endswith(".mlp.experts.bias") else super().canonical_name(name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Layers have experts without gates, or a block without one."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope, layers = model.rope(RopeStyle.NEOX), range(model.n_layer)
        period = model.integer("moe_every_n_layers", 0)
        return encoder_spec(
            model,
            [model.attention(i, rope) for i in layers],
            [
                model.experts(i, activation=Activation.GELU, gate=None, normalised=False)
                if period and i % period == 1
                else model.feed_forward(i, Activation.GELU, gated=False)
                for i in layers
            ],
        )
