"""BERT, DistilBERT, RoBERTa and XLM-RoBERTa: encoders.

They have learned positions, LayerNorms after what is added, GELU and no gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import SHARED, Constant, pooling
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter

# What BERT's configuration class assumes.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_DISTIL_BERT = {
    "vocab_size": 30522,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "max_position_embeddings": 512,
}
_ROBERTA = DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1}
_XLM_ROBERTA = DEFAULTS | {"pad_token_id": 1}


def labels(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The names of a classifier's classes."""
    if names := class_names(architecture.config):
        writer.add_array(f"{architecture.gguf_name}.classifier.output_labels", names)


def class_names(config: Config) -> list[str]:
    """The classes of a classifier, in the order of their numbers; none where only the two names that all have."""
    table = config.table("id2label") or {}
    if not all(str(key).isdecimal() and isinstance(name, str) for key, name in table.items()):
        raise config.wrong(("id2label",), table, "names by numbers")
    names = [table[key] for key in sorted(table, key=int)]
    return [] if len(names) == 2 and names[0] == "LABEL_0" else names


def classifier_pooling(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """What a classifier reads: the first token's vector, or the mean.

    GGUF has no number for "late", the mean of what each token is classified as.
    """
    kind = architecture.config.find("classifier_pooling")
    if kind in (None, "late"):
        return
    numbers = {"mean": 1, "cls": 2}
    if kind not in numbers:
        raise architecture.config.wrong(("classifier_pooling",), kind, "cls, mean or late")
    writer.add_uint32(f"{architecture.gguf_name}.classifier.pooling_type", numbers[kind])


class Bert(Architecture):
    """BertModel, without the parts that it was trained with, and its classifiers."""

    gguf_name = "bert"
    checkpoints = dict.fromkeys(("BertModel", "BertForMaskedLM", "BertForSequenceClassification"), DEFAULTS)
    parameters = (*SHARED, Constant("add_causal_attention", False), pooling, labels)
    vocabulary = "wordpiece"
    notes = "encoder; pooling as sentence-transformers says; classifiers are converted"
    prefix: ClassVar[str] = "bert."

    def canonical_name(self, name: str) -> str | None:
        """See Architecture: without the prefix, and none of what only training needs."""
        name = name.removeprefix(self.prefix)
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        unused = ("embeddings.position_ids", "pooler.dense.", "cls.predictions", "cls.seq_relationship")
        return None if name.startswith(unused) else super().canonical_name(name)

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """See Architecture."""
        if name.startswith("classifier.") and name.count(".") == 1 and class_names(self.config):
            name = name.replace("classifier.", "classifier.out_proj.")
        yield from super().assemble(name, stored_name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms follow what is added, so the last layer's is the model's."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        return encoder_spec(
            model,
            [model.attention(i, None) for i in range(model.n_layer)],
            [model.feed_forward(i, Activation.GELU, gated=False) for i in range(model.n_layer)],
            position_embedding="position_embd.weight",
        )


class DistilBert(Bert):
    """DistilBertModel: BERT without segments, its parts called otherwise; every norm's epsilon is fixed."""

    checkpoints = dict.fromkeys(
        ("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"), _DISTIL_BERT
    )
    parameters = (Constant("add_layer_norm_eps", 1e-12), *Bert.parameters)
    prefix = "distilbert."

    def canonical_name(self, name: str) -> str | None:
        """See Architecture: without what predicts hidden words."""
        return None if name.startswith("vocab_") else super().canonical_name(name)


def encoder_spec(model: ModelReader, attention: list[Any], feed_forward: list[Any], **changes: Any) -> ForwardSpec:
    """An encoder with norms after what is added; `changes` are fields of its description."""
    last = model.n_layer - 1
    layers = [
        model.layer(
            i, attention[i], feed_forward[i],
            attention_norm=None, feed_forward_norm=None,
            out_attention_norm=model.norm(f"blk.{i}.attn_output_norm"),
            out_feed_forward_norm=model.norm(f"blk.{i}.layer_output_norm") if i < last else None,
        )
        for i in range(model.n_layer)
    ]  # fmt: skip
    return model.spec(
        layers,
        output_norm=model.norm(f"blk.{last}.layer_output_norm"),
        segment_embedding="token_types.weight" if "token_types.weight" in model.tensors else None,
        embedding_norm=model.norm("token_embd_norm"),
        head=model.head(),
        **changes,
    )


def _offset(config: Config) -> int:
    """How many rows of the position embedding come before that of the first token."""
    padding = config.integer("pad_token_id")
    return 0 if padding is None else padding + 1


def _from_first(config: Config, stored: np.ndarray) -> np.ndarray:
    """The positions of tokens: the first rows are for padding."""
    return stored[_offset(config) :]


class Roberta(Bert):
    """RobertaModel: byte-level BPE, and positions counted from the padding token's id on."""

    checkpoints = dict.fromkeys(("RobertaModel", "RobertaForSequenceClassification"), _ROBERTA)
    transforms = {"embeddings.position_embeddings.weight": Transform(_from_first)}  # noqa: RUF012
    vocabulary = "roberta"
    usual_pre: ClassVar[str | None] = "roberta-bpe"
    notes = "encoder; positions count from the padding token on"
    prefix = "roberta."

    def complete(self, config: Config) -> Config:
        """See Architecture: positions that no token has do not count."""
        config = super().complete(config)
        positions = config.require("max_position_embeddings")
        if positions <= _offset(config):
            raise QuantkitError(f"{config.path}: no positions are left of {positions} after the padding token's")
        return config.changed(max_position_embeddings=positions - _offset(config))


class XlmRoberta(Roberta):
    """XLMRobertaModel: RoBERTa with a Unigram vocabulary."""

    checkpoints = dict.fromkeys(("XLMRobertaModel", "XLMRobertaForSequenceClassification"), _XLM_ROBERTA)
    vocabulary = "xlm-roberta"
    usual_pre: ClassVar[str | None] = None
    notes = "encoder; Unigram vocabulary; bge-m3 and multilingual E5"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.find("lora_adaptations"):
            raise QuantkitError(f"{config.path}: adapters within the checkpoint (lora_adaptations) are not supported")
