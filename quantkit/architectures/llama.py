"""Llama, and the dense Mistral models, which share its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from quantkit.architectures import forward
from quantkit.architectures.base import Architecture, Assembly, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.parameters import SHARED, VOCABULARY_SIZE, rope_dimensions
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def interleave_rotary(heads: str) -> Rearrange:
    """Rows of each head from two halves (transformers' rotary layout) to adjacent pairs (GGUF's).

    `heads` is the config field with the number of heads.
    """

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        n_heads = config.require(heads)
        halves = stored.reshape(n_heads, 2, stored.shape[0] // n_heads // 2, *stored.shape[1:])
        return np.swapaxes(halves, 1, 2)

    return rearrange


class Llama(Architecture):
    """LlamaForCausalLM and MistralForCausalLM: RMS norms, rotary attention with grouped heads, a gated MLP."""

    gguf_name = "llama"
    checkpoints = {"LlamaForCausalLM": _LLAMA, "MistralForCausalLM": _MISTRAL}  # noqa: RUF012
    wrappers = {  # noqa: RUF012
        "LlavaForConditionalGeneration": {"llama": _LLAMA, "mistral": _MISTRAL},
        "VoxtralForConditionalGeneration": {"llama": _LLAMA},
    }
    derived = {  # noqa: RUF012
        "num_key_value_heads": lambda config: config.require("num_attention_heads"),
        "head_dim": lambda config: config.require("hidden_size") // config.require("num_attention_heads"),
    }
    parameters = (*SHARED, VOCABULARY_SIZE, rope_dimensions)
    transforms = {  # noqa: RUF012
        f"{projection}.{kind}": Transform(rearrange=interleave_rotary(heads))
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
        for kind in ("weight", "bias")
    }
    wrapping = ("language_model.", "text_model.")
    vocabulary = "auto"
    notes = "dense Mistral too"

    def computed_tensors(self) -> Iterator[Assembly]:
        """Llama 3's rope scaling is a tensor of divisors in GGUF."""
        factors = self.rope.llama3_factors(self.rope_dimensions)
        if factors is not None:
            yield Assembly("rope_freqs.weight", values=factors)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> forward.ForwardSpec:
        """RMS norms, rotary attention with grouped heads, gated SiLU; biases where the file has them."""
        arch = metadata.architecture
        n_embd = int(metadata.require(f"{arch}.embedding_length"))
        n_layer = int(metadata.require(f"{arch}.block_count"))
        eps = float(metadata.require(f"{arch}.attention.layer_norm_rms_epsilon"))
        if metadata.lookup(f"{arch}.expert_count", 0):
            raise QuantkitError(f"evaluating {arch} models with experts is not supported yet")
        if not 0 < n_layer <= len(tensors):
            raise QuantkitError(
                f"the metadata says {n_layer} layers, which the model's {len(tensors)} tensors cannot hold"
            )
        heads = forward.per_layer(metadata, f"{arch}.attention.head_count", n_layer)
        heads_kv = [
            kv or n
            for kv, n in zip(
                forward.per_layer(metadata, f"{arch}.attention.head_count_kv", n_layer, 0), heads, strict=True
            )
        ]
        if min(heads) < 1:
            raise QuantkitError(f"the metadata's {arch}.attention.head_count is {min(heads)}, which is less than 1")
        head_k = int(metadata.lookup(f"{arch}.attention.key_length", n_embd // heads[0]))
        head_v = int(metadata.lookup(f"{arch}.attention.value_length", n_embd // heads[0]))
        scale = float(metadata.lookup(f"{arch}.attention.scale", 0.0)) or 1.0 / math.sqrt(head_k)
        rotary = forward.rope(
            metadata, int(metadata.lookup(f"{arch}.rope.dimension_count", head_k)), forward.RopeStyle.NORMAL, tensors
        )
        n_ffs = forward.per_layer(metadata, f"{arch}.feed_forward_length", n_layer)

        def layer(i: int) -> forward.Layer:
            at = f"blk.{i}"
            return forward.Layer(
                attention_norm=forward.Norm(f"{at}.attn_norm.weight", eps),
                attention=forward.Attention(
                    n_head=heads[i],
                    n_head_kv=heads_kv[i],
                    head_k=head_k,
                    head_v=head_v,
                    scale=scale,
                    rope=rotary,
                    q=forward.linear(tensors, f"{at}.attn_q"),
                    k=forward.linear(tensors, f"{at}.attn_k"),
                    v=forward.linear(tensors, f"{at}.attn_v"),
                    out=forward.linear(tensors, f"{at}.attn_output"),
                ),
                feed_forward_norm=forward.Norm(f"{at}.ffn_norm.weight", eps),
                feed_forward=forward.FeedForward(
                    n_ff=n_ffs[i],
                    gate=forward.linear(tensors, f"{at}.ffn_gate"),
                    up=forward.linear(tensors, f"{at}.ffn_up"),
                    down=forward.linear(tensors, f"{at}.ffn_down"),
                ),
            )

        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise QuantkitError("the model has no tensor token_embd.weight")
        return forward.ForwardSpec(
            architecture=arch,
            n_vocab=embedding.n_rows,
            n_embd=n_embd,
            n_ctx_train=int(metadata.lookup(f"{arch}.context_length", 0)),
            embedding="token_embd.weight",
            layers=tuple(layer(i) for i in range(n_layer)),
            output_norm=forward.Norm("output_norm.weight", eps),
            output=forward.linear(tensors, "output" if "output.weight" in tensors else "token_embd"),
        )
