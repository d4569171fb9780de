"""Vectors of texts: what an embedding model makes of their tokens, pooled as the model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import AnyModel, load
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.vocabulary import Vocabulary

# How the vectors of tokens become one, by the numbers that GGUF has for it.
POOLINGS = {"mean": 1, "cls": 2, "last": 3}
# That of models whose output is scores: see `evaluate.ranking`.
RANK = 4


def embed(
    model: AnyModel,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    normalise: bool = True,
    compute: Compute | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The vectors of `texts`, float32 [texts, n_embd], as llama-embedding makes them.

    `model` is a loaded model, a source, or a path. `pooling` is mean (of all tokens), cls (the first one's) or last;
    left out, it is what the model's metadata says. With `normalise` a vector has the length one. After each text
    `progress(done, texts)` is called. Raises QuantkitError for a pooling that is unknown or not said, for texts longer
    than a model with learned positions takes, and where a vector holds NaN.
    """
    model = load(model, compute)
    kind = pooling_of(model, pooling)
    vocabulary = Vocabulary.from_metadata(model.source.metadata)
    vectors = np.empty((len(texts), model.spec.n_embd), np.float32)
    for i, text in enumerate(texts):
        vectors[i] = pooled(model, vocabulary.encode(text), kind)
        if progress is not None:
            progress(i + 1, len(texts))
    if normalise:
        lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1, keepdims=True))
        vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return vectors


def pooling_of(model: Model, pooling: str | None) -> str:
    """`pooling`, or the one that the model's metadata names. Raises QuantkitError where there is none."""
    if pooling is not None:
        if pooling not in POOLINGS:
            raise QuantkitError(f"there is no pooling {pooling!r}: use {', '.join(POOLINGS)}")
        return pooling
    number = model.source.metadata.integer(f"{model.spec.architecture}.pooling_type", default=0)
    found = next((name for name, each in POOLINGS.items() if each == number), None)
    if found is None:
        raise QuantkitError(f"{model.source.label}: its metadata names no pooling: choose {', '.join(POOLINGS)}")
    return found


def pooled(model: Model, tokens: Sequence[int] | np.ndarray, pooling: str) -> np.ndarray:
    """The vector of a text of these tokens, float32 [n_embd]. Raises QuantkitError as `embed`, and for no tokens."""
    ids = np.asarray(tokens, np.int32)[None]
    if not ids.size:
        raise QuantkitError("a text without tokens has no vector")
    first = ids.shape[1] - 1 if pooling == "last" else 0
    stop = 1 if pooling == "cls" else ids.shape[1]
    hidden = model.hidden(ids, first, stop)
    model.refuse_nan(ids, hidden.reshape(1, -1))
    vector: np.ndarray = hidden[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    return vector
