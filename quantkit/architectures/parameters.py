"""Hyper-parameters as data: how a field of config.json becomes a key of GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import parse_json, read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from quantkit.architectures.base import Architecture
    from quantkit.architectures.config import Config

# What most families have in `derived`: where config.json does not say them, there are as many heads of keys and values
# as of queries, and heads share the hidden size.
MULTI_HEAD: dict[str, Callable[[Config], Any]] = {
    "num_key_value_heads": lambda config: config.require("num_attention_heads")
}
HEAD_SIZE: dict[str, Callable[[Config], Any]] = {
    "head_dim": lambda config: config.require("hidden_size") // config.require("num_attention_heads")
}

# Adds what it stands for to the writer. The number is general.file_type.
Parameter: TypeAlias = "Callable[[Architecture, GGUFWriter, int], None]"


@dataclass(frozen=True)
class Field:
    """A hyper-parameter that is copied: `add` is the method of gguf.GGUFWriter, `names` what config.json calls it.

    The first name that is there counts; nothing is written where none is. `number` allows fractions, and `truthy`
    leaves zero out. `per_layer` allows a list with a value for each layer.
    """

    add: str
    names: tuple[str, ...]
    number: bool = False
    truthy: bool = False
    per_layer: bool = False

    def __call__(self, architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        """Add it. Raises QuantkitError for a value that is no such number."""
        config = architecture.config
        if self.per_layer and isinstance(listed := config.find(*self.names), list):
            if len(listed) != architecture.n_layers:
                raise config.wrong(self.names, listed, f"a list for {architecture.n_layers} layers")
            name = self.names[0]
            getattr(writer, self.add)([config.changed(**{name: each}).require(name) for each in listed])
            return
        value: Any = config.number(*self.names) if self.number else config.integer(*self.names)
        if value is not None and (value or not self.truthy):
            getattr(writer, self.add)(value)


@dataclass(frozen=True)
class Flag:
    """A hyper-parameter that is true or false: `add` is the method of gguf.GGUFWriter, `names` as for `Field`."""

    add: str
    names: tuple[str, ...]

    def __call__(self, architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        """Add it. Raises QuantkitError for what is neither."""
        config = architecture.config
        value = config.find(*self.names)
        if value is None:
            return
        if not isinstance(value, bool):
            raise config.wrong(self.names, value, "true or false")
        getattr(writer, self.add)(value)


@dataclass(frozen=True)
class Constant:
    """What a family writes whatever its config says: `add` is the method of gguf.GGUFWriter."""

    add: str
    value: Any

    def __call__(self, architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        """Add it."""
        getattr(writer, self.add)(self.value)


def block_count(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The number of blocks."""
    writer.add_block_count(architecture.n_layers)


def causal(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """That attention is not causal, for models where every token sees all others."""
    if architecture.config.find("is_causal") is False:
        writer.add_causal_attention(False)


def rope(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The rotary scaling and bases."""
    architecture.rope.write(writer)


def rope_dimensions(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The number of elements of a head that are rotated."""
    writer.add_rope_dimension_count(architecture.rope_dimensions)


def gating(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How scores of experts become their weights, where the config names it."""
    from gguf import ExpertGatingFuncType

    names = (
        "score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func",
        "expert_selection_fn",
    )  # fmt: skip
    function = architecture.config.find(*names)
    if function is None:
        return
    kinds = {"sigmoid": ExpertGatingFuncType.SIGMOID, "softmax": ExpertGatingFuncType.SOFTMAX}
    if not isinstance(function, str) or function not in kinds:
        raise architecture.config.wrong(names, function, f"one of {', '.join(kinds)}")
    writer.add_expert_gating_func(kinds[function])


def rope_unscaled(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """That rotary embedding is not scaled."""
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.NONE)


def sliding_layers(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """Which layers use a sliding window, as `layer_types` lists them."""
    if architecture.config.find("layer_types") is None:
        return
    kinds = architecture.config.listed("layer_types", architecture.n_layers)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])


def pooling(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How vectors of tokens become that of a text, as `sentence-transformers` modules say; nothing without any."""
    from gguf import PoolingType

    directory = architecture.config.path.parent
    if not (directory / "modules.json").is_file():
        return
    with open(directory / "modules.json", "rb") as file:
        data = file.read(_MAX_MODULES)
    modules = parse_json(b'{"modules": %s}' % data, directory / "modules.json")["modules"]
    for module in modules if isinstance(modules, list) else ():
        kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not kind.endswith("Pooling"):
            continue
        if not isinstance(path, str) or not re.fullmatch(r"[\w-]+", path):
            raise QuantkitError(f"{directory / 'modules.json'}: the path {str(path)[:80]!r} is no folder beside it")
        told = read_json(directory / path / "config.json", _MAX_MODULES)
        mode = next((each for key, each in _POOLING.items() if told.get(key)), told.get("pooling_mode"))
        kinds = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}
        if not isinstance(mode, str) or mode not in kinds:
            raise QuantkitError(
                f"{directory / path}/config.json: only mean, cls and lasttoken pooling can be expressed"
            )
        writer.add_pooling_type(kinds[mode])
        return


def file_type(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The type of most tensors."""
    writer.add_file_type(file_type)


_MAX_MODULES = 1 << 20  # bytes
_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
CONTEXT = Field(
    "add_context_length",
    ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length"),
)
EMBEDDING = Field("add_embedding_length", ("hidden_size", "n_embd", "dim"))
FEED_FORWARD = Field(
    "add_feed_forward_length",
    ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size", "n_inner", "hidden_dim"),
    per_layer=True,
)
HEADS = Field("add_head_count", ("num_attention_heads", "n_head", "n_heads"))
KEY_VALUE_HEADS = Field("add_head_count_kv", ("num_key_value_heads", "n_kv_heads"))
RMS_EPSILON = Field("add_layer_norm_rms_eps", ("rms_norm_eps", "norm_eps"), number=True)
LAYER_NORM_EPSILON = Field("add_layer_norm_eps", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), number=True)
KEY_LENGTH = Field("add_key_length", ("head_dim",))
VALUE_LENGTH = Field("add_value_length", ("head_dim",))
VOCABULARY_SIZE = Field("add_vocab_size", ("vocab_size",))
SLIDING_WINDOW = Field("add_sliding_window", ("sliding_window",))
ATTENTION_SOFT_CAP = Field("add_attn_logit_softcapping", ("attn_logit_softcapping",), number=True, truthy=True)
FINAL_SOFT_CAP = Field("add_final_logit_softcapping", ("final_logit_softcapping",), number=True, truthy=True)
LOGIT_SCALE = Field("add_logit_scale", ("logit_scale",), number=True)
EXPERTS = Field("add_expert_count", ("num_local_experts", "num_experts", "n_routed_experts"))
EXPERTS_USED = Field("add_expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"))
EXPERT_FEED_FORWARD = Field("add_expert_feed_forward_length", ("moe_intermediate_size",))
SHARED_EXPERTS = Field("add_expert_shared_count", ("n_shared_experts", "num_shared_experts"))
EXPERT_SCALE = Field("add_expert_weights_scale", ("routed_scaling_factor",), number=True)
EXPERT_NORM = Flag("add_expert_weights_norm", ("norm_topk_prob",))
NEXT_LAYERS = Field("add_nextn_predict_layers", ("num_nextn_predict_layers",))
LEADING_DENSE = Field("add_leading_dense_block_count", ("first_k_dense_replace",))

# What most families write, in the reference converter's order.
SHARED: tuple[Parameter, ...] = (
    block_count,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KEY_VALUE_HEADS,
    causal,
    rope,
    RMS_EPSILON,
    LAYER_NORM_EPSILON,
    EXPERTS,
    EXPERTS_USED,
    Field("add_expert_group_count", ("n_group",)),
    Field("add_expert_group_used_count", ("topk_group",)),
    gating,
    KEY_LENGTH,
    VALUE_LENGTH,
    file_type,
)
