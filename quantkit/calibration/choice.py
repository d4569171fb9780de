"""Choosing the types: which may be had, and those that cost least within so many bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from quantkit.blocks.types import GGMLType as T
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import TensorInfo
from quantkit.pipeline.mixtures import NEEDS_IMATRIX

# Worth trying, the smallest first: for rows of whole super-blocks, and for others.
_SUPER = (
    T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.Q2_K, T.IQ3_XXS, T.Q3_K, T.IQ3_S, T.IQ4_XS, T.Q4_K, T.Q5_K,
    T.Q6_K, T.Q8_0,
)  # fmt: skip
_SMALL = (T.IQ4_NL, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)
# Types below this are noise for most models: they must be asked for.
SMALLEST = T.IQ2_XXS

# Types that an engine's GGUF loader does not have.
_RECENT = frozenset({T.Q1_0, T.Q2_0, T.TQ1_0, T.TQ2_0, T.MXFP4, T.NVFP4})
ENGINES: dict[str, frozenset[T]] = {
    "llama.cpp": frozenset(),
    "ollama": frozenset({T.Q1_0, T.Q2_0, T.NVFP4}),
    "vllm": _RECENT,
}


def candidates(
    info: TensorInfo,
    *,
    calibrated: bool,
    minimum: T = SMALLEST,
    maximum: T | None = None,
    excluded: Iterable[T] = (),
) -> list[T]:
    """The types that tensor `info` may become, the smallest first; its own, where that is not quantized, the last.

    `calibrated` says whether it has moments: some types are noise without. `minimum` and `maximum` bound the bits of a
    weight. Where blocks do not divide the rows only the types with small blocks are left.
    """
    most = 64.0 if maximum is None else maximum.bits_per_weight
    barred = frozenset(excluded) | (frozenset() if calibrated else NEEDS_IMATRIX)
    known = _SUPER if info.n_per_row % 256 == 0 else _SMALL
    found = [
        kind
        for kind in known
        if info.n_per_row % kind.block_size == 0
        and minimum.bits_per_weight <= kind.bits_per_weight <= most
        and kind not in barred
    ]
    if not info.type.is_quantized and info.type.bits_per_weight <= most:
        found.append(info.type)
    return found


def engine_lacks(name: str) -> frozenset[T]:
    """The types that the engine called `name` cannot load. Raises QuantkitError that lists the engines."""
    try:
        return ENGINES[name.lower()]
    except KeyError:
        raise QuantkitError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}") from None


def tied(names: Iterable[str], patterns: Sequence[str]) -> list[list[str]]:
    """`names` in groups that are to have one type: those for which a pattern captures the same text.

    A pattern without groups in parentheses ties all names that it is found in. Raises QuantkitError for a pattern that
    is no regular expression, or is found in no name.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise QuantkitError(f"{pattern!r} is not a regular expression: {error}") from None
    groups: dict[object, list[str]] = {}
    found: set[int] = set()
    for name in names:
        key: object = name
        for at, each in enumerate(compiled):
            match = each.search(name)
            if match is not None:
                found.add(at)
                key = at, match.groups()
                break
        groups.setdefault(key, []).append(name)
    for at, pattern in enumerate(patterns):
        if at not in found:
            raise QuantkitError(f"no tensor whose type is chosen has {pattern!r} in its name")
    return list(groups.values())


class Item:
    """What is chosen for at once: a tensor, or some that are tied: bytes and cost by type."""

    def __init__(self, options: Mapping[T, tuple[int, float]]) -> None:
        ordered = sorted(options.items(), key=lambda option: option[1])
        self.kinds = [kind for kind, _ in ordered]
        self.nbytes = np.array([nbytes for _, (nbytes, _) in ordered], np.int64)
        self.costs = np.array([cost for _, (_, cost) in ordered], np.float64)


def choose(items: Sequence[Item], budget: int) -> list[T]:
    """The type of each of `items` for the least sum of costs within `budget` bytes.

    A price of bytes is found that makes the cheapest choices just fit (Lagrange); single changes and exchanges of two
    then use the bytes that are left. Raises QuantkitError when even the smallest types do not fit.
    """
    if not items:
        return []
    smallest = sum(int(item.nbytes.min()) for item in items)
    if smallest > budget:
        raise QuantkitError(f"the smallest types take {smallest - budget} bytes more")
    picks = _at_price(items, 0.0)
    if _nbytes(items, picks) > budget:
        low, high = 1e-30, 1e6
        for _ in range(200):
            price = (low * high) ** 0.5
            tried = _at_price(items, price)
            if _nbytes(items, tried) > budget:
                low = price
            else:
                high, picks = price, tried
    _refine(items, picks, budget)
    return [item.kinds[pick] for item, pick in zip(items, picks, strict=True)]


def _at_price(items: Sequence[Item], price: float) -> list[int]:
    # The smallest of those that cost the same come first.
    return [int(np.argmin(item.costs + price * item.nbytes)) for item in items]


def _nbytes(items: Sequence[Item], picks: Sequence[int]) -> int:
    return sum(int(item.nbytes[pick]) for item, pick in zip(items, picks, strict=True))


def _refine(items: Sequence[Item], picks: list[int], budget: int) -> None:
    """Change one or two of `picks` at a time while that lowers the cost within `budget` bytes."""
    for _ in range(50 * len(items)):
        left = budget - _nbytes(items, picks)
        item = np.concatenate([np.full(len(each.kinds), i) for i, each in enumerate(items)])
        kind = np.concatenate([np.arange(len(each.kinds)) for each in items])
        more = np.concatenate([e.nbytes - e.nbytes[p] for e, p in zip(items, picks, strict=True)])
        cost = np.concatenate([e.costs - e.costs[p] for e, p in zip(items, picks, strict=True)])
        best, moves = -1e-15, []
        fits = np.flatnonzero((more <= left) & (cost < best))
        if fits.size:
            at = fits[np.argmin(cost[fits])]
            best, moves = float(cost[at]), [at]
        # What takes bytes, with the cheapest change of another item that frees enough.
        frees = np.flatnonzero(more < 0)
        frees = frees[np.argsort(more[frees], kind="stable")]
        for at in np.flatnonzero((more > left) & (cost < best)):
            enough = frees[: np.searchsorted(more[frees], left - more[at], side="right")]
            enough = enough[item[enough] != item[at]]
            if enough.size:
                other = enough[np.argmin(cost[enough])]
                if cost[at] + cost[other] < best:
                    best, moves = float(cost[at] + cost[other]), [at, other]
        if not moves:
            return
        for at in moves:
            picks[item[at]] = int(kind[at])
