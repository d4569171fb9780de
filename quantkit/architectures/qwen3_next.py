"""Qwen3-Next and Qwen3.5: three layers of gated delta net for each one of attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Architecture, Assembly, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.experts import EXPERTS
from quantkit.architectures.feed_forward import Experts, FeedForward
from quantkit.architectures.forward import MAX_HEAD, ForwardSpec
from quantkit.architectures.gemma2 import plus_one
from quantkit.architectures.mixers import Attention, RopeStyle
from quantkit.architectures.parameters import NEXT_LAYERS, rope_dimensions
from quantkit.architectures.products import Linear
from quantkit.architectures.qwen2_moe import Qwen2Moe
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import STACKED_EXPERTS, decay_rates, in_turn, kernel
from quantkit.architectures.recurrent_mixers import DeltaNet
from quantkit.formats.gguf import INTEGERS, Metadata, TensorInfo, ValueType
from quantkit.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# What the tensors of the layers that predict several tokens are called after the others.
_NEXT_NAMES = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}
_NEXT_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


def _delta_parts(*which: str) -> tuple[Rearrange, ...]:
    """Rows of queries, keys, values and gates, which a checkpoint keeps together for each head of keys."""

    def rows(part: str) -> Rearrange:
        def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
            heads, key = config.require("linear_num_key_heads"), config.require("linear_key_head_dim")
            values = config.require("linear_num_value_heads") // heads * config.require("linear_value_head_dim")
            start, size = {"q": (0, key), "k": (key, key), "v": (2 * key, values), "z": (2 * key + values, values)}[
                part
            ]
            return stored.reshape(heads, 2 * (key + values), -1)[:, start : start + size]

        return rearrange

    return tuple(map(rows, which))


def _write_delta_net(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """The sizes of the gated delta net, and which layers are one."""
    config = architecture.config
    writer.add_ssm_conv_kernel(config.require("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(config.require("linear_key_head_dim"))
    writer.add_ssm_group_count(config.require("linear_num_key_heads"))
    writer.add_ssm_time_step_rank(config.require("linear_num_value_heads"))
    writer.add_ssm_inner_size(config.require("linear_value_head_dim") * config.require("linear_num_value_heads"))
    if config.find("layer_types") is not None:
        kinds = config.listed("layer_types", config.require("num_hidden_layers"))
        recurrent = [kind == "linear_attention" for kind in kinds] + [False] * (architecture.n_layers - len(kinds))
        writer.add_array(f"{architecture.gguf_name}.attention.recurrent_layers", recurrent)
    interval = config.integer("full_attention_interval")
    writer.add_full_attention_interval(4 if interval is None else interval)


def _forward(metadata: Metadata, tensors: Mapping[str, TensorInfo], tiled: bool) -> ForwardSpec:
    """Layers of gated delta net and of gated attention, each before a dense block or experts beside a gated block.

    The three positions of a token of text are the same, so the rotary sections do not matter.
    """
    model = ModelReader(metadata, tensors)
    rope = model.rope(RopeStyle.NEOX)
    key = f"{model.arch}.attention.recurrent_layers"
    if metadata.is_array(key):
        recurrent = [bool(on) for on in metadata.array(key, (ValueType.BOOL, *INTEGERS))]
        if len(recurrent) != model.n_listed:
            raise metadata.wrong(key, f"{model.n_listed} values, one for each layer")
    else:
        interval = model.integer("full_attention_interval", 4, low=1)
        recurrent = [(i + 1) % interval != 0 for i in range(model.n_layer)]
    experts = model.integer("expert_count", 0) > 0
    sizes = model.expert_sizes() if experts else []
    shared = model.integer("expert_shared_feed_forward_length", 0)

    def mixer(i: int) -> Attention | DeltaNet:
        at = f"blk.{i}."
        if not recurrent[i]:
            return model.attention(i, rope, gated=True, scale=model.scale, **model.qk_norms(i))
        n_head, n_head_k = model.integer("ssm.time_step_rank", low=1), model.integer("ssm.group_count")
        head_k = model.integer("ssm.state_size", high=MAX_HEAD)
        head_v = model.integer("ssm.inner_size") // n_head
        together = f"{at}ssm_ba.weight" in tensors
        return DeltaNet(
            n_head_k=n_head_k,
            n_head=n_head,
            head_k=head_k,
            head_v=head_v,
            eps=model.eps,
            qkv=model.linear(f"{at}attn_qkv"),
            gate=model.linear(f"{at}attn_gate"),
            convolution=model.convolution(f"{at}ssm_conv1d", 2 * n_head_k * head_k + n_head * head_v),
            dt_bias=f"{at}ssm_dt.bias",
            decay=f"{at}ssm_a",
            norm=model.norm(f"{at}ssm_norm"),
            out=model.linear(f"{at}ssm_out"),
            tiled=tiled,
            beta=None if together else model.linear(f"{at}ssm_beta"),
            alpha=None if together else model.linear(f"{at}ssm_alpha"),
            beta_alpha=model.linear(f"{at}ssm_ba") if together else None,
        )

    def feed_forward(i: int) -> FeedForward | Experts:
        if not experts:
            return model.feed_forward(i)
        return model.experts(
            i,
            sizes[i],
            scale=model.number("expert_weights_scale", 0.0) or 1.0,
            shared=model.shared_experts(i, shared or model.feed_forward_sizes[i]),
            shared_gate=Linear(f"blk.{i}.ffn_gate_inp_shexp.weight"),
        )

    return model.spec(
        model.layer(i, mixer(i), feed_forward(i), feed_forward_norm=model.norm(f"blk.{i}.post_attention_norm"))
        for i in range(model.n_layer)
    )


_DENSE = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
}
_MOE = {
    **{name: value for name, value in _DENSE.items() if name != "intermediate_size"},
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}


class Qwen3Next(Architecture):
    """Qwen3NextForCausalLM. Layers that predict several tokens are kept."""

    gguf_name = "qwen3next"
    checkpoints = {  # noqa: RUF012
        "Qwen3NextForCausalLM": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    parameters = (*Qwen2Moe.parameters, NEXT_LAYERS, _write_delta_net, rope_dimensions)
    rotary_part = 0.25
    stacks = (EXPERTS,)
    pieces = {  # noqa: RUF012
        **STACKED_EXPERTS,
        ".dt_bias": {".dt_proj.bias": Transform()},
        ".in_proj_qkvz.weight": {
            ".in_proj_qkv.weight": Transform(_delta_parts("q", "k", "v")),
            ".in_proj_z.weight": Transform(_delta_parts("z")),
        },
    }
    transforms = {  # noqa: RUF012
        ".A_log": Transform(arithmetic=decay_rates),
        ".conv1d.weight": Transform(kernel, n_axes=2),
        "linear_attn.norm.weight": Transform(),
        "norm.weight": Transform(arithmetic=plus_one),
    }
    keeps_next_layers = True
    notes = "gated delta net; experts beside a gated block"

    def tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """See Architecture. Where config.json is silent the tensors tell how many layers predict several tokens."""
        count = self.config.integer("mtp_num_hidden_layers")
        if not count:
            found = [_NEXT_LAYER.match(name.removeprefix("model.")) for name in stored]
            count = max((int(match[1]) + 1 for match in found if match), default=0)
        self.config = self.config.changed(num_nextn_predict_layers=count)
        yield from super().tensors(stored)

    def canonical_name(self, name: str) -> str | None:
        """See Architecture. Layers that predict several tokens come after the others."""
        canonical = super().canonical_name(name)
        if canonical is None or not canonical.removeprefix("model.").startswith("mtp."):
            return canonical
        canonical = canonical.removeprefix("model.")
        after = self.config.require("num_hidden_layers")
        if match := _NEXT_LAYER.match(canonical):
            return f"model.layers.{after + int(match[1])}.{canonical[match.end() :]}"
        part, _, ending = canonical.removeprefix("mtp.").partition(".")
        return f"model.layers.{after}.{_NEXT_NAMES.get(part, part)}.{ending}"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Heads of values that share keys are neighbours."""
        return _forward(metadata, tensors, tiled=False)


def _tiled(config: Config, stored: np.ndarray, head: int) -> np.ndarray:
    """Rows of values with the first head of each group first, then the second ones, and so on.

    Checkpoints keep the heads of values that share a head of keys together. ggml repeats all keys in turn.
    """
    groups = config.require("linear_num_key_heads")
    grouped = stored.reshape(groups, config.require("linear_num_value_heads") // groups, head, *stored.shape[1:])
    return np.swapaxes(grouped, 0, 1)


def _tiled_values(config: Config, stored: np.ndarray) -> np.ndarray:
    return _tiled(config, stored, config.require("linear_value_head_dim"))


def _tiled_heads(config: Config, stored: np.ndarray) -> np.ndarray:
    return _tiled(config, stored, 1)


def _n_keys(config: Config) -> int:
    """How many rows queries and keys have together."""
    return 2 * config.require("linear_num_key_heads") * config.require("linear_key_head_dim")


def _keys(config: Config, stored: np.ndarray) -> np.ndarray:
    return stored[: _n_keys(config)]


def _values(config: Config, stored: np.ndarray) -> np.ndarray:
    return _tiled_values(config, stored[_n_keys(config) :])


def _tiled_columns(config: Config) -> np.ndarray:
    n_values = config.require("linear_num_value_heads") * config.require("linear_value_head_dim")
    return _tiled_values(config, np.arange(n_values)).reshape(-1)


def _write_sections(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """How many pairs turn with each position, which llama.cpp asks for."""
    if architecture.rope.sections is None:
        writer.add_rope_dimension_sections([11, 11, 10, 0])


class Qwen35(Qwen3Next):
    """Qwen3_5ForCausalLM, and the text model of Qwen3_5ForConditionalGeneration."""

    gguf_name = "qwen35"
    checkpoints = {"Qwen3_5ForCausalLM": _DENSE}  # noqa: RUF012
    wrappers = {"Qwen3_5ForConditionalGeneration": {"qwen3_5_text": _DENSE}}  # noqa: RUF012
    parameters = (*Qwen3Next.parameters, _write_sections)
    pieces = {  # noqa: RUF012
        **STACKED_EXPERTS,
        ".dt_bias": {".dt_proj.bias": Transform(_tiled_heads)},
    }
    transforms = {  # noqa: RUF012
        ".A_log": Transform(_tiled_heads, decay_rates),
        ".in_proj_qkv.weight": Transform((_keys, _values)),
        ".in_proj_z.weight": Transform(_tiled_values),
        ".in_proj_a.weight": Transform(_tiled_heads),
        ".in_proj_b.weight": Transform(_tiled_heads),
        ".conv1d.weight": Transform((in_turn(kernel, _keys), in_turn(kernel, _values)), n_axes=2),
        ".linear_attn.out_proj.weight": Transform(columns=_tiled_columns),
        "linear_attn.norm.weight": Transform(),
        "norm.weight": Transform(arithmetic=plus_one),
    }
    notes = "text part; gated delta net"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Heads of values that share keys are as many apart as there are heads of keys."""
        return _forward(metadata, tensors, tiled=True)


class Qwen35Moe(Qwen35):
    """Qwen3_5MoeForCausalLM, and the text model of Qwen3_5MoeForConditionalGeneration."""

    gguf_name = "qwen35moe"
    checkpoints = {"Qwen3_5MoeForCausalLM": _MOE}  # noqa: RUF012
    wrappers = {"Qwen3_5MoeForConditionalGeneration": {"qwen3_5_moe_text": _MOE}}  # noqa: RUF012
    notes = "text part; gated delta net; experts beside a gated block"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Qwen3.5's, with experts."""
        return _forward(metadata, tensors, tiled=True)
