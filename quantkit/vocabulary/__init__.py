"""Tokenizers: read from a checkpoint, written to GGUF metadata, and text encoded from a GGUF alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.vocabulary.vocabulary import Vocabulary
    from quantkit.vocabulary.writing import write_vocabulary

__all__ = ["Vocabulary", "write_vocabulary"]


def __getattr__(name: str) -> Any:
    # Commands that only look at a file need neither numba nor gguf.
    if name == "Vocabulary":
        from quantkit.vocabulary.vocabulary import Vocabulary

        return Vocabulary
    if name == "write_vocabulary":
        from quantkit.vocabulary.writing import write_vocabulary

        return write_vocabulary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
