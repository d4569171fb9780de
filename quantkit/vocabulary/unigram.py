"""Unigram tokens as SentencePiece and llama.cpp find them: the sequence of tokens whose scores have the largest sum.

A text is normalised first, by a table of replacements that the SentencePiece model carries, and its spaces are
replaced, put in front and merged as the model says. (Source of the table's format: SentencePiece's normalizer, a
double array in 32-bit units, before texts that each end with a zero byte.)
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from quantkit.compile.kernel import allocating_kernel, kernel, piece
from quantkit.errors import QuantkitError
from quantkit.vocabulary.encoders import META_SPACE
from quantkit.vocabulary.merges import slot

Array = np.ndarray[Any, Any]

_UNKNOWN_PENALTY = 10.0
# A text may grow so much when it is normalised; real tables replace a character by eighteen at most.
_MOST_GROWTH = 64
_OUT_OF_BOUNDS = -1


class UnigramEncoder:
    """Encodes text by the scores of tokens.

    `pieces` are the tokens that may be found (id, text as bytes, score), `user_defined` the texts that normalisation
    leaves alone, `unknown` is the id for characters without tokens and `lowest` the lowest score of a normal token.
    `charsmap` is the table of replacements, or empty. `space_prefix` puts a space in front, and `merge_spaces` makes
    one of several and drops those around a text.
    """

    def __init__(
        self,
        pieces: Iterable[tuple[int, bytes, float]],
        user_defined: Iterable[bytes],
        unknown: int,
        lowest: float,
        charsmap: bytes,
        space_prefix: bool,
        merge_spaces: bool,
    ) -> None:
        """Raises QuantkitError for a table of replacements that is none."""
        found = list(pieces)
        self._tokens = _Trie([text for _, text, _ in found])
        self._ids = np.array([token for token, _, _ in found] or [0], dtype=np.int32)
        self._scores = np.array([score for _, _, score in found] or [0], dtype=np.float64)
        self._protected = _Trie(list(user_defined))
        self._unknown, self._unknown_score = unknown, float(np.float32(lowest) - np.float32(_UNKNOWN_PENALTY))
        self._space_prefix, self._merge_spaces = space_prefix, merge_spaces
        self._units, self._replacements = _read_charsmap(charsmap)
        self._space = np.frombuffer(META_SPACE.encode(), dtype=np.uint8)

    def encode(self, text: str) -> Array:
        """The ids of `text`, int32 of shape (n,). No special token is looked for."""
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        normalised = self.normalise(data)
        if not normalised.size:
            return np.empty(0, dtype=np.int32)
        trie = self._tokens
        out = np.empty(len(normalised), dtype=np.int32)
        count = _best(
            trie.keys, trie.children, trie.values, trie.seed, self._ids, self._scores, normalised,
            np.int32(self._unknown), self._unknown_score, out,
        )  # fmt: skip
        found: Array = out[:count][::-1].copy()
        return found

    def normalise(self, data: Array) -> Array:
        """UTF-8 `data` as the tokens are looked for in it, uint8."""
        trie = self._protected
        size, out = 0, np.empty(0, dtype=np.uint8)
        for _ in range(2):  # first to know the size
            size = _normalise(
                trie.keys, trie.children, trie.seed, self._units, self._replacements, self._space, data,
                self._space_prefix, self._merge_spaces, out,
            )  # fmt: skip
            if size == _OUT_OF_BOUNDS:
                raise QuantkitError("the vocabulary's precompiled_charsmap leads out of itself")
            if size > _MOST_GROWTH * (len(data) + 1):
                raise QuantkitError("the vocabulary's precompiled_charsmap makes texts longer than any does")
            if not len(out):
                out = np.empty(max(1, size), dtype=np.uint8)
        return out[:size]


class _Trie:
    """Texts by their bytes: a hash table from a node and a byte to the next node."""

    def __init__(self, texts: list[bytes]) -> None:
        lengths = np.array([len(text) for text in texts] or [0], dtype=np.int64)
        ends = np.cumsum(lengths)
        data = np.frombuffer(b"".join(texts), dtype=np.uint8)
        size = 16
        while size < 2 * len(data):
            size *= 2
        # A secret seed: otherwise a vocabulary could be made whose entries all collide.
        self.seed = np.uint64(secrets.randbits(64))
        self.keys = np.full(size, -1, dtype=np.int64)
        self.children = np.zeros(size, dtype=np.int32)
        self.values = np.full(len(data) + 1, -1, dtype=np.int32)
        if texts:
            _plant(self.keys, self.children, self.values, self.seed, data, ends)


def _read_charsmap(charsmap: bytes) -> tuple[Array, Array]:
    """The units of the double array, uint32, and the texts, uint8."""
    if not charsmap:
        return np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.uint8)
    if len(charsmap) < 4 or (size := struct.unpack_from("<I", charsmap)[0]) + 4 >= len(charsmap):
        raise QuantkitError("the vocabulary's precompiled_charsmap is cut off")
    units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).copy()
    return units, np.frombuffer(charsmap, dtype=np.uint8, offset=4 + size).copy()


@kernel
def _plant(keys: Array, children: Array, values: Array, seed: np.uint64, data: Array, ends: Array) -> None:
    """Enter the texts in `data` that end at `ends`; the value of a node is the number of the text that ends there."""
    count, start = 1, 0
    for text in range(ends.size):
        node = 0
        for i in range(start, ends[text]):
            key = (np.int64(node) << 8) | np.int64(data[i])
            at = slot(keys, seed, key)
            if keys[at] == -1:
                keys[at] = key
                children[at] = count
                count += 1
            node = children[at]
        values[node] = text
        start = ends[text]


@piece
def _child(keys: Array, children: Array, seed: np.uint64, node: Any, byte: Any) -> Any:
    """The node after `node` by `byte`, or -1."""
    at = slot(keys, seed, (np.int64(node) << 8) | np.int64(byte))
    return children[at] if keys[at] != -1 else np.int32(-1)


@piece
def _width(byte: Any) -> Any:
    """The bytes of the character that `byte` begins."""
    return 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)


@allocating_kernel
def _best(
    keys: Array,
    children: Array,
    values: Array,
    seed: np.uint64,
    ids: Array,
    scores: Array,
    text: Array,
    unknown: Any,
    unknown_score: Any,
    out: Array,
) -> Any:
    """Write the ids of the best tokens into `out`, the last first; returns how many (Viterbi's algorithm)."""
    n = text.size
    sums = np.full(n + 1, -np.inf)
    token = np.empty(n + 1, np.int32)
    origin = np.zeros(n + 1, np.int64)
    sums[0] = 0.0
    token[0] = unknown
    start = 0
    while start < n:
        width = min(_width(text[start]), n - start)
        whole = False
        node, end = np.int32(0), start
        while end < n:
            node = _child(keys, children, seed, node, text[end])
            if node < 0:
                break
            end += 1
            if values[node] >= 0:
                whole |= end - start == width
                found = sums[start] + scores[values[node]]
                if found > sums[end]:
                    sums[end], token[end], origin[end] = found, ids[values[node]], start
        if not whole:
            found = sums[start] + unknown_score
            if found > sums[start + width]:
                sums[start + width], token[start + width], origin[start + width] = found, unknown, start
        start += width
    count, end, strange = 0, n, False
    while end > 0:
        if not (strange and token[end] == unknown):
            out[count] = token[end]
            count += 1
        strange = token[end] == unknown
        end = origin[end]
    return count


@kernel
def _normalise(
    keys: Array,
    children: Array,
    seed: np.uint64,
    units: Array,
    replacements: Array,
    space: Array,
    text: Array,
    space_prefix: Any,
    merge_spaces: Any,
    out: Array,
) -> Any:
    """Write the normalised text into `out` as far as it goes; returns its size, or -1 for a damaged table."""
    size, start, in_word, begun = 0, 0, False, False
    while start < text.size:
        # What begins like a user-defined token stays as it is, as far as it does.
        node, kept = np.int32(0), start
        while kept < text.size:
            node = _child(keys, children, seed, node, text[kept])
            if node < 0:
                break
            kept += 1
        taken, source, first, length = kept - start, text, start, kept - start
        if not taken:
            place = np.int64(-1)
            if units.size:
                at = _base(units[0])
                for i in range(start, text.size):
                    byte = np.uint32(text[i])
                    if byte == 0:
                        break
                    at ^= byte
                    if at >= units.size:
                        return _OUT_OF_BOUNDS
                    unit = units[at]
                    if unit & np.uint32(0x800000FF) != byte:
                        break
                    at ^= _base(unit)
                    if unit >> np.uint32(8) & np.uint32(1):
                        if at >= units.size:
                            return _OUT_OF_BOUNDS
                        taken, place = i - start + 1, np.int64(units[at] & np.uint32(0x7FFFFFFF))
            if place >= 0:
                source, first, length = replacements, place, 0
                while place + length < replacements.size and replacements[place + length]:
                    length += 1
                if place + length >= replacements.size:
                    return _OUT_OF_BOUNDS
            else:
                taken = min(_width(text[start]), text.size - start)
                length = taken
        for i in range(first, first + length):
            byte_ = source[i]
            if byte_ != 0x20:
                if not in_word:
                    in_word = True
                    if (space_prefix and not begun) or merge_spaces:
                        size = _append(out, size, space)
                        begun = True
                if size < out.size:
                    out[size] = byte_
                size += 1
            else:
                in_word = False
                if not merge_spaces:
                    size = _append(out, size, space)
        start += taken
    return size


@piece
def _base(unit: Any) -> Any:
    """The offset to a unit's children."""
    return (unit >> np.uint32(10)) << ((unit & np.uint32(0x200)) >> np.uint32(6))


@piece
def _append(out: Array, size: Any, data: Array) -> Any:
    for i in range(data.size):
        if size + i < out.size:
            out[size + i] = data[i]
    return size + data.size
