"""T5 and its relatives, whole or the encoder alone: relative positions learned in the first layer, no rotary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.feed_forward import Activation, FeedForward
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.mixers import LearnedDistances
from quantkit.architectures.parameters import Field, Parameter, block_count, file_type
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Where the embedding may be stored, which encoder and decoder share: under one of these names, or several.
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_CONTEXT = 512  # where the config is silent
# The longest ranges of distances begin below 128 with fewer buckets than this.
_MOST_BUCKETS = 508
_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
}
_MT5 = {**_DEFAULTS, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}


def _context(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many tokens the model was trained for, by what old configs say."""
    writer.add_context_length(architecture.config.integer("n_positions") or _CONTEXT)


_SIZES = (
    _context,
    Field("add_embedding_length", ("d_model",)),
    Field("add_feed_forward_length", ("d_ff",)),
    block_count,
)
_HEADS = (
    Field("add_head_count", ("num_heads",)),
    Field("add_key_length", ("d_kv",)),
    Field("add_value_length", ("d_kv",)),
    Field("add_layer_norm_eps", ("layer_norm_epsilon",), number=True),
    Field("add_relative_attn_buckets_count", ("relative_attention_num_buckets",)),
    Field("add_layer_norm_rms_eps", ("layer_norm_epsilon",), number=True),
)


class T5(Architecture):
    """T5ForConditionalGeneration, mT5 and UMT5."""

    gguf_name = "t5"
    checkpoints = {  # noqa: RUF012
        "T5ForConditionalGeneration": {**_DEFAULTS, "decoder_start_token_id": 0},
        "T5WithLMHeadModel": {**_DEFAULTS, "decoder_start_token_id": 0},
        "MT5ForConditionalGeneration": {**_MT5, "decoder_start_token_id": 0},
        "UMT5ForConditionalGeneration": {**_MT5, "decoder_start_token_id": 0},
        "UMT5Model": {**_MT5, "decoder_start_token_id": 0},
    }
    derived = {"num_decoder_layers": lambda config: config.require("num_layers")}  # noqa: RUF012
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *_SIZES,
        Field("add_decoder_block_count", ("num_decoder_layers",)),
        *_HEADS,
        Field("add_decoder_start_token_id", ("decoder_start_token_id",)),
        file_type,
    )
    renames = {**Architecture.renames, **dict.fromkeys(_EMBEDDINGS[1:], _EMBEDDINGS[0])}  # noqa: RUF012
    vocabulary = "t5"
    notes = "encoder and decoder; evaluated is what the encoder makes of a text"

    def assemblies(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """See `Architecture`; of embeddings that are the same the first counts."""
        again = [name for name in stored if name in _EMBEDDINGS][1:]
        return super().assemblies({name: tensor for name, tensor in stored.items() if name not in again})

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """The encoder's; the decoder is left alone."""
        return _encoder(ModelReader(metadata, tensors))


def _encoder(model: ModelReader) -> ForwardSpec:
    """Every token sees all others. Scores gain what the first layer, or each layer, has learned of distances."""
    return model.spec(
        [_layer(model, i) for i in range(model.n_layer)],
        output_norm=model.norm("enc.output_norm"),
        output=model.linear("token_embd"),
        idle=tuple(name for name in model.tensors if name.startswith("dec.") or name == "output.weight"),
    )


def _layer(model: ModelReader, i: int) -> Layer:
    at, n_buckets = f"enc.blk.{i}.", model.integer("attention.relative_buckets_count", low=4, high=_MOST_BUCKETS)
    own = f"{at}attn_rel_b.weight"
    distances = LearnedDistances(own if own in model.tensors else "enc.blk.0.attn_rel_b.weight", n_buckets)
    products = {part: model.linear(f"{at}attn_{part}") for part in "qkv"}
    attention = model.attention(
        i, None, scale=1.0, causal=False, distances=distances, out=model.linear(f"{at}attn_o"), **products
    )
    gated = f"{at}ffn_gate.weight" in model.tensors
    block = FeedForward(
        model.feed_forward_sizes[i],
        model.linear(f"{at}ffn_down"),
        Activation.GELU if gated else Activation.RELU,
        gate=model.linear(f"{at}ffn_gate") if gated else None,
        up=model.linear(f"{at}ffn_up"),
    )
    norms = {"attention_norm": model.norm(f"{at}attn_norm"), "feed_forward_norm": model.norm(f"{at}ffn_norm")}
    return model.layer(i, attention, block, **norms)


class T5Encoder(T5):
    """T5EncoderModel."""

    gguf_name = "t5encoder"
    checkpoints = {"T5EncoderModel": _DEFAULTS}  # noqa: RUF012
    derived = {}  # noqa: RUF012
    parameters = (*_SIZES, *_HEADS, file_type)
    notes = "the encoder alone"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """See `T5`."""
        return _encoder(ModelReader(metadata, tensors))
