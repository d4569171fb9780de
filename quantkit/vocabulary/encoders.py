"""Text without special tokens to token ids: byte-pair encoding and SentencePiece, as llama.cpp does them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.vocabulary import pretokenizers
from quantkit.vocabulary.merges import MergeTable
from quantkit.vocabulary.unicode_classes import N_CODE_POINTS, code_points

Array = np.ndarray[Any, Any]

# SentencePiece's stand-in for a space.
META_SPACE = "\u2581"
# A token is cut in two at every place, so its length must be bounded; real ones stay below a few hundred.
MAX_TOKEN_LENGTH = 1024
# Ways to cut the tokens of a vocabulary into two that it has; real ones have a few for each token.
_MAX_CUTS_PER_TOKEN = 32
_MIN_CUTS = 1 << 16


@lru_cache(maxsize=1)
def byte_alphabet() -> str:
    """GPT-2's alphabet: the character that stands for each byte, 256 of them."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


class Encoder(Protocol):
    """Encodes a piece of text as token ids."""

    def encode(self, text: str) -> Array:
        """The ids of `text`, int32 of shape (n,). No special token is looked for."""
        ...


class _Symbols:
    """The symbols that merging works on: tokens under their own ids, and other texts under ids beyond them."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self.extra: dict[str, int] = {}

    def of(self, text: str) -> int:
        """The symbol of `text`, a new one if necessary."""
        symbol = self.ids.get(text)
        if symbol is None:
            symbol = self.extra.setdefault(text, len(self.ids) + len(self.extra))
        return symbol

    def of_characters(self) -> Array:
        """The symbol of each code point that has one, and -1 for the others: int32 of shape (0x110000,)."""
        table = np.full(N_CODE_POINTS, -1, dtype=np.int32)
        for texts in (self.ids, self.extra):
            for text, symbol in texts.items():
                if len(text) == 1:
                    table[ord(text)] = symbol
        return table


def _expand(symbols: Array, n_tokens: int, expansions: dict[int, Sequence[int]]) -> Array:
    """Replace every symbol that is not a token by the tokens that it falls back to."""
    strange = np.flatnonzero(symbols >= n_tokens)
    if not strange.size:
        return symbols
    # All expansions behind each other, and where each begins: then one gather makes the text's.
    different, which = np.unique(symbols[strange], return_inverse=True)
    lengths = np.array([len(expansions[symbol]) for symbol in different.tolist()], dtype=np.int64)
    together = np.fromiter((t for symbol in different.tolist() for t in expansions[symbol]), np.int32, lengths.sum())
    begins = np.cumsum(lengths) - lengths
    counts = np.ones(len(symbols), dtype=np.int64)
    counts[strange] = lengths[which]
    result = np.repeat(symbols, counts)
    ends = np.cumsum(counts)[strange]
    places = np.repeat(ends - counts[strange], counts[strange])
    inside = np.arange(len(places)) - np.repeat(np.cumsum(counts[strange]) - counts[strange], counts[strange])
    result[places + inside] = together[np.repeat(begins[which], counts[strange]) + inside]
    return result


class _CharacterSymbols:
    """Maps code points to symbols, with new symbols for characters that no token begins with."""

    def __init__(self, symbols: _Symbols) -> None:
        self._table = symbols.of_characters()
        self._next = len(symbols.ids) + len(symbols.extra)

    def __call__(self, codes: Array) -> tuple[Array, dict[int, str]]:
        """The symbols of `codes`, int32 of the same shape, and the characters that got a new symbol."""
        result = self._table[codes]
        missing = np.unique(codes[result < 0])
        if not missing.size:
            return result, {}
        new = np.searchsorted(missing, codes).astype(np.int32) + self._next
        return np.where(result < 0, new, result), {self._next + i: chr(code) for i, code in enumerate(missing.tolist())}


class BytePairEncoder:
    """Byte-pair encoding with one of llama.cpp's pre-tokenizers.

    `ids` maps each token's text to its id, all ids from 0 on; `merges` is `tokenizer.ggml.merges`.
    """

    def __init__(self, ids: dict[str, int], merges: Sequence[str], pre: str) -> None:
        """Raises QuantkitError when `pre` names no pre-tokenizer."""
        self._ids = ids
        self._habits = pretokenizers.lookup(pre)
        self._splitter = pretokenizers.splitter(pre)
        symbols = _Symbols(ids)
        self._table = _read_merges(symbols, merges)
        if self._habits.bytes_as_characters:
            self._of_byte = np.array([symbols.of(character) for character in byte_alphabet()], dtype=np.int32)
            self._to_alphabet = dict(enumerate(byte_alphabet()))
        else:
            self._of_characters = _CharacterSymbols(symbols)
        self._expansions: dict[int, Sequence[int]] = {
            symbol: self._bytes_of(text) for text, symbol in symbols.extra.items()
        }

    def encode(self, text: str) -> Array:
        """The ids of `text`, int32 of shape (n,). No special token is looked for."""
        if self._habits.escape_spaces:
            text = text.replace(" ", META_SPACE)
        codes = code_points(text)
        ends = np.array(self._splitter.ends(text, codes), dtype=np.int64)
        expansions = self._expansions
        if self._habits.bytes_as_characters:
            data = text.encode()
            width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
            ends = np.cumsum(width, dtype=np.int64)[ends - 1]
            symbols = self._of_byte[np.frombuffer(data, dtype=np.uint8)]
            shown = data.decode("latin-1").translate(self._to_alphabet) if self._habits.ignore_merges else ""
        else:
            symbols, new = self._of_characters(codes)
            if new:
                expansions = expansions | {symbol: self._bytes_of(character) for symbol, character in new.items()}
            shown = text
        merged = self._table.merge(symbols, ends, self._whole_words(shown, ends))
        return _expand(merged, len(self._ids), expansions)

    def _whole_words(self, shown: str, ends: Array) -> Array:
        whole = np.full(len(ends), -1, dtype=np.int32)
        if self._habits.ignore_merges:
            get, bounds = self._ids.get, ends.tolist()
            starts = [0, *bounds[:-1]]
            whole[:] = [get(shown[start:end], -1) for start, end in zip(starts, bounds, strict=True)]
        elif self._habits.newlines_whole:
            start = 0
            for i, end in enumerate(ends.tolist()):
                if shown[start] == "\n":
                    whole[i] = self._ids.get(shown[start:end], -1)
                start = end
        return whole

    def _bytes_of(self, text: str) -> list[int]:
        """The tokens of the bytes of a text that is no token itself; bytes without a token are dropped."""
        data = text.encode("utf-8", "surrogateescape")
        if self._habits.bytes_as_characters:
            names = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in data]
        else:
            names = [f"<0x{byte:02X}>" for byte in data]
        return [self._ids[name] for name in names if name in self._ids]


def _read_merges(symbols: _Symbols, merges: Sequence[str]) -> MergeTable:
    rows = np.empty((len(merges), 3), dtype=np.int32)
    ranks = np.arange(len(merges), dtype=np.int32)
    keep = np.ones(len(merges), dtype=bool)
    of = symbols.of
    for i, merge in enumerate(merges):
        # The first symbol may itself be a space.
        middle = merge.find(" ", 1)
        if middle < 0:
            keep[i] = False
            continue
        left, right = merge[:middle], merge[middle + 1 :]
        rows[i] = of(left), of(right), of(left + right)
    rows, ranks = rows[keep], ranks[keep]
    return MergeTable(rows[:, 0], rows[:, 1], ranks, rows[:, 2])


class SentencePieceEncoder:
    """SentencePiece's merging by score, with the bytes of a character where no token has it.

    `ids` maps each token's text to its id, all ids from 0 on; `scores` is float32 of shape (tokens,).
    """

    def __init__(self, ids: dict[str, int], scores: Array) -> None:
        """Raises QuantkitError when a token is longer than MAX_TOKEN_LENGTH."""
        self._ids = ids
        symbols = _Symbols(ids)
        _, ranks = np.unique(-scores, return_inverse=True)
        rows = array("i")
        most = 3 * max(_MIN_CUTS, _MAX_CUTS_PER_TOKEN * len(ids))
        for text, token in ids.items():
            length = len(text)
            if length > MAX_TOKEN_LENGTH:
                raise QuantkitError(f"token {token} has {length} characters, more than {MAX_TOKEN_LENGTH}")
            for middle in range(1, length):
                left, right = text[:middle], text[middle:]
                # Two symbols meet only if each is a token or a character.
                if (middle == 1 or left in ids) and (middle == length - 1 or right in ids):
                    rows.extend((symbols.of(left), symbols.of(right), token))
            if len(rows) > most:
                raise QuantkitError(f"the tokens up to {text[:40]!r} can be merged in more ways than any vocabulary's")
        pairs = np.array(rows, dtype=np.int32).reshape(-1, 3)
        self._table = MergeTable(pairs[:, 0], pairs[:, 1], ranks[pairs[:, 2]], pairs[:, 2])
        self._of_characters = _CharacterSymbols(symbols)
        self._extra = {symbol: text for text, symbol in symbols.extra.items()}

    def encode(self, text: str) -> Array:
        """The ids of `text`, int32 of shape (n,). No special token is looked for, no space put in front.

        Raises QuantkitError when a character is no token and the vocabulary lacks its bytes.
        """
        symbols, new = self._of_characters(code_points(text.replace(" ", META_SPACE)))
        ends = np.array([len(symbols)] if len(symbols) else [], dtype=np.int64)
        merged = self._table.merge(symbols, ends, np.full(len(ends), -1, dtype=np.int32))
        texts = self._extra | new if new else self._extra
        strange = np.unique(merged[merged >= len(self._ids)]).tolist()
        return _expand(merged, len(self._ids), {symbol: self._bytes_of(texts[symbol]) for symbol in strange})

    def _bytes_of(self, character: str) -> list[int]:
        result = []
        for byte in character.encode("utf-8", "surrogateescape"):
            token = self._ids.get(f"<0x{byte:02X}>", self._ids.get(bytes([byte]).decode("utf-8", "surrogateescape")))
            if token is None:
                raise QuantkitError(f"the vocabulary has no token for the character {character!r}, nor for its bytes")
            result.append(token)
        return result
