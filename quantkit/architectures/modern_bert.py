"""ModernBERT: an encoder with norms before each part, rotary embedding, and windows around tokens in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.bert import Bert, classifier_pooling, labels
from quantkit.architectures.feed_forward import Activation, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import SHARED, VOCABULARY_SIZE, Constant, Field, pooling, rope_unscaled
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ACTIVATIONS = {"gelu": Activation.GELU, "silu": Activation.SILU}
_DEFAULTS = {
    "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
    "num_attention_heads": 12, "max_position_embeddings": 8192, "norm_eps": 1e-5, "local_attention": 128,
    "classifier_pooling": "cls", "hidden_activation": "gelu", "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}  # fmt: skip

_MEAN = 1  # what a classifier reads where the metadata is silent


def _activation(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The nonlinearity of the gate."""
    name = architecture.config.find("hidden_activation")
    if name is None:
        return
    if name not in _ACTIVATIONS:
        raise architecture.config.wrong(("hidden_activation",), name, " or ".join(_ACTIVATIONS))
    writer.add_string(f"{architecture.gguf_name}.hidden_activation", name)


class ModernBert(Bert):
    """ModernBertModel, and its classifiers."""

    gguf_name = "modern-bert"
    checkpoints = dict.fromkeys(("ModernBertModel", "ModernBertForSequenceClassification"), _DEFAULTS)
    parameters = (
        *SHARED,
        Constant("add_causal_attention", False),
        pooling,
        classifier_pooling,
        labels,
        Field("add_sliding_window", ("local_attention",)),
        Field("add_sliding_window_pattern", ("global_attn_every_n_layers",)),
        rope_unscaled,
        VOCABULARY_SIZE,
        _activation,
    )
    vocabulary = "modern-bert"
    usual_pre = "modern-bert"
    notes = "encoder; windows around tokens, two rotary bases"
    prefix = "model."

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """The first layer, and every so many, sees all tokens, and has no norm of its own where it is the first."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        name = metadata.string(f"{model.arch}.hidden_activation", "gelu")
        if name not in _ACTIVATIONS:
            raise metadata.wrong(f"{model.arch}.hidden_activation", " or ".join(_ACTIVATIONS))
        window = model.integer("attention.sliding_window", 0) or None
        period = model.integer("attention.sliding_window_pattern", 3)
        full = model.rope(RopeStyle.NEOX)
        local = replace(full, freq_base=model.number("rope.freq_base_swa", full.freq_base))
        layers = []
        for i in range(model.n_layer):
            near = window is not None and period > 0 and i % period != 0
            attention = model.attention(i, local if near else full, window=window if near else None)
            block = FeedForward(
                model.feed_forward_sizes[i],
                model.linear(f"blk.{i}.ffn_down"),
                _ACTIVATIONS[name],
                gate_up=model.linear(f"blk.{i}.ffn_up"),
            )
            norm = model.norm(f"blk.{i}.attn_norm") if f"blk.{i}.attn_norm.weight" in tensors else None
            layers.append(model.layer(i, attention, block, attention_norm=norm))
        head = model.head(_MEAN, gelu=True)
        return model.spec(layers, embedding_norm=model.norm("token_embd_norm"), head=head)
