"""A key-value cache: keys and values of the tokens read so far, so that they need not be computed again."""

from __future__ import annotations

import numpy as np

from quantkit.architectures.forward import ForwardSpec
from quantkit.errors import QuantkitError
from quantkit.machine import available_memory
from quantkit.wording import size_text


class KVCache:
    """Storage for the keys and values of `n_ctx` tokens in every layer of the model that `spec` describes.

    `tokens` are those read so far; `keys` and `values` hold float32 [groups, n_ctx, head size] for each layer, of
    which the first `len(tokens)` positions are filled. Raises QuantkitError when there is not enough memory.
    """

    def __init__(self, spec: ForwardSpec, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.tokens: list[int] = []
        attentions = [layer.attention for layer in spec.layers]
        needed = sum(a.n_head_kv * n_ctx * (a.head_k + a.head_v) * 4 for a in attentions)
        if needed > available_memory():
            raise QuantkitError(
                f"keys and values of {n_ctx} tokens take {size_text(needed)}, more than there is: "
                "use a shorter prompt or fewer tokens"
            )
        self.keys = [np.empty((a.n_head_kv, n_ctx, a.head_k), np.float32) for a in attentions]
        self.values = [np.empty((a.n_head_kv, n_ctx, a.head_v), np.float32) for a in attentions]
