"""What a model remembers of the tokens read so far, so that they need not be read again."""

from __future__ import annotations

import math

import numpy as np

from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.mixers import Attention
from quantkit.errors import QuantkitError
from quantkit.evaluate.layers import RUNNERS
from quantkit.machine import available_memory
from quantkit.wording import size_text


class KVCache:
    """Keys, values and states of `n_ctx` tokens in every layer of the model that `spec` describes.

    `tokens` are those read so far; `memories` holds for each layer, and each of its mixers, the float32 arrays that
    the mixer's runner describes. Raises QuantkitError when there is not enough memory.
    """

    def __init__(self, spec: ForwardSpec, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.tokens: list[int] = []
        shapes = [[RUNNERS[type(m)].memory(m, n_ctx) for m in layer.mixers] for layer in spec.layers]
        needed = 4 * sum(math.prod(shape) for layer in shapes for mixer in layer for shape in mixer)
        if needed > available_memory():
            raise QuantkitError(
                f"keys and values of {n_ctx} tokens take {size_text(needed)}, more than there is: "
                "use a shorter prompt or fewer tokens"
            )
        self.memories = [[tuple(np.zeros(shape, np.float32) for shape in mixer) for mixer in layer] for layer in shapes]
        for layer, held in zip(spec.layers, self.memories, strict=True):
            for i, mixer in enumerate(layer.mixers):
                if isinstance(mixer, Attention) and mixer.shared is not None:
                    held[i] = self.memories[mixer.shared.layer][i]
