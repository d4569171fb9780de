"""Gemma 2: norms before and after each part, soft-capped scores and logits, sliding windows in every other layer."""

from __future__ import annotations

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.parameters import (
    ATTENTION_SOFT_CAP,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    FINAL_SOFT_CAP,
    HEADS,
    KEY_LENGTH,
    KEY_VALUE_HEADS,
    RMS_EPSILON,
    SLIDING_WINDOW,
    VALUE_LENGTH,
    block_count,
    file_type,
)


def plus_one(rows: np.ndarray) -> np.ndarray:
    """Gemma stores what its norms add to one; GGUF holds the whole factor."""
    return np.add(rows, rows.dtype.type(1))


class Gemma2(Architecture):
    """Gemma2ForCausalLM. The embeddings are the output too; an output matrix of its own is left out."""

    gguf_name = "gemma2"
    checkpoints = {  # noqa: RUF012
        "Gemma2ForCausalLM": {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    }
    parameters = (
        CONTEXT,
        EMBEDDING,
        block_count,
        FEED_FORWARD,
        HEADS,
        KEY_VALUE_HEADS,
        RMS_EPSILON,
        KEY_LENGTH,
        VALUE_LENGTH,
        file_type,
        ATTENTION_SOFT_CAP,
        FINAL_SOFT_CAP,
        SLIDING_WINDOW,
    )
    transforms = {"norm.weight": Transform(arithmetic=plus_one)}  # noqa: RUF012
    skipped = (*Architecture.skipped, "lm_head.weight")
    vocabulary = "gemma"
    notes = "norms stored off by one, soft-caps, sliding window"
