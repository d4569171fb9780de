"""The tiny Llama with other descriptions of its forward pass, one for each thing that a description can hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from quantkit.architectures import forward_spec
from quantkit.architectures.forward import (
    Activation,
    Experts,
    FeedForward,
    ForwardSpec,
    Linear,
    Norm,
    NormKind,
    Rope,
    RopeStyle,
    Temperature,
)
from quantkit.sources.source import GGUFSource
from support.tiny import tiny_metadata, tiny_weights, write_gguf


def changed_layers(spec, layer=None, attention=None, feed_forward=None):
    layers = []
    for each in spec.layers:
        each = dataclasses.replace(
            each,
            attention=dataclasses.replace(each.attention, **(attention(each.attention) if attention else {})),
            feed_forward=feed_forward(each.feed_forward) if feed_forward else each.feed_forward,
        )
        layers.append(dataclasses.replace(each, **(layer(each) if layer else {})))
    return {"layers": tuple(layers)}


EXTRA = ("blk.0.head_norm.weight", "router", "experts_down")
NORM = Norm("blk.0.head_norm.weight", 1e-5)
LAYER_NORM = Norm("output_norm.weight", 1e-5, NormKind.LAYER, "blk.0.ffn_norm.weight")
VARIANTS = {
    "window": lambda spec: changed_layers(spec, attention=lambda a: {"window": 7}),
    "soft caps": lambda spec: {
        **changed_layers(spec, attention=lambda a: {"softcap": 3.0, "window": 9}),
        "logit_softcap": 5.0,
    },
    "multipliers": lambda spec: {
        **changed_layers(spec, layer=lambda each: {"branch_scale": 0.3}),
        "embedding_scale": 3.0,
        "logit_scale": 0.5,
    },
    "neox rope": lambda spec: changed_layers(spec, attention=lambda a: {"rope": Rope(8, 500.0, RopeStyle.NEOX)}),
    "part rope": lambda spec: changed_layers(spec, attention=lambda a: {"rope": Rope(8, 500.0, RopeStyle.NORMAL)}),
    "no rope": lambda spec: changed_layers(spec, attention=lambda a: {"rope": None}),
    "growing queries": lambda spec: changed_layers(spec, attention=lambda a: {"temperature": Temperature(0.7, 9)}),
    "head norms": lambda spec: changed_layers(spec, attention=lambda a: {"q_norm": NORM, "k_norm": NORM}),
    "layer norm": lambda spec: {"output_norm": LAYER_NORM},
    "parallel": lambda spec: changed_layers(spec, layer=lambda each: {"parallel": True}),
    "post norms": lambda spec: changed_layers(
        spec, layer=lambda each: {"post_attention_norm": LAYER_NORM, "post_feed_forward_norm": spec.output_norm}
    ),
    "positions": lambda spec: {"position_embedding": spec.output.weight},
    "ungated": lambda spec: changed_layers(
        spec, feed_forward=lambda ff: FeedForward(ff.n_ff, ff.down, Activation.GELU, up=ff.up)
    ),
    "gelu": lambda spec: changed_layers(
        spec, feed_forward=lambda ff: dataclasses.replace(ff, activation=Activation.GELU)
    ),
    "experts": lambda spec: changed_layers(
        spec,
        feed_forward=lambda ff: Experts(40, 4, 2, Linear("router"), ff.gate.weight, ff.up.weight, "experts_down"),
    ),
}


def variant(path: Path, name: str) -> tuple[GGUFSource, ForwardSpec, ForwardSpec]:
    """A model written to `path`, the description that its metadata makes, and that of VARIANTS."""
    weights = tiny_weights(2)
    rng = np.random.default_rng(8)
    weights["blk.0.head_norm.weight"] = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    weights["router"] = rng.standard_normal((4, 96)).astype(np.float32)
    weights["experts_down"] = rng.standard_normal((4 * 96, 40)).astype(np.float32) / 7
    source = GGUFSource(write_gguf(path, tiny_metadata(), weights))
    plain = forward_spec(source.metadata, {key: info for key, info in source.tensors.items() if key not in EXTRA})
    return source, plain, dataclasses.replace(plain, **VARIANTS[name](plain))
