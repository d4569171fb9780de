"""Command-R and Cohere 2: parallel attention and MLP after one LayerNorm without bias, scaled logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import Rope, RopeStyle
from quantkit.architectures.parameters import (
    LOGIT_SCALE,
    MULTI_HEAD,
    SHARED,
    SLIDING_WINDOW,
    VOCABULARY_SIZE,
    rope_unscaled,
)
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _forward(model: ModelReader, ropes: list[Rope | None], windows: list[int | None], scale: float) -> ForwardSpec:
    return model.spec(
        (
            model.layer(
                i,
                model.attention(i, rope, window=window),
                model.feed_forward(i),
                feed_forward_norm=model.norm(f"blk.{i}.attn_norm"),
                parallel=True,
            )
            for i, (rope, window) in enumerate(zip(ropes, windows, strict=True))
        ),
        logit_scale=scale,
    )


class CommandR(Architecture):
    """CohereForCausalLM."""

    gguf_name = "command-r"
    checkpoints = {  # noqa: RUF012
        "CohereForCausalLM": {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-05,
            "logit_scale": 0.0625,
            "rope_theta": 500000.0,
        },
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, LOGIT_SCALE, rope_unscaled)
    notes = "Aya too; parallel residual, scaled logits"

    def complete(self, config: Config) -> Config:
        """The context that it was trained for is `model_max_length`, where there is one."""
        config = super().complete(config)
        longest = config.find("model_max_length")
        return config if longest is None else config.changed(max_position_embeddings=longest)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Both parts read the same normalised input."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NORMAL)
        scale = model.number("logit_scale", 0.0) or 1.0
        return _forward(model, [rope] * model.n_layer, [None] * model.n_layer, scale)


def _rope_dimensions(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    head = config.require("hidden_size") // config.require("num_attention_heads")
    part = config.number("rotary_pct")
    writer.add_rope_dimension_count(int((1.0 if part is None else part) * head))


class Cohere2(CommandR):
    """Cohere2ForCausalLM: three sliding-window layers with rotary embedding, then a full one without."""

    gguf_name = "cohere2"
    checkpoints = {  # noqa: RUF012
        "Cohere2ForCausalLM": {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-05,
            "sliding_window": 4096,
            "logit_scale": 0.0625,
            "rope_theta": 10000.0,
        },
    }
    parameters = (*SHARED, LOGIT_SCALE, SLIDING_WINDOW, VOCABULARY_SIZE, _rope_dimensions, rope_unscaled)
    skipped = (*Architecture.skipped, ".bias")
    notes = "Command R7B; sliding window, full layers without rotary"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Command-R's; full-attention layers do not rotate."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        rope = model.rope(RopeStyle.NORMAL)
        windows = model.windows(model.integer("attention.sliding_window"), 4)
        scale = model.number("logit_scale") or 1.0
        return _forward(model, [rope if window else None for window in windows], windows, scale)
