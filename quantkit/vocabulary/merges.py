"""The merging of symbols into tokens: one engine for byte-pair encoding and for SentencePiece.

Both start from small symbols and, as long as two neighbours have an entry in a table, merge the pair with the best
rank, the leftmost first where ranks are equal. Byte-pair encoding ranks pairs by their place in the list of merges;
SentencePiece by the score of the token that a pair makes. (Source of both algorithms: llama.cpp, whose ids this
engine reproduces; the priority queue makes a word of n symbols cost n log n.)
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from quantkit.compile.kernel import allocating_kernel, kernel, piece

Array = np.ndarray[Any, Any]


class MergeTable:
    """Pairs of symbols, the rank at which they merge (lower first), and the symbol that they become.

    All four arrays have shape (pairs,). Symbols are non-negative int32; of equal pairs the first counts.
    """

    def __init__(self, left: Array, right: Array, rank: Array, merged: Array) -> None:
        """Build the table from the pairs."""
        size = 16
        while size < 2 * len(left):
            size *= 2
        # A secret seed: otherwise a vocabulary could be made whose pairs all collide.
        self._seed = np.uint64(secrets.randbits(64))
        self._keys = np.full(size, -1, dtype=np.int64)
        self._entries = np.zeros((size, 2), dtype=np.int32)
        pairs = (left.astype(np.int64) << 32) | right.astype(np.int64)
        _fill(self._keys, self._entries, self._seed, pairs, rank.astype(np.int32), merged.astype(np.int32))

    def merge(self, symbols: Array, ends: Array, whole: Array) -> Array:
        """Merge the symbols of each word as far as the table goes.

        `symbols` is int32 of shape (n,); `ends` int64 of shape (words,), ascending, the last equal to n; `whole`
        int32 of shape (words,) holds -1, or the symbol that stands for the whole word without any merging.
        Returns the remaining symbols of all words, int32, in order.
        """
        out = np.empty(len(symbols), dtype=np.int32)
        longest = int(np.diff(ends, prepend=0).max(initial=0))
        count = _merge(self._keys, self._entries, self._seed, symbols, ends, whole, out, longest)
        return out[:count]


@piece
def slot(keys: Array, seed: np.uint64, key: Any) -> Any:
    """Where `key` is in the open hash table, or the empty place where it would be (the mixing is MurmurHash3's)."""
    mask = np.uint64(keys.size - 1)
    mixed = np.uint64(key) ^ seed
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    at = (mixed ^ (mixed >> np.uint64(33)) ^ (seed >> np.uint64(7))) & mask
    while keys[at] != -1 and keys[at] != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@kernel
def _fill(keys: Array, entries: Array, seed: np.uint64, pairs: Array, rank: Array, merged: Array) -> None:
    for i in range(pairs.size):
        at = slot(keys, seed, pairs[i])
        if keys[at] == -1:
            keys[at] = pairs[i]
            entries[at, 0] = rank[i]
            entries[at, 1] = merged[i]


@piece
def _push(heap: Array, size: int, item: np.int64) -> int:
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if heap[parent] <= item:
            break
        heap[child] = heap[parent]
        child = parent
    heap[child] = item
    return size + 1


@piece
def _pop(heap: Array, size: int) -> int:
    """Remove heap[0]; the caller has read it."""
    size -= 1
    item = heap[size]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[parent] = heap[child]
        parent = child
    heap[parent] = item
    return size


@piece
def _pair(symbols: Array, left: int, right: int) -> Any:
    return (np.int64(symbols[left]) << 32) | np.int64(symbols[right])


@allocating_kernel
def _merge(
    keys: Array,
    entries: Array,
    seed: np.uint64,
    symbols: Array,
    ends: Array,
    whole: Array,
    out: Array,
    longest: int,
) -> int:
    word = np.empty(longest, dtype=np.int32)
    following = np.empty(longest, dtype=np.int64)
    previous = np.empty(longest, dtype=np.int64)
    # Each of the n - 1 merges queues at most two pairs, beside the n - 1 of the start.
    heap = np.empty(3 * longest + 1, dtype=np.int64)
    count = 0
    start = 0
    for w in range(ends.size):
        n = ends[w] - start
        if whole[w] >= 0:
            out[count] = whole[w]
            count += 1
            start = ends[w]
            continue
        size = np.int64(0)  # not a literal, for which numba would compile the heap once more
        for i in range(n):
            word[i] = symbols[start + i]
            following[i] = i + 1 if i + 1 < n else -1
            previous[i] = i - 1
            if i > 0:
                at = slot(keys, seed, _pair(word, i - 1, i))
                if keys[at] != -1:
                    size = _push(heap, size, (np.int64(entries[at, 0]) << 32) | np.int64(i - 1))
        while size > 0:
            item = heap[0]
            size = _pop(heap, size)
            left = item & 0xFFFFFFFF
            right = following[left]
            if word[left] < 0 or right < 0:
                continue
            at = slot(keys, seed, _pair(word, left, right))
            # A queued pair is stale when one of its symbols has been merged; the new symbol has its own entry.
            if keys[at] == -1 or entries[at, 0] != item >> 32:
                continue
            word[left] = entries[at, 1]
            word[right] = -1
            after = following[right]
            following[left] = after
            if after >= 0:
                previous[after] = left
                at = slot(keys, seed, _pair(word, left, after))
                if keys[at] != -1:
                    size = _push(heap, size, (np.int64(entries[at, 0]) << 32) | np.int64(left))
            before = previous[left]
            if before >= 0:
                at = slot(keys, seed, _pair(word, before, left))
                if keys[at] != -1:
                    size = _push(heap, size, (np.int64(entries[at, 0]) << 32) | np.int64(before))
        for i in range(n):
            if word[i] >= 0:
                out[count] = word[i]
                count += 1
        start = ends[w]
    return count
