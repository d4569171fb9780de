"""Jina BERT v2: BERT with ALiBi (Press et al. 2022) in the place of positions, and a gate."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.bert import DEFAULTS, Bert, encoder_spec
from quantkit.architectures.feed_forward import Activation, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

_ALIBI = 8.0


class JinaBert(Bert):
    """JinaBertModel, as jina-embeddings-v2 publishes it."""

    gguf_name = "jina-bert-v2"
    checkpoints = dict.fromkeys(("JinaBertModel", "JinaBertForMaskedLM"), DEFAULTS | {"max_position_embeddings": 8192})
    vocabulary = "jina-bert"
    notes = "encoder; ALiBi and a gate; jina-embeddings-v2"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """BERT's; the gate stands above what it multiplies, in one matrix, or by itself."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        layers = range(model.n_layer)
        return encoder_spec(
            model,
            [model.attention(i, None, alibi=_ALIBI) for i in layers],
            [_feed_forward(model, i) for i in layers],
        )


def _feed_forward(model: ModelReader, i: int) -> FeedForward:
    up, n_ff = model.tensors.get(f"blk.{i}.ffn_up.weight"), model.feed_forward_sizes[i]
    if up is None or up.n_rows == n_ff:
        return model.feed_forward(i, Activation.GELU, gated=f"blk.{i}.ffn_gate.weight" in model.tensors)
    product = model.linear(f"blk.{i}.ffn_up")
    return FeedForward(n_ff, model.linear(f"blk.{i}.ffn_down"), Activation.GELU, gate_up=product)
