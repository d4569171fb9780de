"""gpt-oss: experts in MXFP4 that stay as they are, attention sinks, a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.base import Architecture, Transform
from quantkit.architectures.feed_forward import Activation, Gating
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import SHARED, SLIDING_WINDOW, Field
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.rearrangements import HALVES, every, every_column, in_turn, transpose
from quantkit.formats.gguf import Metadata, TensorInfo

_EXPERTS = ".mlp.experts."


class GptOss(Architecture):
    """GptOssForCausalLM. Rows of gate and up projections alternate in one tensor; without MXFP4, transposed."""

    gguf_name = "gpt-oss"
    checkpoints = {  # noqa: RUF012
        "GptOssForCausalLM": {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "rope_theta": 150000.0,
        },
    }
    parameters = (*SHARED, SLIDING_WINDOW, Field("add_expert_feed_forward_length", ("intermediate_size",)))
    pieces = {  # noqa: RUF012
        f"{_EXPERTS}gate_up_proj": {
            f"{_EXPERTS}{half}_proj.weight": Transform(in_turn(transpose, every(i, 2))) for i, half in enumerate(HALVES)
        },
        f"{_EXPERTS}down_proj": {f"{_EXPERTS}down_proj.weight": Transform(transpose)},
        f"{_EXPERTS}gate_up_proj_bias": {
            f"{_EXPERTS}{half}_proj.bias": Transform(every_column(i, 2)) for i, half in enumerate(HALVES)
        },
        f"{_EXPERTS}down_proj_bias": {f"{_EXPERTS}down_proj.bias": Transform()},
        ".sinks": {".sinks.weight": Transform()},
    }
    packed = {  # noqa: RUF012
        f"{_EXPERTS}gate_up_proj": {
            f"{_EXPERTS}{half}_proj.weight": slice(i, None, 2) for i, half in enumerate(HALVES)
        },
        f"{_EXPERTS}down_proj": {f"{_EXPERTS}down_proj.weight": slice(None)},
    }
    notes = "MXFP4 experts as they are, attention sinks"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Sinks, biases everywhere, experts with biases whose shares are the softmax of the chosen."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        windows = model.windows(model.integer("attention.sliding_window"), 2)
        n_ff = model.per_layer("expert_feed_forward_length")
        return model.spec(
            model.layer(
                i,
                model.attention(i, rope, window=window, sinks=f"blk.{i}.attn_sinks.weight"),
                model.experts(
                    i,
                    n_ff[i],
                    activation=Activation.CLAMPED_SILU,
                    gating=Gating.CHOSEN,
                    normalised=False,
                    **{f"{part}_bias": f"blk.{i}.ffn_{part}_exps.bias" for part in ("gate", "up", "down")},
                ),
                feed_forward_norm=model.norm(f"blk.{i}.post_attention_norm"),
            )
            for i, window in enumerate(windows)
        )
