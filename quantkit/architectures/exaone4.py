"""EXAONE 4: norms after each part, QK norms, rotary sliding-window layers, full-attention layers without rotary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import (
    HEAD_SIZE,
    MULTI_HEAD,
    SHARED,
    SLIDING_WINDOW,
    VOCABULARY_SIZE,
    sliding_layers,
)
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _window(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The window, and which layers have it: as listed, or as a word of L and G or the length of a period says."""
    config = architecture.config
    if config.find("sliding_window") is None:
        return
    SLIDING_WINDOW(architecture, writer, file_type)
    if config.find("layer_types") is not None:
        sliding_layers(architecture, writer, file_type)
        return
    period = config.find("sliding_window_pattern")
    if isinstance(period, str) and period:
        writer.add_sliding_window_pattern([period[i % len(period)] == "L" for i in range(architecture.n_layers)])
    elif period is not None:
        every = config.require("sliding_window_pattern")
        writer.add_sliding_window_pattern([(i + 1) % every != 0 for i in range(architecture.n_layers)])


class Exaone4(Architecture):
    """Exaone4ForCausalLM."""

    gguf_name = "exaone4"
    checkpoints = {  # noqa: RUF012
        "Exaone4ForCausalLM": {
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_theta": 10000.0,
        },
    }
    derived = MULTI_HEAD | HEAD_SIZE
    parameters = (*SHARED, VOCABULARY_SIZE, _window)
    notes = "norms after, QK norms, sliding window"

    def computed_tensors(self) -> Iterator[Assembly]:
        """Llama 3's rope scaling is a tensor of frequency factors in GGUF."""
        factors = self.rope.llama3_factors(self.rope_dimensions, factor=16.0)
        if factors is not None:
            yield Assembly("rope_freqs.weight", values=factors)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms after each part only. llama.cpp knows the one model with a window by its 64 layers."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        window = model.integer("attention.sliding_window", 0)
        windows = model.windows(window, 4) if window > 0 else [None] * model.n_layer
        windowed = any(windows)
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope if window or not windowed else None, window=window, **model.qk_norms(i)),
                model.feed_forward(i),
                attention_norm=None,
                feed_forward_norm=None,
                **model.post_norms(i),
            )
            for i, window in enumerate(windows)
        )
