"""WordPiece as BERT and llama.cpp do it: words from a normalised text, cut greedily into the longest tokens.

GGUF writes the tokens that begin a word with the stand-in for a space in front, and those that go on without "##".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from quantkit.vocabulary.encoders import META_SPACE
from quantkit.vocabulary.unicode_classes import Category, base_characters, categories, code_points, lower_case

Array = np.ndarray[Any, Any]

_REPLACEMENT = 0xFFFD
_LAST_ASCII_SYMBOL = 0x7E
# Characters that are words of their own, as BERT's authors listed them; the sixth range begins where the tokenizers
# library lets it begin.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_WORDS_KEPT = 1 << 16


class WordPieceEncoder:
    """Encodes words by the longest tokens that they begin with; a word that cannot be cut so is unknown.

    `ids` maps each token's text to its id, `unknown` is the id for words without tokens, `lowercase` and
    `strip_accents` say what becomes of a text first.
    """

    def __init__(self, ids: dict[str, int], unknown: int, lowercase: bool, strip_accents: bool) -> None:
        self._ids, self._unknown = ids, unknown
        self._lowercase, self._strip_accents = lowercase, strip_accents
        self._longest = max(map(len, ids), default=0)
        self._word = lru_cache(_WORDS_KEPT)(self._cut)

    def encode(self, text: str) -> Array:
        """The ids of `text`, int32 of shape (n,). No special token is looked for."""
        found = [token for word in self.words(text) for token in self._word(word)]
        return np.array(found, dtype=np.int32)

    def words(self, text: str) -> list[str]:
        """The words of `text`, normalised; every punctuation mark and every ideograph is one."""
        codes = code_points(text)
        if self._strip_accents:
            codes = base_characters(codes)
        kinds = categories(codes)
        dropped = (codes == 0) | (codes == _REPLACEMENT) | (kinds == Category.CONTROL)
        if self._strip_accents:
            dropped |= kinds == Category.MARK
        space = kinds == Category.SPACE
        alone = (kinds == Category.PUNCTUATION) | ((kinds == Category.SYMBOL) & (codes <= _LAST_ASCII_SYMBOL))
        for first, last in _IDEOGRAPHS:
            alone |= (codes >= first) & (codes <= last)
        shown = np.where(space, np.uint32(ord(" ")), lower_case(codes) if self._lowercase else codes)
        # Spaces go around what stands alone.
        kept = space | ~dropped
        shown, alone = shown[kept], (alone & ~space)[kept]
        widths = np.where(alone, 3, 1)
        spread = np.full(int(widths.sum()), ord(" "), dtype="<u4")
        spread[np.cumsum(widths) - np.where(alone, 2, 1)] = shown
        return spread.tobytes().decode("utf-32-le").split(" ")

    def _cut(self, word: str) -> tuple[int, ...]:
        if not word:
            return ()
        whole, at, found = META_SPACE + word, 0, []
        while at < len(whole):
            for end in range(min(len(whole), at + self._longest), at, -1):
                token = self._ids.get(whole[at:end])
                if token is not None:
                    found.append(token)
                    at = end
                    break
            else:
                return (self._unknown,)
        return tuple(found)
