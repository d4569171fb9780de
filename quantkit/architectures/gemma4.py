"""Gemma 4's text model: heads of two sizes, embeddings for each layer, shared keys, experts beside a dense block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.config import Config
from quantkit.architectures.feed_forward import Activation, Apart, Experts, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.gemma3 import Gemma3
from quantkit.architectures.mixers import Attention, Rope, RopeStyle
from quantkit.architectures.parameters import EXPERT_FEED_FORWARD, Field, sliding_layers
from quantkit.architectures.products import Norm
from quantkit.architectures.reader import ModelReader
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.formats.safetensors import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
_FULL_HEAD = 512
_MAX_SUPPRESSED = 1 << 16
_FULL = "full_attention"
# What the frequencies of pairs that are not rotated are divided by.
_STILL = 1e30


def _layer_types(config: Config) -> list[str]:
    n = config.require("num_hidden_layers")
    return [_FULL if i % 6 == 5 or i == n - 1 else "sliding_attention" for i in range(n)]


def _of_full_layers(config: Config, name: str) -> int | None:
    """What the layers that see all positions have of their own for the field `name`."""
    kinds = config.listed("layer_types", config.require("num_hidden_layers"))
    for key, values in (config.table("per_layer_config") or {}).items():
        if key.isdecimal() and int(key) < len(kinds) and kinds[int(key)] == _FULL and isinstance(values, dict):
            return config.changed(**{name: values.get(name)}).integer(name)
    return None


def _full_head(config: Config) -> int:
    found = config.integer("global_head_dim") or _of_full_layers(config, "head_dim")
    return found or (_FULL_HEAD if config.find("per_layer_config") is None else config.require("head_dim"))


def _attention_sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The heads of layers that see all positions, and those of layers with a window."""
    config, full = architecture.config, architecture.rope_dimensions
    local = config.require("head_dim")
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(local)
    writer.add_value_length_swa(local)


def _wide_blocks(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The dense blocks' sizes, where those of layers that share keys are twice as wide."""
    config = architecture.config
    if config.find("use_double_wide_mlp"):
        size, n = config.require("intermediate_size"), architecture.n_layers
        first = n - (config.integer("num_kv_shared_layers") or 0)
        writer.add_feed_forward_length([size if i < first else 2 * size for i in range(n)])


def _key_value_heads(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The heads of keys and values of each layer, where those that see all positions have another number."""
    config = architecture.config
    full = _of_full_layers(config, "num_key_value_heads")
    if config.find("attention_k_eq_v"):
        full = full or config.integer("num_global_key_value_heads")
    if full is not None:
        kinds = config.listed("layer_types", architecture.n_layers)
        local = config.require("num_key_value_heads")
        writer.add_head_count_kv([full if kind == _FULL else local for kind in kinds])


def _rotated(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many numbers of a head are rotated; in full layers some by an angle of zero."""
    writer.add_rope_dimension_count(architecture.rope_dimensions)
    writer.add_rope_dimension_count_swa(architecture.config.require("head_dim"))


def _suppressed(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The tokens that are never chosen, as generation_config.json has them. gguf 0.19 has no name for the key."""
    path = architecture.config.path.parent / "generation_config.json"
    if not path.is_file():
        return
    tokens = Config(read_json(path), path).find("suppress_tokens")
    if tokens is None:
        return
    if not isinstance(tokens, list) or not tokens or len(tokens) > _MAX_SUPPRESSED:
        raise QuantkitError(f"{path}: suppress_tokens is {str(tokens)[:80]!r}, not a list of tokens")
    items = [Config({"suppress_tokens": token}, path).integer("suppress_tokens") for token in tokens]
    writer.add_array("tokenizer.ggml.suppress_tokens", items)


class Gemma4(Architecture):
    """Gemma4ForCausalLM, and the text model of Gemma4ForConditionalGeneration."""

    gguf_name = "gemma4"
    checkpoints = {"Gemma4ForCausalLM": _DEFAULTS}  # noqa: RUF012
    wrappers = {"Gemma4ForConditionalGeneration": {"gemma4_text": _DEFAULTS}}  # noqa: RUF012
    derived = {"layer_types": _layer_types}  # noqa: RUF012
    parameters = (
        *Gemma3.parameters,
        Field("add_shared_kv_layers", ("num_kv_shared_layers",)),
        lambda architecture, writer, _: writer.add_embedding_length_per_layer_input(
            architecture.config.integer("hidden_size_per_layer_input") or 0
        ),
        sliding_layers,
        _attention_sizes,
        EXPERT_FEED_FORWARD,
        _wide_blocks,
        _key_value_heads,
        _rotated,
    )
    renames = {  # noqa: RUF012
        **Architecture.renames,
        "layer_scalar": "layer_scalar.weight",
        ".experts.gate_up_proj": ".experts.gate_up_proj.weight",
        ".experts.down_proj": ".experts.down_proj.weight",
        ".weight.weight": ".weight",
    }
    vocabulary = "gemma4"
    notes = "text part; heads of two sizes, embeddings for each layer, layers that share keys"

    @property
    def rope_dimensions(self) -> int:  # type: ignore[override]
        """The size of the heads that see all positions."""
        return _full_head(self.config)

    def computed_tensors(self) -> Iterator[Assembly]:
        """What divides the frequencies of layers that see all positions: those of pairs that stay are infinite."""
        rope, pairs = self.rope, self.rope_dimensions // 2
        if rope.type != "proportional":
            raise self.config.wrong(("rope_parameters",), rope.type, "proportional")
        share = rope.number("partial_rotary_factor") or 1.0
        turning = int(self.rope_dimensions * share / 2)
        if not 0 <= turning <= pairs:
            raise self.config.wrong(("partial_rotary_factor",), share, "between 0 and 1")
        values = np.array([1.0] * turning + [_STILL] * (pairs - turning), np.float32)
        yield Assembly("rope_freqs.weight", values=values)

    def gguf_tensor_name(self, name: str) -> str:
        """See `Architecture`; what scales a router's input and its experts are no weights there."""
        for ending, stem in (("router.scale", "router.proj"), ("router.per_expert_scale", "experts.down_proj")):
            if name.endswith(ending):
                whole = super().gguf_tensor_name(f"{name.removesuffix(ending)}{stem}.weight")
                return whole.removesuffix("weight") + "scale"
        return super().gguf_tensor_name(name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Gemma 3's parts with normalised values, layers that share keys, and embeddings for each layer."""
        model = ModelReader(metadata, tensors)
        side, at = model.side_embedding(), model.n_embd
        windows = model.windows(model.integer("attention.sliding_window"), 6, own_sizes=True)
        attentions, n_kept = model.share_keys(
            [_attention(model, i, window) for i, window in enumerate(windows)],
            at + (model.n_layer * side.size if side else 0),
        )
        return model.spec(
            (
                model.layer(
                    i,
                    attention,
                    _experts(model, i) if f"blk.{i}.ffn_gate_inp.weight" in tensors else _dense(model, i),
                    side=model.side_input(i, side, at),
                    out_scale=name if (name := f"blk.{i}.layer_output_scale.weight") in tensors else None,
                    **model.post_norms(i),
                )
                for i, attention in enumerate(attentions)
            ),
            embedding_scale=math.sqrt(model.n_embd),
            logit_softcap=model.number("final_logit_softcapping", 0.0) or None,
            side=side,
            n_kept=n_kept,
            idle=model.unused_keys(attentions),
        )


def _attention(model: ModelReader, i: int, window: int | None) -> Attention:
    """The attention of layer `i`: heads of one size where it has a window, of another where it sees all positions."""
    if window is None:
        rope, sizes = model.rope(RopeStyle.NEOX), (model.head_k, model.head_v)
    else:
        sizes = model.integer("attention.key_length_swa"), model.integer("attention.value_length_swa")
        n_dims = model.integer("rope.dimension_count_swa", sizes[0])
        rope = Rope(n_dims, model.number("rope.freq_base_swa", 10000.0), RopeStyle.NEOX)
    has_values = f"blk.{i}.attn_v.weight" in model.tensors
    return model.attention(
        i,
        rope,
        scale=1.0,
        window=window,
        head_k=sizes[0],
        head_v=sizes[1],
        v_norm=Norm(None, model.eps),
        **({} if has_values else {"v": None}),
        **model.qk_norms(i),
    )


def _dense(model: ModelReader, i: int) -> FeedForward:
    return model.feed_forward(i, Activation.GELU)


def _experts(model: ModelReader, i: int) -> Experts:
    """The experts of layer `i`, which stand beside its dense block."""
    at = f"blk.{i}."
    both = f"{at}ffn_gate_up_exps.weight"
    together = {"gate": None, "up": None, "gate_up": both} if both in model.tensors else {}
    return model.experts(
        i,
        model.expert_sizes()[i],
        activation=Activation.GELU,
        shared=_dense(model, i),
        expert_scales=name if (name := f"{at}ffn_down_exps.scale") in model.tensors else None,
        apart=Apart(
            norm=model.norm(f"{at}pre_ffw_norm_2"),
            router_norm=Norm(f"{at}ffn_gate_inp.scale", model.eps),
            router_scale=1.0 / math.sqrt(model.n_embd),
            out_norm=model.norm(f"{at}post_ffw_norm_2"),
            shared_norm=model.norm(f"{at}post_ffw_norm_1"),
        ),
        **together,
    )


class Gemma4Unified(Gemma4):
    """The text model of Gemma4UnifiedForConditionalGeneration."""

    wrappers = {  # noqa: RUF012
        "Gemma4UnifiedForConditionalGeneration": {
            "gemma4_unified_text": {
                **{key: value for key, value in _DEFAULTS.items() if key != "hidden_size_per_layer_input"},
                "max_position_embeddings": 262144,
                "sliding_window": 1024,
            }
        }
    }
    parameters = (*Gemma4.parameters, _suppressed)
    notes = "text part"
