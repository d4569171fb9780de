"""Gemma 3n's text model: several streams beside one (AltUp), embeddings for each layer, layers that share keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.experts import Stack
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import AltUp, ForwardSpec, Laurel, Streams
from quantkit.architectures.gemma3 import Gemma3
from quantkit.architectures.mixers import Rope, RopeStyle
from quantkit.architectures.parameters import Field, sliding_layers
from quantkit.architectures.products import Norm
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "altup_active_idx": 0,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
}
# The number of streams that the reference converts.
_STREAMS = 4
_MOST_STREAMS = 64
_SPARSE_LAYERS, _SPARSITY = 10, 0.95


def _layer_types(config: Config) -> list[str]:
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    return [kinds[i % 5] for i in range(config.require("num_hidden_layers"))]


def _sparsity(config: Config) -> list[float]:
    n = config.require("num_hidden_layers")
    sparse = _SPARSE_LAYERS if n > _SPARSE_LAYERS else 0
    return [_SPARSITY] * sparse + [0.0] * (n - sparse)


def _quantile(share: float) -> float:
    """How many deviations above the mean a share of a normal distribution lies below, as torch's float32 has it.

    Two of Newton's steps on the error function, each operation in float32.
    """
    f32 = np.float32
    p = f32(share)
    if not 0 < p < 1:
        return math.copysign(math.inf, p - f32(0.5))
    y, slope = f32(2) * p - f32(1), f32(2 / math.sqrt(math.pi))
    x = f32(NormalDist().inv_cdf(float(p)) / math.sqrt(2))
    for _ in range(2):
        x = x - (f32(math.erf(x)) - y) / (slope * f32(math.exp(-x * x)))
    return float(x * f32(math.sqrt(2)))


def _sparsity_scales(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many deviations above the mean a gate must be in each layer: minus infinity where all count."""
    config = architecture.config
    shares = config.listed("activation_sparsity_pattern", architecture.n_layers)
    writer.add_activation_sparsity_scale(
        [_quantile(config.finite(share, ("activation_sparsity_pattern",))) for share in shares]
    )


def _padding(config: Config, stored: np.ndarray) -> np.ndarray:
    """Rows of zeros for the tokens of images and sounds, which come last and have no embedding."""
    n_missing = max(0, config.require("vocab_size") - len(stored))
    return np.broadcast_to(stored.dtype.type(0), (n_missing, stored.shape[1]))


def _all_rows(_config: Config, stored: np.ndarray) -> np.ndarray:
    return stored


_PADDED = Transform((_all_rows, _padding))


def _streams(name: str) -> Stack:
    return Stack(("altup_others",), f"model.{name}.{{item}}.weight", f"model.{name}.weight", ("",))


class Gemma3n(Architecture):
    """Gemma3nForCausalLM, and the text model of Gemma3nForConditionalGeneration."""

    gguf_name = "gemma3n"
    checkpoints = {"Gemma3nForCausalLM": _DEFAULTS}  # noqa: RUF012
    wrappers = {"Gemma3nForConditionalGeneration": {"gemma3n_text": _DEFAULTS}}  # noqa: RUF012
    derived = {"layer_types": _layer_types, "activation_sparsity_pattern": _sparsity}  # noqa: RUF012
    parameters = (
        *Gemma3.parameters,
        Field("add_altup_active_idx", ("altup_active_idx",)),
        Field("add_altup_num_inputs", ("altup_num_inputs",)),
        Field("add_embedding_length_per_layer_input", ("hidden_size_per_layer_input",)),
        Field("add_shared_kv_layers", ("num_kv_shared_layers",)),
        _sparsity_scales,
        sliding_layers,
    )
    transforms = {  # noqa: RUF012
        "embed_tokens.weight": _PADDED,
        "embed_tokens_per_layer.weight": _PADDED,
    }
    renames = {**Architecture.renames, "correct_output_scale": "correct_output_scale.weight"}  # noqa: RUF012
    stacks = (_streams("altup_projections"), _streams("altup_unembed_projections"))
    vocabulary = "gemma3n"
    notes = "text part; four streams (AltUp), embeddings for each layer, layers that share keys"

    def complete(self, config: Config) -> Config:
        """`config` with the number of streams beside the first."""
        config = super().complete(config)
        if (streams := config.require("altup_num_inputs")) != _STREAMS:
            raise config.wrong(("altup_num_inputs",), streams, str(_STREAMS))
        return config.changed(altup_others=streams - 1)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Four streams, of which layers work on one; Gemma 3's parts with learned residuals and sparse gates.

        llama.cpp takes it for granted that the first ten layers are sparse, by 95%, and that the first twenty have keys
        of their own; here the metadata counts.
        """
        model = ModelReader(metadata, tensors)
        streams = Streams(
            model.integer("altup.num_inputs", low=2, high=_MOST_STREAMS),
            model.integer("altup.active_idx", 0),
            "altup_proj.weight",
            "altup_unembd_proj.weight",
        )
        full = model.rope(RopeStyle.NEOX)
        local = Rope(full.n_dims, model.number("rope.freq_base_swa", 10000.0), RopeStyle.NEOX)
        value_norm = Norm(None, model.eps)
        side, at = model.side_embedding(), streams.count * model.n_embd
        windows = model.windows(model.integer("attention.sliding_window"), 5)
        attentions, n_kept = model.share_keys(
            [
                model.attention(
                    i, local if window else full, scale=1.0, window=window, v_norm=value_norm, **model.qk_norms(i)
                )
                for i, window in enumerate(windows)
            ],
            at + (model.n_layer * side.size if side else 0),
        )
        key = f"{model.arch}.activation_sparsity_scale"
        cutoffs = metadata.array(key, (ValueType.FLOAT32,)).tolist()
        if len(cutoffs) != model.n_layer or any(math.isnan(cutoff) for cutoff in cutoffs):
            raise metadata.wrong(key, f"{model.n_layer} numbers, one for each layer")
        return model.spec(
            (
                model.layer(
                    i,
                    attention,
                    replace(
                        model.feed_forward(i, Activation.GELU), cutoff=cutoffs[i] if cutoffs[i] > -math.inf else None
                    ),
                    side=model.side_input(i, side, at),
                    laurel=_laurel(model, i),
                    altup=AltUp(
                        f"blk.{i}.altup_router.weight",
                        model.norm(f"blk.{i}.altup_router_norm"),
                        f"blk.{i}.altup_predict_coef.weight",
                        f"blk.{i}.altup_correct_coef.weight",
                        f"blk.{i}.altup_correct_scale.weight",
                        streams.count,
                    ),
                    **model.post_norms(i),
                )
                for i, attention in enumerate(attentions)
            ),
            embedding_scale=math.sqrt(model.n_embd),
            logit_softcap=model.number("final_logit_softcapping", 30.0) or None,
            streams=streams,
            side=side,
            n_kept=n_kept,
            idle=model.unused_keys(attentions),
        )


def _laurel(model: ModelReader, i: int) -> Laurel:
    left = model.tensors.get(f"blk.{i}.laurel_l.weight")
    return Laurel(
        1 if left is None else left.n_rows,
        model.linear(f"blk.{i}.laurel_l"),
        model.linear(f"blk.{i}.laurel_r"),
        model.norm(f"blk.{i}.laurel_post_norm"),
    )
