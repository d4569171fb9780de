"""Mamba 2: state spaces alone, without feed-forward blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.architectures.base import Architecture
from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.parameters import EMBEDDING, block_count, file_type
from quantkit.architectures.reader import ModelReader
from quantkit.architectures.state_space import STEP_BIAS, constant_sizes, context, mamba2, padded_vocabulary
from quantkit.formats.gguf import Metadata, TensorInfo

if TYPE_CHECKING:
    from gguf import GGUFWriter


def _write_sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    config = architecture.config
    inner = config.integer("intermediate_size", "d_inner")
    inner = inner or config.require("expand") * config.require("hidden_size", "d_model")
    writer.add_ssm_conv_kernel(config.require("conv_kernel", "d_conv"))
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config.require("state_size", "d_state"))
    writer.add_ssm_time_step_rank(inner // config.require("head_dim"))
    writer.add_ssm_group_count(config.require("n_groups"))
    writer.add_layer_norm_rms_eps(config.required_number("layer_norm_epsilon", "rms_norm_eps"))


class Mamba2(Architecture):
    """Mamba2ForCausalLM."""

    gguf_name = "mamba2"
    # What the reference assumes, which does not ask the configuration class.
    checkpoints = {  # noqa: RUF012
        "Mamba2ForCausalLM": {
            "head_dim": 64,
            "state_size": 128,
            "conv_kernel": 4,
            "expand": 2,
            "n_groups": 1,
            "layer_norm_epsilon": 1e-5,
        },
    }
    parameters = (context, EMBEDDING, constant_sizes, block_count, _write_sizes, file_type)
    pieces = STEP_BIAS
    transforms = mamba2("mixer", "n_groups")
    vocabulary = "spm-or-bpe"
    notes = "state spaces alone"

    def complete(self, config: Config) -> Config:
        """The number of tokens is a multiple of 16."""
        return padded_vocabulary(super().complete(config), 16)

    def canonical_name(self, name: str) -> str | None:
        """Codestral's tensors have another beginning."""
        if name.startswith(("model.backbone.", "model.lm_head.")):
            name = name.removeprefix("model.")
        return super().canonical_name(name)

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """A state space is all of a layer."""
        model = ModelReader(metadata, tensors)
        return model.spec(model.layer(i, model.mamba2(i), None, feed_forward_norm=None) for i in range(model.n_layer))
