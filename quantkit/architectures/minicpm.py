"""MiniCPM 1, 2 and 4: Llama's layers with multipliers, and LongRoPE's frequency factors in the fourth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.llama import INTERLEAVED
from quantkit.architectures.mixers import RopeStyle
from quantkit.architectures.parameters import MULTI_HEAD, SHARED
from quantkit.architectures.reader import ModelReader
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _multipliers(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    writer.add_embedding_scale(config.required_number("scale_emb"))
    writer.add_residual_scale(config.required_number("scale_depth") / architecture.n_layers**0.5)
    writer.add_logit_scale(config.require("hidden_size") / config.required_number("dim_model_base"))


class MiniCPM(Architecture):
    """MiniCPMForCausalLM, a class of its checkpoints' own code."""

    gguf_name = "minicpm"
    checkpoints = {  # noqa: RUF012
        "MiniCPMForCausalLM": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "scale_emb": 1,
            "scale_depth": 1,
            "dim_model_base": 1,
        },
    }
    derived = MULTI_HEAD
    parameters = (*SHARED, _multipliers)
    transforms = INTERLEAVED
    vocabulary = "spm"
    notes = "2 and 4 too; multipliers, LongRoPE"

    def computed_tensors(self) -> Iterator[Assembly]:
        """LongRoPE's frequency factors, for long texts and for short ones."""
        for name, factors in self.rope.longrope_factors(self.rope_dimensions).items():
            yield Assembly(name, values=factors)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """Llama's, with three multipliers that old files lack."""
        model = ModelReader(metadata, tensors)
        rope = model.rope(RopeStyle.NORMAL)
        residual = model.number("residual_scale", 1.4 / model.n_layer**0.5)
        logit = model.number("logit_scale", 256.0 / model.n_embd)
        return model.spec(
            (
                model.layer(
                    i,
                    model.attention(i, rope, scale=model.scale),
                    model.feed_forward(i),
                    branch_scale=residual or 1.0,
                )
                for i in range(model.n_layer)
            ),
            embedding_scale=model.number("embedding_scale", 12.0) or 1.0,
            logit_scale=1.0 / logit if logit else 1.0,
        )
