"""What the gguf package 0.19 lacks against the llama.cpp whose files we match.

Delete this module, and its one call, when a newer gguf is required.
"""

from __future__ import annotations

from typing import Any


def complete_sampling(metadata: Any, generation_config: dict[str, Any]) -> None:
    """Take `repetition_penalty` of generation_config.json too, the name that transformers gives it."""
    if "penalty_repeat" not in generation_config and "repetition_penalty" in generation_config:
        metadata.sampling_penalty_repeat = generation_config["repetition_penalty"]
