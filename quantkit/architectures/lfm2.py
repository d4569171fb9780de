"""LFM2: short convolutions, and every few layers attention with QK norms; dense, or with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.experts import Stack
from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.glm4_moe import sigmoid
from quantkit.architectures.mixers import Attention, RopeStyle
from quantkit.architectures.parameters import (
    EXPERT_FEED_FORWARD,
    KEY_VALUE_HEADS,
    RMS_EPSILON,
    SHARED,
    VOCABULARY_SIZE,
    Field,
)
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS, kernel
from quantkit.architectures.recurrent_mixers import Convolution, ShortConvolution
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _key_value_heads(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """Those of each layer: none where it is a convolution."""
    heads = architecture.config.require("num_key_value_heads")
    kinds = architecture.config.listed("layer_types", architecture.n_layers)
    writer.add_head_count_kv([heads if kind == "full_attention" else 0 for kind in kinds])


def _feed_forward_length(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The size of the feed-forward blocks, which the config gives before it is adjusted."""
    config = architecture.config
    size = config.require("block_ff_dim", "intermediate_size")
    if config.find("block_auto_adjust_ff_dim"):
        size = int(2 * size / 3)
        multiplier, multiple = config.number("block_ffn_dim_multiplier"), config.require("block_multiple_of")
        size = int(multiplier * size) if multiplier is not None else size
        size = -(-size // multiple) * multiple
    writer.add_feed_forward_length(size)


def _forward(metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
    """Layers without heads of keys are convolutions."""
    model = ModelReader(metadata, tensors)
    model.refuse_keys("attention.sliding_window_pattern")
    rope, size = model.rope(RopeStyle.NEOX), model.integer("shortconv.l_cache")
    window = model.integer("attention.sliding_window", 0) or None
    experts = model.integer("expert_count", 0) > 0

    def mixer(i: int) -> Attention | ShortConvolution:
        if model.heads_kv[i]:
            return model.attention(i, rope, window=window, **model.qk_norms(i))
        at = f"blk.{i}.shortconv."
        return ShortConvolution(
            project=model.linear(f"{at}in_proj"),
            convolution=Convolution(f"{at}conv.weight", size, model.n_embd),
            out=model.linear(f"{at}out_proj"),
        )

    def feed_forward(i: int) -> FeedForward | Experts:
        if not experts:
            return model.feed_forward(i)
        return model.feed_forward_or_experts(i, gating=model.gating(), normalised=True)

    return model.spec(
        (model.layer(i, mixer(i), feed_forward(i)) for i in range(model.n_layer)),
        output_norm=model.norm("token_embd_norm"),
    )


_SHARED = tuple(_key_value_heads if parameter is KEY_VALUE_HEADS else parameter for parameter in SHARED)
_CACHE = Field("add_shortconv_l_cache", ("conv_L_cache",))

_LFM2 = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "rope_theta": 1000000.0,
}


class Lfm2(Architecture):
    """Lfm2ForCausalLM."""

    gguf_name = "lfm2"
    checkpoints = {"Lfm2ForCausalLM": _LFM2, "LFM2ForCausalLM": _LFM2}  # noqa: RUF012
    wrappers = {"Lfm2VlForConditionalGeneration": {"lfm2": _LFM2}}  # noqa: RUF012
    parameters = (*_SHARED, VOCABULARY_SIZE, _CACHE, RMS_EPSILON, _feed_forward_length)
    transforms = {".conv.conv.weight": Transform(kernel, n_axes=2)}  # noqa: RUF012
    notes = "short convolutions"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Short convolutions, and attention with QK norms."""
        return _forward(metadata, tensors)


class Lfm2Moe(Lfm2):
    """Lfm2MoeForCausalLM."""

    gguf_name = "lfm2moe"
    checkpoints = {  # noqa: RUF012
        "Lfm2MoeForCausalLM": {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128000,
            "norm_eps": 1e-05,
            "conv_L_cache": 3,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "rope_theta": 1000000.0,
        },
    }
    parameters = (
        *_SHARED,
        EXPERT_FEED_FORWARD,
        Field("add_leading_dense_block_count", ("num_dense_layers",)),
        sigmoid,
        VOCABULARY_SIZE,
        _CACHE,
    )
    stacks = (
        Stack(
            count=("num_local_experts", "num_experts"),
            part="model.layers.{layer}.feed_forward.experts.{item}.{projection}.weight",
            merged="layers.{layer}.feed_forward.experts.{projection}.weight",
            projections=("w1", "w2", "w3"),
        ),
    )
    pieces = STACKED_EXPERTS
    renames = {**Lfm2.renames, ".expert_bias": ".expert_bias.bias"}  # noqa: RUF012
    notes = "short convolutions, experts"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LFM2's, with experts after the first layers."""
        return _forward(metadata, tensors)
