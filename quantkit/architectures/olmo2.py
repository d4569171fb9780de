"""OLMo 2 and OLMo 3: norms after attention and MLP instead of before, and on whole queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import Rope, RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, SHARED, SLIDING_WINDOW
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SHARED_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def _sliding_layers(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """Which layers use a sliding window: as the config lists them, or else all but every fourth."""
    if architecture.config.find("sliding_window") is None:
        return
    kinds = architecture.config.find("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(architecture.n_layers)]
    elif not isinstance(kinds, list) or len(kinds) != architecture.n_layers:
        raise architecture.config.wrong(("layer_types",), kinds, f"a list for {architecture.n_layers} layers")
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])


class Olmo2(Architecture):
    """Olmo2ForCausalLM, and Olmo3ForCausalLM, which adds sliding windows."""

    gguf_name = "olmo2"
    checkpoints = {  # noqa: RUF012
        "Olmo2ForCausalLM": {**_SHARED_DEFAULTS, "rope_theta": 10000.0},
        "Olmo3ForCausalLM": {**_SHARED_DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096},
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, SLIDING_WINDOW, _sliding_layers)
    notes = "OLMo 3 too; norms after, whole QK norms"

    def complete(self, config: Config) -> Config:
        """OLMo 3's sliding layers have the base of the others, and a key of their own for it."""
        config = super().complete(config)
        if config.find("sliding_window") is not None and config.find("rope_local_base_freq") is None:
            return config.changed(rope_local_base_freq=config.find("rope_theta"))
        return config

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Norms after each part only, and of whole queries and keys; sliding-window layers rotate without scaling."""
        model = ModelReader(metadata, tensors)
        window = model.integer("attention.sliding_window", 0)
        windows = model.windows(window, 4) if window > 0 else [None] * model.n_layer
        full = model.rope(RopeStyle.NEOX)
        local = Rope(full.n_dims, full.freq_base, RopeStyle.NEOX)
        return model.spec(
            model.layer(
                i,
                model.attention(i, local if window else full, window=window, norm_whole=True, **model.qk_norms(i)),
                model.feed_forward(i),
                attention_norm=None,
                feed_forward_norm=None,
                **model.post_norms(i),
            )
            for i, window in enumerate(windows)
        )
