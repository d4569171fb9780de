"""What families with state spaces share: Mamba's tensors, and the sizes of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from quantkit.architectures.base import Pieces, Rearrange, Transform
from quantkit.architectures.config import Config
from quantkit.architectures.rearrangements import decay_rates, kernel

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from quantkit.architectures.base import Architecture

# What GGUF says of models that do not know positions.
CONTEXT = 1 << 20
# The bias of the steps, which Mamba 2 has without a matrix.
STEP_BIAS: Mapping[str, Pieces] = {".dt_bias": {".dt_proj.bias": Transform()}}


def _column(_config: Config, stored: np.ndarray) -> np.ndarray:
    """A number in each row."""
    return stored.reshape(-1, 1)


def _grouped(groups: str) -> Rearrange:
    """The numbers of each group in a row."""

    def rearrange(config: Config, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(config.require(groups), -1)

    return rearrange


def mamba2(part: str, groups: str) -> Mapping[str, Transform]:
    """How Mamba 2's tensors are converted: `part` is what a layer calls it, `groups` the field that counts groups."""
    return {
        ".A_log": Transform(_column, decay_rates, n_axes=2),
        f".{part}.D": Transform(_column, n_axes=2),
        f".{part}.norm.weight": Transform(_grouped(groups), n_axes=2),
        ".conv1d.weight": Transform(kernel, n_axes=2),
    }


# How the tensors of the first Mamba are converted.
MAMBA: Mapping[str, Transform] = {
    ".A_log": Transform(arithmetic=decay_rates),
    ".conv1d.weight": Transform(kernel, n_axes=2),
}


def padded_vocabulary(config: Config, multiple: int) -> Config:
    """`config` with a number of tokens that is a multiple of `multiple`, or of what it says itself."""
    size, own = config.require("vocab_size"), config.integer("pad_vocab_size_multiple") or multiple
    return config.changed(vocab_size=-(-size // own) * own)


def constant_sizes(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """What llama.cpp asks for and models without attention do not have."""
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)


def context(architecture: Architecture, writer: GGUFWriter, file_type: int) -> None:
    """More tokens than any text has."""
    writer.add_context_length(CONTEXT)
