"""Hyper-parameters as data: how a field of config.json becomes a key of GGUF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from quantkit.architectures.base import Architecture

# Adds what it stands for to the writer. The number is general.file_type.
Parameter: TypeAlias = "Callable[[Architecture, GGUFWriter, int], None]"


@dataclass(frozen=True)
class Field:
    """A hyper-parameter that is copied: `add` is the method of gguf.GGUFWriter, `names` what config.json calls it.

    The first name that is there counts; nothing is written where none is. `number` allows fractions, and `truthy`
    leaves zero out.
    """

    add: str
    names: tuple[str, ...]
    number: bool = False
    truthy: bool = False

    def __call__(self, architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
        """Add it. Raises QuantkitError for a value that is no such number."""
        config = architecture.config
        value: Any = config.number(*self.names) if self.number else config.integer(*self.names)
        if value is not None and (value or not self.truthy):
            getattr(writer, self.add)(value)


def block_count(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The number of blocks."""
    writer.add_block_count(architecture.n_layers)


def causal(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """That every token sees all others, for the models where it does."""
    if architecture.config.find("is_causal") is False:
        writer.add_causal_attention(False)


def rope(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The rotary scaling and bases."""
    architecture.rope.write(writer)


def rope_dimensions(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many elements of a head are turned."""
    writer.add_rope_dimension_count(architecture.rope_dimensions)


def file_type(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The type of most tensors."""
    writer.add_file_type(file_type)


CONTEXT = Field("add_context_length", ("max_position_embeddings", "n_ctx", "n_positions", "max_length"))
EMBEDDING = Field("add_embedding_length", ("hidden_size", "n_embd", "dim"))
FEED_FORWARD = Field("add_feed_forward_length", ("intermediate_size", "n_inner", "hidden_dim"))
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
    Field("add_expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    Field("add_expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    Field("add_expert_group_count", ("n_group",)),
    Field("add_expert_group_used_count", ("topk_group",)),
    KEY_LENGTH,
    VALUE_LENGTH,
    file_type,
)
