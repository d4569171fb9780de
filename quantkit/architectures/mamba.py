"""Mamba, the first: state spaces alone, without feed-forward blocks; Falcon Mamba normalises what they select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import Field, block_count, file_type
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.state_space import MAMBA, constant_sizes, context, padded_vocabulary
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _write_sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    hidden = config.require("hidden_size", "d_model")
    inner = config.integer("intermediate_size", "d_inner") or 2 * hidden
    if inner != 2 * hidden:
        raise config.wrong(("intermediate_size", "d_inner"), inner, "twice the hidden size, as llama.cpp asks for")
    writer.add_ssm_conv_kernel(config.integer("conv_kernel", "d_conv") or 4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.integer("state_size", "d_state") or 16)
    writer.add_ssm_time_step_rank(config.integer("time_step_rank", "dt_rank") or -(-hidden // 16))
    writer.add_layer_norm_rms_eps(config.number("layer_norm_epsilon", "rms_norm_eps") or 1e-5)
    writer.add_ssm_dt_b_c_rms(config.find("model_type") == "falcon_mamba")


class Mamba(Architecture):
    """MambaForCausalLM and FalconMambaForCausalLM."""

    gguf_name = "mamba"
    # The reference does not ask the configuration classes.
    checkpoints = {  # noqa: RUF012
        "MambaForCausalLM": {"tie_word_embeddings": True},
        "FalconMambaForCausalLM": {"tie_word_embeddings": True, "model_type": "falcon_mamba"},
    }
    parameters = (
        context,
        Field("add_embedding_length", ("hidden_size", "d_model")),
        constant_sizes,
        block_count,
        _write_sizes,
        file_type,
    )
    transforms = MAMBA
    vocabulary = "bpe"
    notes = "Falcon Mamba too; state spaces alone"

    def complete(self, config: Config) -> Config:
        """The number of tokens is a multiple of 8."""
        return padded_vocabulary(super().complete(config), 8)

    def canonical_name(self, name: str) -> str | None:
        """An output matrix that is the embedding is left out."""
        found = super().canonical_name(name)
        return None if found == "lm_head.weight" and self.config.find("tie_word_embeddings") else found

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """A state space is all of a layer."""
        model = ModelReader(metadata, tensors)
        normed = model.flag("ssm.dt_b_c_rms", False)
        return model.spec(
            model.layer(i, model.mamba(i, normed), None, feed_forward_norm=None) for i in range(model.n_layer)
        )
