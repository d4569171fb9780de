"""Gemma 3's text model: Gemma 2 with QK norms in place of soft-caps, and five sliding layers for each full one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.gemma2 import plus_one, scores_scale
from quantkit.architectures.mixers import Rope, RopeStyle
from quantkit.architectures.parameters import FINAL_SOFT_CAP, SHARED, SLIDING_WINDOW
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.formats.safetensors import read_json


def _drop_padding(config: Config, stored: np.ndarray) -> np.ndarray:
    """The embeddings without the rows that stand for no token."""
    directory = config.path.parent
    if (directory / "tokenizer.model").is_file():
        return stored[: config.require("vocab_size")]
    path = directory / "tokenizer.json"
    tokenizer = read_json(path)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise QuantkitError(f"{path}: it lacks model.vocab or added_tokens")
    return stored[: len(vocabulary) + len(added)]


_LAYERS_OF_27B = 62
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 4096,
}


class Gemma3(Architecture):
    """Gemma3ForCausalLM, and the text model of Gemma3ForConditionalGeneration."""

    gguf_name = "gemma3"
    checkpoints = {"Gemma3ForCausalLM": _DEFAULTS}  # noqa: RUF012
    wrappers = {"Gemma3ForConditionalGeneration": {"gemma3_text": _DEFAULTS}}  # noqa: RUF012
    parameters = (*SHARED, FINAL_SOFT_CAP, SLIDING_WINDOW)
    transforms = {  # noqa: RUF012
        "norm.weight": Transform(arithmetic=plus_one),
        "embed_tokens.weight": Transform(rearrange=_drop_padding),
    }
    vocabulary = "gemma"
    notes = "text part; norms stored off by one, two rotary bases, sliding window"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Gemma 2's with QK norms; sliding-window layers rotate by another base and without scaling."""
        model = ModelReader(metadata, tensors)
        window = model.integer("attention.sliding_window", 0)
        windows = model.windows(window, 6) if window > 0 else [None] * model.n_layer
        full = model.rope(RopeStyle.NEOX)
        local = Rope(
            full.n_dims,
            model.number("rope.freq_base_swa", 10000.0),
            RopeStyle.NEOX,
            magnitude=model.number("rope.scaling.attn_factor", 1.0),
        )
        scale = scores_scale(model, _LAYERS_OF_27B)
        return model.spec(
            (
                model.layer(
                    i,
                    model.attention(i, local if window else full, scale=scale, window=window, **model.qk_norms(i)),
                    model.feed_forward(i, Activation.GELU),
                    **model.post_norms(i),
                )
                for i, window in enumerate(windows)
            ),
            embedding_scale=math.sqrt(model.n_embd),
            logit_softcap=model.number("final_logit_softcapping", 0.0) or None,
        )
