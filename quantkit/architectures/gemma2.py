"""Gemma 2: norms before and after each part, soft-capped scores and logits, sliding windows in every other layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
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
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

# Hyper-parameters that Gemma 1 and 2 have.
GEMMA = (
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
)
# What llama.cpp assumes where the metadata is silent.
_ASSUMED_WINDOW, _ASSUMED_ATTENTION_CAP, _ASSUMED_LOGIT_CAP = 4096, 50.0, 30.0
_LAYERS_OF_27B = 46


def plus_one(rows: np.ndarray) -> np.ndarray:
    """Gemma stores what its norms add to one; GGUF holds the whole factor."""
    factors: np.ndarray = np.add(rows, rows.dtype.type(1))
    return factors


def scores_scale(model: ModelReader, n_layer: int) -> float:
    """What scores are multiplied with: the model of `n_layer` layers counts its heads otherwise than their size says.

    GGUF has no key for it, and llama.cpp tells that model by its layers.
    """
    return 1.0 / math.sqrt(model.n_embd // model.heads[0]) if model.n_layer == n_layer else model.plain_scale


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
    parameters = (*GEMMA, ATTENTION_SOFT_CAP, FINAL_SOFT_CAP, SLIDING_WINDOW)
    transforms = {"norm.weight": Transform(arithmetic=plus_one)}  # noqa: RUF012
    skipped = (*Architecture.skipped, "lm_head.weight")
    vocabulary = "gemma"
    notes = "norms stored off by one, soft-caps, sliding window"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Scaled embeddings, norms around each part, soft-caps, a sliding window in every other layer, gated GELU."""
        model = ModelReader(metadata, tensors)
        windows = model.windows(model.integer("attention.sliding_window", _ASSUMED_WINDOW), 2)
        full = model.rope(RopeStyle.NEOX)
        local = replace(full, freq_base=model.number("rope.freq_base_swa", full.freq_base))
        cap = model.number("attn_logit_softcapping", _ASSUMED_ATTENTION_CAP)
        scale = scores_scale(model, _LAYERS_OF_27B)
        return model.spec(
            (
                model.layer(
                    i,
                    model.attention(i, local if window else full, scale=scale, window=window, softcap=cap),
                    model.feed_forward(i, Activation.GELU),
                    **model.post_norms(i),
                )
                for i, window in enumerate(windows)
            ),
            embedding_scale=math.sqrt(model.n_embd),
            logit_softcap=model.number("final_logit_softcapping", _ASSUMED_LOGIT_CAP),
        )
