"""RWKV 7: a matrix for each head that decays and learns as a token says, and a token that mixes with the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from quantkit.architectures.base import Architecture, Assembly, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.experts import Stack
from quantkit.architectures.forward import ForwardSpec, Layer
from quantkit.architectures.parameters import EMBEDDING, Constant, Field, block_count, file_type
from quantkit.architectures.products import Linear, Norm, NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.recurrent_mixers import ChannelMix, LowRank, TimeMix
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

# The models read texts of any length.
_CONTEXT = 1 << 20
# What the groups of a head's results are normalised with.
_GROUP_EPSILON = 64e-5
_MIXED = ("r", "w", "k", "v", "a", "g")


def _rank(exponent: float, factor: float) -> Callable[[Config], int]:
    """How wide a product of two matrices is in between, for the size of a model."""
    return lambda config: max(1, round(config.require("hidden_size") ** exponent * factor / 32)) * 32


def _flat(_config: Config, stored: np.ndarray) -> np.ndarray:
    return stored.reshape(-1)


_FLAT = Transform(_flat, n_axes=1)


class Rwkv7(Architecture):
    """RWKV7ForCausalLM, as flash-linear-attention stores it."""

    gguf_name = "rwkv7"
    checkpoints = {  # noqa: RUF012
        "RWKV7ForCausalLM": {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "head_dim": 64,
            "norm_eps": 1e-5,
        }
    }
    derived = {  # noqa: RUF012
        "intermediate_size": lambda config: 4 * config.require("hidden_size"),
        "decay_low_rank_dim": _rank(0.5, 1.8),
        "a_low_rank_dim": _rank(0.5, 1.8),
        "v_low_rank_dim": _rank(0.5, 1.3),
        "gate_low_rank_dim": _rank(0.8, 0.6),
    }
    parameters = (
        Constant("add_context_length", _CONTEXT),
        EMBEDDING,
        block_count,
        Field("add_layer_norm_eps", ("norm_eps",), number=True),
        Field("add_wkv_head_size", ("head_dim",)),
        Field("add_decay_lora_rank", ("decay_low_rank_dim",)),
        Field("add_iclr_lora_rank", ("a_low_rank_dim",)),
        Field("add_value_residual_mix_lora_rank", ("v_low_rank_dim",)),
        Field("add_gate_lora_rank", ("gate_low_rank_dim",)),
        Field("add_feed_forward_length", ("intermediate_size",)),
        file_type,
        Constant("add_head_count", 0),
    )
    renames = {  # noqa: RUF012
        **Architecture.renames,
        "ffn": "feed_forward",
        "attn": "attention",
        "feed_forward_norm": "ln2",
        "g_norm": "ln_x",
        "_lora.lora.0.weight": "1.weight",
        "_lora.lora.2.weight": "2.weight",
        "_lora.lora.2.bias": "0.weight",
    }
    transforms = {  # noqa: RUF012
        ".attention.k_k": _FLAT,
        ".attention.k_a": _FLAT,
        ".attention.r_k": _FLAT,
        ".feed_forward.x_k": _FLAT,
    }
    stacks = (
        Stack(
            (), "model.layers.{layer}.attention.x_{item}", "model.layers.{layer}.attention.lerp_fused", ("",), _MIXED
        ),
    )
    vocabulary = "rwkv"
    notes = "as flash-linear-attention stores it"

    def gguf_tensor_name(self, name: str) -> str:
        """See `Architecture`; all names end as those of weights do."""
        if name.endswith(".attention.lerp_fused"):
            return f"blk.{name.split('.')[2]}.time_mix_lerp_fused.weight"
        found = super().gguf_tensor_name(name)
        return found if found.endswith((".weight", ".bias")) else f"{found}.weight"

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """See `Architecture`. The first layer has no values before it to mix with: what stands there is not read."""
        first = name.startswith("model.layers.0.attention.")
        if first and name.rsplit(".", 2)[1] in ("v0", "v1", "v2"):
            return
        if first and name.rsplit(".", 2)[1] in ("a0", "a1", "a2"):
            yield Assembly(self.gguf_tensor_name(name.replace("attention.a", "attention.v")), (stored_name,))
        yield from super().assemble(name, stored_name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Two layers for each of the model's: one that mixes times, one that mixes channels."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        head = model.integer("wkv.head_size", low=1)
        if model.n_embd % head:
            raise QuantkitError(f"the metadata says {model.n_embd} numbers a token, in heads of {head}")
        ranks = {
            part: model.integer(f"attention.{key}_lora_rank", low=1)
            for part, key in (("w", "decay"), ("a", "iclr"), ("v", "value_residual_mix"), ("g", "gate"))
        }
        layers = []
        for i in range(model.n_layer):
            at = f"blk.{i}."

            def low_rank(part: str, at: str = at) -> LowRank:
                stem = f"{at}time_mix_{part}"
                bias = None if part == "g" else f"{stem}0.weight"
                return LowRank(ranks[part], Linear(f"{stem}1.weight"), Linear(f"{stem}2.weight"), bias)

            mixer = TimeMix(
                n_head=model.n_embd // head,
                head=head,
                lerp=f"{at}time_mix_lerp_fused.weight",
                receptance=model.linear(f"{at}time_mix_receptance"),
                key=model.linear(f"{at}time_mix_key"),
                value=model.linear(f"{at}time_mix_value"),
                out=model.linear(f"{at}time_mix_output"),
                decay=low_rank("w"),
                rate=low_rank("a"),
                gate=low_rank("g"),
                values=low_rank("v") if i > 0 else None,
                key_scale=f"{at}time_mix_k_k.weight",
                key_rate=f"{at}time_mix_k_a.weight",
                bonus=f"{at}time_mix_r_k.weight",
                norm=Norm(f"{at}time_mix_ln.weight", _GROUP_EPSILON, NormKind.LAYER, f"{at}time_mix_ln.bias"),
                values_at=model.n_embd,
            )
            channels = ChannelMix(
                n_embd=model.n_embd,
                n_ff=model.feed_forward_sizes[i],
                lerp=f"{at}channel_mix_lerp_k.weight",
                key=model.linear(f"{at}channel_mix_key"),
                out=model.linear(f"{at}channel_mix_value"),
            )
            layers += [
                Layer((mixer,), None, model.norm(f"{at}attn_norm"), None),
                Layer((channels,), None, model.norm(f"{at}attn_norm_2"), None),
            ]
        return model.spec(
            layers,
            embedding_norm=model.norm("token_embd_norm"),
            n_kept=model.n_embd,
            idle=tuple(f"blk.0.time_mix_v{i}.weight" for i in range(3)),
        )
