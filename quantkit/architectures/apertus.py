"""Apertus: Llama's layers with QK norms, and an MLP without a gate whose activation is learned (xIELU)."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.architectures.feed_forward import XIELU, FeedForward
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import Llama
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

# The learned numbers of the activation, as checkpoints and GGUF call them.
_LEARNED = ("alpha_n", "alpha_p", "beta", "eps")


class Apertus(Llama):
    """ApertusForCausalLM. The rotary halves stay as they are; the learned numbers are metadata in GGUF."""

    gguf_name = "apertus"
    checkpoints = {  # noqa: RUF012
        "ApertusForCausalLM": {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-05,
            "rope_theta": 12000000.0,
        },
    }
    derived = MULTI_HEAD
    transforms = {}  # noqa: RUF012
    numbers = {f".act_fn.{name}": f"add_xielu_{name}" for name in _LEARNED}  # noqa: RUF012
    notes = "QK norms, a learned activation"

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with QK norms and xIELU without a gate."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NEOX)
        learned = {name: model.per_layer_numbers(f"xielu.{name}", prefixed=False) for name in _LEARNED}

        def feed_forward(i: int) -> FeedForward:
            return model.feed_forward(i, XIELU(**{name: numbers[i] for name, numbers in learned.items()}), gated=False)

        return model.spec(
            model.layer(i, model.attention(i, rope, scale=model.scale, **model.qk_norms(i)), feed_forward(i))
            for i in range(model.n_layer)
        )
