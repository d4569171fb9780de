"""What kind of text a token stands for, so that a measure can say where a model errs."""

from __future__ import annotations

import numpy as np

from quantkit.vocabulary import Vocabulary

CLASSES = (
    "start of a word",
    "rest of a word",
    "number",
    "punctuation",
    "space",
    "line break",
    "part of a character",
    "control",
)
_START, _ON, _NUMBER, _PUNCTUATION, _SPACE, _BREAK, _PART, _CONTROL = range(len(CLASSES))


def _classify(piece: bytes) -> int:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return _PART
    if "\n" in text or "\r" in text:
        return _BREAK
    if not text.strip():
        return _SPACE
    if any(character.isalpha() for character in text):
        return _START if text[0].isspace() else _ON
    return _NUMBER if any(character.isdigit() for character in text) else _PUNCTUATION


def token_classes(vocabulary: Vocabulary, tokens: np.ndarray) -> np.ndarray:
    """The class of each of `tokens`, an index of `CLASSES`: int8 in the shape of `tokens`.

    A token that begins with a space and holds a letter starts a word, another with a letter goes on with one. Raises
    IndexError for tokens beyond the vocabulary.
    """
    unique, inverse = np.unique(tokens, return_inverse=True)
    kinds = [_CONTROL if vocabulary.is_control(t) else _classify(vocabulary.piece(t)) for t in unique.tolist()]
    return np.array(kinds, np.int8)[inverse].reshape(tokens.shape)
