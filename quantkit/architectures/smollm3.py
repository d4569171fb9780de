"""SmolLM3: Llama's layers, and every fourth without rotary embedding."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

log = logging.getLogger(__name__)


class SmolLM3(Llama):
    """SmolLM3ForCausalLM. GGUF has no key for the layers without rotary embedding: llama.cpp takes every fourth."""

    gguf_name = "smollm3"
    usual_pre = "smaug-bpe"
    checkpoints = {  # noqa: RUF012
        "SmolLM3ForCausalLM": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 2000000.0,
        }
    }
    derived = MULTI_HEAD
    notes = "every fourth layer without rotary"

    def complete(self, config: Config) -> Config:
        """Warn of layers that llama.cpp would rotate contrary to the config."""
        rotary = config.find("no_rope_layers")
        if isinstance(rotary, list) and any(bool(on) != (i % 4 != 3) for i, on in enumerate(rotary)):
            log.warning(
                "%s: llama.cpp takes every fourth layer as one without rotary; no_rope_layers differs", config.path
            )
        return super().complete(config)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, but every fourth layer does not rotate."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        return model.spec(
            model.layer(
                i,
                model.attention(i, None if i % 4 == 3 else rope, scale=model.scale),
                model.feed_forward(i),
            )
            for i in range(model.n_layer)
        )
