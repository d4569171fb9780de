"""GPT-2: LayerNorm with biases, learned positions, fused attention, no gate; matrices stored transposed."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.feed_forward import Activation
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import EMBEDDING, HEADS, LAYER_NORM_EPSILON, Field, block_count, file_type
from quantkit.architectures.products import NormKind
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import transpose
from quantkit.formats.gguf import Metadata, TensorInfo


class GPT2(Architecture):
    """GPT2LMHeadModel. Its Conv1D stores inputs in rows, GGUF outputs."""

    gguf_name = "gpt2"
    checkpoints = {  # noqa: RUF012
        "GPT2LMHeadModel": {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "layer_norm_epsilon": 1e-5,
        }
    }
    derived = {  # noqa: RUF012
        "n_ctx": lambda config: config.require("n_positions"),
        "n_inner": lambda config: 4 * config.require("n_embd"),
    }
    parameters = (
        block_count,
        Field("add_context_length", ("n_ctx",)),
        EMBEDDING,
        Field("add_feed_forward_length", ("n_inner",)),
        HEADS,
        LAYER_NORM_EPSILON,
        file_type,
    )
    transforms = {  # noqa: RUF012
        f".{layer}.weight": Transform(rearrange=transpose) for layer in ("c_attn", "c_proj", "c_fc")
    }
    skipped = (*Architecture.skipped, ".attn.bias", ".attn.masked_bias")
    notes = "learned positions, matrices stored transposed"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """LayerNorms, learned positions, no rotary embedding, GELU without a gate."""
        model = ModelReader(metadata, tensors, NormKind.LAYER)
        return model.spec(
            (
                model.layer(i, model.attention(i, None), model.feed_forward(i, Activation.GELU, gated=False))
                for i in range(model.n_layer)
            ),
            position_embedding="position_embd.weight",
        )
