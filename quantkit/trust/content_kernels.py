"""Kernels that look through the bytes of tensors for what no encoder writes. All return the first place, or -1."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantkit.compile.kernel import kernel

CHUNK = 4096


@kernel
def all_ones(words: Any, stride: Any, offset: Any, mask: Any) -> Any:
    """The first block of `stride` words whose word at `offset` has all bits of `mask` set: NaN or infinity."""
    for block in range(words.size // stride):
        if words[block * stride + offset] & mask == mask:
            return block
    return -1


@kernel
def all_ones_dense(words: Any, mask: Any, one: Any) -> Any:
    """Where floats packed into 64-bit words begin to hold NaN or infinity: the first of a chunk of words that has one.

    `mask` has the exponents' bits of all floats in a word, `one` the lowest bit of each exponent. Their sum reaches the
    sign's bit, which the mask has cleared, where an exponent is all ones: three operations a word, and no branch.
    """
    signs = (mask + one) & ~mask
    for start in range(0, words.size, CHUNK):
        found = np.uint64(0)
        for i in range(start, min(start + CHUNK, words.size)):
            found |= (words[i] & mask) + one
        if found & signs:
            return start
    return -1


@kernel
def byte_is(data: Any, stride: Any, value: Any) -> Any:
    """The first block of `stride` bytes that begins with `value`."""
    for block in range(data.size // stride):
        if data[block * stride] == value:
            return block
    return -1


@kernel
def iq1_m_scale(words: Any, stride: Any, offset: Any, mask: Any) -> Any:
    """The first block of IQ1_M whose float16 scale, spread over the top bits of four words, has all bits of `mask`."""
    for block in range(words.size // stride):
        at = block * stride + offset
        scale = (
            (words[at] >> 12)
            | ((words[at + 1] >> 8) & 0x00F0)
            | ((words[at + 2] >> 4) & 0x0F00)
            | (words[at + 3] & 0xF000)
        )
        if scale & mask == mask:
            return block
    return -1


@kernel
def not_in(data: Any, stride: Any, start: Any, stop: Any, legal: Any) -> Any:
    """The first block of `stride` bytes with a byte from `start` to `stop` that `legal` (bool [256]) does not know."""
    for block in range(data.size // stride):
        good = True
        for i in range(block * stride + start, block * stride + stop):
            good &= legal[data[i]]
        if not good:
            return block
    return -1


def trits(count: int) -> Any:
    """Which bytes stand for `count` ternary digits, bool [256], as TQ1_0 packs them: v of 3^5 as ceil(256 v / 3^5)."""
    legal = np.zeros(256, np.bool_)
    step = 3 ** (5 - count)
    legal[[(256 * v + 242) // 243 for v in range(0, 243, step)]] = True
    return legal


def pairs_below_3() -> Any:
    """Which bytes hold four 2-bit codes from 0 to 2, bool [256]."""
    values = np.arange(256)
    return (values & (values >> 1) & 0x55) == 0
