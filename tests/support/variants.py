"""The tiny Llama with other descriptions of its forward pass, one for each thing that a description can hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from quantkit.architectures import forward_spec
from quantkit.architectures.feed_forward import XIELU, Activation, Experts, FeedForward, Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import Rope, RopeStyle, Temperature
from quantkit.architectures.products import Linear, Norm, NormKind
from quantkit.sources.source import GGUFSource
from support.tiny import tiny_metadata, tiny_weights, write_gguf


def changed_layers(spec, layer=None, attention=None, feed_forward=None):
    layers = []
    for each in spec.layers:
        each = dataclasses.replace(
            each,
            mixers=tuple(dataclasses.replace(a, **(attention(a) if attention else {})) for a in each.mixers),
            feed_forward=feed_forward(each.feed_forward) if feed_forward else each.feed_forward,
        )
        layers.append(dataclasses.replace(each, **(layer(each) if layer else {})))
    return {"layers": tuple(layers)}


EXTRA = ("blk.0.head_norm.weight", "router", "experts_down.weight", "experts_down.bias", "experts_up.weight",
         "experts_up.bias", "selection", "shared_gate", "sinks")  # fmt: skip
NORM = Norm("blk.0.head_norm.weight", 1e-5)
LAYER_NORM = Norm("output_norm.weight", 1e-5, NormKind.LAYER, "blk.0.ffn_norm.weight")
ROUTER, DOWN = Linear("router"), "experts_down.weight"
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
    "head norms after rotation": lambda spec: changed_layers(
        spec, attention=lambda a: {"q_norm": NORM, "k_norm": NORM, "norm_rotated": True}
    ),
    "clamped": lambda spec: changed_layers(spec, attention=lambda a: {"clamp": 0.5}),
    "norms without weights": lambda spec: changed_layers(
        spec,
        layer=lambda each: {"attention_norm": Norm(None, 1e-5), "feed_forward_norm": Norm(None, 1e-5, NormKind.LAYER)},
    ),
    "chunks": lambda spec: changed_layers(spec, attention=lambda a: {"chunk": 7}),
    "sinks": lambda spec: changed_layers(spec, attention=lambda a: {"sinks": "sinks"}),
    "queries that grow from an offset": lambda spec: changed_layers(
        spec, attention=lambda a: {"temperature": Temperature(0.7, 9, 5)}
    ),
    "clamped silu": lambda spec: changed_layers(
        spec, feed_forward=lambda ff: dataclasses.replace(ff, activation=Activation.CLAMPED_SILU)
    ),
    "squared relu": lambda spec: changed_layers(
        spec, feed_forward=lambda ff: FeedForward(ff.n_ff, ff.down, Activation.RELU_SQUARED, up=ff.up)
    ),
    "a learned activation": lambda spec: changed_layers(
        spec, feed_forward=lambda ff: FeedForward(ff.n_ff, ff.down, XIELU(0.3, 0.8, 0.5, -1e-6), up=ff.up)
    ),
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
        feed_forward=lambda ff: Experts(40, 4, 2, ROUTER, ff.gate.weight, ff.up.weight, DOWN),
    ),
    "experts beside a block": lambda spec: changed_layers(
        spec,
        feed_forward=lambda ff: Experts(
            40,
            4,
            1,
            ROUTER,
            ff.gate.weight,
            ff.up.weight,
            DOWN,
            gating=Gating.SIGMOID,
            normalised=False,
            scale=1.5,
            shared=ff,
            shared_gate=Linear("shared_gate"),
        ),
    ),
    "experts in groups": lambda spec: changed_layers(
        spec,
        feed_forward=lambda ff: Experts(
            40,
            4,
            2,
            ROUTER,
            ff.gate.weight,
            ff.up.weight,
            DOWN,
            selection_bias="selection",
            n_groups=2,
            shared=ff,
        ),
    ),
    "experts with biases": lambda spec: changed_layers(
        spec,
        feed_forward=lambda ff: Experts(
            40,
            4,
            3,
            ROUTER,
            None,
            "experts_up.weight",
            DOWN,
            Activation.GELU,
            Gating.CHOSEN,
            up_bias="experts_up.bias",
            down_bias="experts_down.bias",
        ),
    ),
    "experts that weigh what they read": lambda spec: changed_layers(
        spec,
        feed_forward=lambda ff: Experts(
            40,
            4,
            2,
            ROUTER,
            ff.gate.weight,
            ff.up.weight,
            DOWN,
            normalised=False,
            weigh_input=True,
        ),
    ),
}


def variant(path: Path, name: str) -> tuple[GGUFSource, ForwardSpec, ForwardSpec]:
    """A model written to `path`, the description that its metadata makes, and that of VARIANTS."""
    weights = tiny_weights(2)
    rng = np.random.default_rng(8)
    weights["blk.0.head_norm.weight"] = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    weights["router"] = rng.standard_normal((4, 96)).astype(np.float32)
    weights["experts_down.weight"] = rng.standard_normal((4 * 96, 40)).astype(np.float32) / 7
    weights["experts_down.bias"] = rng.standard_normal((4, 96)).astype(np.float32) / 7
    weights["experts_up.weight"] = rng.standard_normal((4 * 40, 96)).astype(np.float32) / 7
    weights["experts_up.bias"] = rng.standard_normal((4, 40)).astype(np.float32)
    weights["selection"] = rng.standard_normal(4).astype(np.float32)
    weights["sinks"] = rng.standard_normal(6).astype(np.float32) * 3
    weights["shared_gate"] = rng.standard_normal((1, 96)).astype(np.float32)
    source = GGUFSource(write_gguf(path, tiny_metadata(), weights))
    plain = forward_spec(source.metadata, {key: info for key, info in source.tensors.items() if key not in EXTRA})
    return source, plain, dataclasses.replace(plain, **VARIANTS[name](plain))
