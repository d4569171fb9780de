"""Qwen3: queries and keys are normalised head by head, and heads have a size of their own."""

from __future__ import annotations

from quantkit.architectures.qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen3ForCausalLM."""

    gguf_name = "qwen3"
    checkpoints = {  # noqa: RUF012
        "Qwen3ForCausalLM": {**Qwen2.checkpoints["Qwen2ForCausalLM"], "head_dim": 128},
    }
    wrappers = {}  # noqa: RUF012
    notes = "QK norms, own head size"
