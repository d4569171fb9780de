"""Attention between its products: heads are taken apart and rotated, and see the keys and values of others.

The kernels run over rows as those of norms do: see `norm_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features

from quantkit.blocks import lane_memory
from quantkit.blocks.lane_memory import add_products, load, part, store, store_all
from quantkit.blocks.lanes import LANES, largest, maximum, minimum, repeat, select, splat
from quantkit.compile.kernel import kernel, piece
from quantkit.evaluate.row_pieces import capped, exp, lanes_total

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Rows that `attention` takes through its products together. Six fill the sixteen registers of AVX2 with sums and
# operands; with AVX-512 it takes eight sums to keep the adders busy.
_TILE_ROWS = 8 if get_host_cpu_features().get("avx512f") else 6
# Scratch fits either, since cached machine code may have been made for the other.
_MOST_ROWS = 8
_NOTHING = np.float32(-np.inf)


@kernel
def split_heads(
    x: np.ndarray,
    first: int,
    cos: np.ndarray,
    sin: np.ndarray,
    start: int,
    neighbours: bool,
    scale: np.float32,
    out: np.ndarray,
) -> None:
    """Take heads out of the rows of a product, rotate them by their position and multiply them by `scale`.

    `x` is [rows, any]: the heads stand side by side from column `first` on. `out` is [groups, positions, heads of a
    group, head size]; row i goes to position `start` + i. `cos` and `sin` are [positions, pairs]; no pairs, no
    rotation. Pairs are neighbours, or stand half the rotated part apart.
    """
    groups, _, heads, size = out.shape
    pairs = cos.shape[1]
    for i in range(x.shape[0]):
        c, s = cos[start + i], sin[start + i]
        at = first
        for group in range(groups):
            for head in range(heads):
                row, to = x[i, at : at + size], out[group, start + i, head]
                at += size
                if neighbours:
                    for j in range(pairs):
                        a, b = row[2 * j], row[2 * j + 1]
                        to[2 * j] = (a * c[j] - b * s[j]) * scale
                        to[2 * j + 1] = (a * s[j] + b * c[j]) * scale
                else:
                    for j in range(pairs):
                        a, b = row[j], row[j + pairs]
                        to[j] = (a * c[j] - b * s[j]) * scale
                        to[j + pairs] = (a * s[j] + b * c[j]) * scale
                for j in range(2 * pairs, size):
                    to[j] = row[j] * scale


@piece
def _fill(row: Any, start: int, stop: int, value: Any) -> None:
    """Numbers `start` to `stop` of a row, as far as there are any: a slice would compile for longer."""
    for j in range(start, minimum(stop, row.size)):
        row[j] = value


@piece
def _softmax(row: Any, start: int, stop: int, cap: Any, sink: Any) -> Any:
    """Exponentials of the scores from `start` to `stop` less their maximum, in place, and zeros around; their sum.

    `row` holds a multiple of sixteen. Unless `cap` is 0 scores are bent by `soft_cap` first. `sink` counts as a score
    that belongs to no key.
    """
    _fill(row, 0, start, _NOTHING)
    _fill(row, stop, row.size, _NOTHING)
    highest = splat(_NOTHING)
    for j in range(0, row.size, LANES):
        x = load(row, j)
        if cap > _ZERO:
            x = select(x == splat(_NOTHING), x, capped(x, cap))
            store(row, j, x)
        highest = maximum(x, highest)
    top = maximum(largest(highest), sink)
    peak, total = splat(top), splat(_ZERO)
    for j in range(0, row.size, LANES):
        x = exp(load(row, j) - peak)
        store(row, j, x)
        total = total + x
    # Masked scores were exp(-87), about 1e-38: too small to change the sum, so zero them.
    _fill(row, 0, start, _ZERO)
    _fill(row, stop, row.size, _ZERO)
    return np.float32(lanes_total(total)) + (exp(sink - top) if sink > _NOTHING else _ZERO)


@piece
def _multiply_tile(
    a: Any, a_at: int, stride: int, n: int, b: Any, b_at: int, out: Any, out_at: int, width: int
) -> None:
    """`_TILE_ROWS` rows of `a` times sixteen columns: out[r, j] is the sum over k < n of a[r, k] * b[k, j].

    Arrays are 1-D and their first element is at `a_at`, `b_at`, `out_at`; rows of `a` stand `stride` apart, those of
    `b` are sixteen long, those of `out` stand `width` apart. The sums stay in registers, as in the kernels of BLAS
    (Goto and van de Geijn 2008).
    """
    sums = repeat(splat(_ZERO), _TILE_ROWS)
    for k in range(n):
        sums = add_products(sums, a, a_at + k, stride, load(b, b_at + LANES * k))
    store_all(out, out_at, width, sums)


def attention_scratch(n_keys: int, head_k: int, head_v: int) -> int:
    """How many float32 `attention` needs for its own use, for at most `n_keys` keys."""
    width = (n_keys + 2 * LANES - 1) // LANES * LANES
    return width * (head_k + (head_v + LANES - 1) // LANES * LANES + _MOST_ROWS) + _MOST_ROWS * (head_k + LANES)


@kernel
def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    first: int,
    past: int,
    reach: tuple[int, int, int],
    cap: np.float32,
    sinks: np.ndarray,
    bias: np.ndarray,
    scratch: np.ndarray,
    out: np.ndarray,
    column: int,
) -> None:
    """Attention of the query heads that share one head of keys and values.

    `q` is [queries, heads, head_k], already scaled, and its first row stands at position `past`; `k` [positions,
    head_k] and `v` [positions, head_v] begin at position 0. Row i of `out` [rows, any] gets what query `first` + i
    sees, the heads side by side from `column` on. `reach` is how many keys it sees that end with its own, how many of
    those after it, and, unless it is 0, the size of the chunks of positions that it cannot see out of. Unless `cap` is
    0 scores are bent by `soft_cap`. `sinks`, unless empty, are a score of each head that belongs to no key; `bias`,
    unless empty, [heads, odd number], is added to scores by the distance from query to key, 0 in the middle.
    `scratch` is scratch of `attention_scratch` numbers.

    Keys are laid out anew as columns of sixteen and values as sixteen columns, so that both products run over
    neighbours; a few rows of scores at a time stay in the first-level cache from product to product.
    """
    heads, head_k, head_v = q.shape[1], q.shape[2], v.shape[1]
    base = past + first
    before, after, chunk = reach
    stop = min(k.shape[0], base + out.shape[0] + after)
    low = max(0, base - before + 1)
    if chunk:
        low = max(low, base // chunk * chunk)
    low = low // LANES * LANES
    n_tiles = (stop - low + LANES - 1) // LANES
    width = n_tiles * LANES
    whole, v_tiles = head_v // LANES, (head_v + LANES - 1) // LANES
    at = width * head_k
    keys = part(scratch, 0, at)
    values = part(scratch, at, width * v_tiles * LANES)
    at += values.size
    scores = part(scratch, at, _TILE_ROWS * width)
    at += scores.size
    rows = part(scratch, at, _TILE_ROWS * head_k)
    at += rows.size
    result = part(scratch, at, _TILE_ROWS * LANES)
    _fill(keys, (n_tiles - 1) * LANES * head_k, keys.size, _ZERO)
    _fill(values, 0, values.size, _ZERO)
    for i in range(stop - low):
        key, value = k[low + i], v[low + i]
        to = i // LANES * LANES * head_k + i % LANES
        for d in range(head_k):
            keys[to + d * LANES] = key[d]
        for c in range(whole):
            store(values, (c * width + i) * LANES, load(value, c * LANES))
        for d in range(whole * LANES, head_v):
            values[(whole * width + i) * LANES + d - whole * LANES] = value[d]
    n_rows = out.shape[0] * heads
    scales = lane_memory.scratch(np.float32, 1)
    for row in range(0, n_rows, _TILE_ROWS):
        n = min(_TILE_ROWS, n_rows - row)
        _fill(rows, n * head_k, rows.size, _ZERO)
        for r in range(n):
            query = q[first + (row + r) // heads, (row + r) % heads]
            for d in range(head_k):  # an assignment of slices compiles for two seconds longer
                rows[r * head_k + d] = query[d]
        lowest = max(0, base + row // heads - before + 1)
        if chunk:
            lowest = max(lowest, (base + row // heads) // chunk * chunk)
        begin = (lowest - low) // LANES
        end = (min(stop - 1, base + (row + n - 1) // heads + after) - low) // LANES + 1
        for t in range(begin, end):
            _multiply_tile(rows, 0, head_k, head_k, keys, t * LANES * head_k, scores, t * LANES, width)
        for r in range(n):
            position = base + (row + r) // heads
            seen = part(scores, r * width + begin * LANES, (end - begin) * LANES)
            origin = low + begin * LANES
            head = (row + r) % heads
            if bias.size:
                middle = bias.shape[1] // 2 + origin - position
                for j in range(min(seen.size, stop - origin)):
                    seen[j] += bias[head, middle + j]
            lowest = max(0, position - before + 1)
            if chunk:
                lowest = max(lowest, position // chunk * chunk)
            sink = sinks[head] if sinks.size else _NOTHING
            scales[r] = _ONE / _softmax(
                seen, max(0, lowest - origin), min(stop, position + 1 + after) - origin, cap, sink
            )
        for c in range(v_tiles):
            _multiply_tile(
                scores, begin * LANES, width, (end - begin) * LANES,
                values, (c * width + begin * LANES) * LANES, result, 0, LANES,
            )  # fmt: skip
            for r in range(n):
                to = column + (row + r) % heads * head_v + c * LANES
                mixed = out[(row + r) // heads]
                if c < whole:
                    store(mixed, to, load(result, r * LANES) * splat(scales[r]))
                else:
                    for j in range(head_v - c * LANES):
                        mixed[to + j] = result[r * LANES + j] * scales[r]
