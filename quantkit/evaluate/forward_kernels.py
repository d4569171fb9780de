"""What a forward pass does between its matrix products: fused, vectorised, without the GIL.

Each kernel runs over all rows that it is given, on one thread; threads share work by taking different rows. Arrays are
float32 and contiguous unless said otherwise. Sums run in sixteen lanes, so they round like short sums. A product and
the sum it goes into round once where the machine can; fastmath stays off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features

from quantkit.blocks import lane_memory
from quantkit.blocks.lane_memory import add_products, load, store, store_all
from quantkit.blocks.lanes import (
    LANES,
    get,
    largest,
    like,
    maximum,
    minimum,
    multiply_add,
    power_of_two,
    repeat,
    select,
    splat,
)
from quantkit.compile.kernel import allocating_kernel, allocating_piece, kernel, piece

_ZERO, _ONE, _LOWEST, _HIGHEST = np.float32(0.0), np.float32(1.0), np.float32(-87.0), np.float32(88.0)
_TWO = np.float32(2.0)
_LOG2_E, _MAGIC = np.float32(math.log2(math.e)), np.float32(12582912.0)
# ln 2 in two parts. The first has few bits, so its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
# (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, interpolated at 400 Chebyshev nodes: relative error of e^r under 4e-9.
_C0, _C1, _C2, _C3, _C4 = (
    np.float32(c) for c in (0.5, 0.16666574776172638, 0.041666459292173386, 0.00836347509175539, 0.0013934092130512)
)
# -2 sqrt(2 / pi), and that times 0.044715.
_GELU_LINEAR = np.float32(-2.0 * math.sqrt(2.0 / math.pi))
_GELU_CUBIC = np.float32(-2.0 * math.sqrt(2.0 / math.pi) * 0.044715)
# Rows that `attention` takes through its products together. Six fill the sixteen registers of AVX2 with sums and
# operands; with AVX-512 it takes eight sums to keep the adders busy.
_TILE_ROWS = 8 if get_host_cpu_features().get("avx512f") else 6
# Scratch fits either, since cached machine code may have been made for the other.
_MOST_ROWS = 8
_NOTHING = np.float32(-np.inf)
_MIN_INT = np.int32(-2147483648)


@piece
def exp(x: Any) -> Any:
    """e^x of a float32 or of sixteen, with a relative error under 1.5e-7, for x in [-87, 88].

    Beyond, the value at that end; NaN is NaN. The exponent is rounded by adding 1.5 * 2^23, which leaves it in the low
    bits of the sum; a polynomial does the rest. LLVM vectorises loops over this.
    """
    x = maximum(like(_LOWEST, x), x)
    x = minimum(like(_HIGHEST, x), x)
    shifted = multiply_add(x, like(_LOG2_E, x), like(_MAGIC, x))
    n = shifted - like(_MAGIC, x)
    r = multiply_add(n, like(-_LN2_LOW, x), multiply_add(n, like(-_LN2_HIGH, x), x))
    p = multiply_add(like(_C4, x), r, like(_C3, x))
    p = multiply_add(p, r, like(_C2, x))
    p = multiply_add(p, r, like(_C1, x))
    p = multiply_add(p, r, like(_C0, x))
    return multiply_add(p, r * r, r + like(_ONE, x)) * power_of_two(shifted)


@piece
def _total(lanes: Any) -> Any:
    """The sum of sixteen lanes, in float64."""
    total = 0.0
    for j in range(LANES):
        total += get(lanes, j)
    return total


@piece
def _sum(x: Any, n: int) -> Any:
    """The sum of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        lanes = lanes + load(x, j)
    total = _total(lanes)
    for j in range(whole, n):
        total += x[j]
    return total


@piece
def _sum_squares(x: Any, n: int) -> Any:
    """The sum of the squares of the first `n` numbers of a row, in float64 from sixteen float32 lanes."""
    lanes = splat(_ZERO)
    whole = n // LANES * LANES
    for j in range(0, whole, LANES):
        v = load(x, j)
        lanes = multiply_add(v, v, lanes)
    total = _total(lanes)
    for j in range(whole, n):
        total += np.float64(x[j]) * np.float64(x[j])
    return total


@piece
def _maximum(x: Any, n: int) -> Any:
    """The largest of the first `n` numbers of a row, NaN aside.

    Compared as integers of the same order, since LLVM vectorises the maximum of integers without fastmath.
    """
    largest = _MIN_INT
    for j in range(n):
        bits = np.float32(x[j]).view(np.int32)
        key = np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        largest = key if key > largest else largest
    bits = np.int32(largest ^ ((largest >> 31) & 0x7FFFFFFF))
    return np.int32(bits).view(np.float32)


@kernel
def exponentials(x: np.ndarray, out: np.ndarray) -> None:
    """`exp` of every number of 1-D `x`."""
    for j in range(x.size):
        out[j] = exp(x[j])


@kernel
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` over their root mean square, times `weight`: [rows, n] to [rows, n]."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        scale = np.float32(1.0 / math.sqrt(_sum_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Rows of `x` less their mean, over their standard deviation, times `weight`, plus `bias`: [rows, n] to same."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, to = x[i], out[i]
        mean = np.float32(_sum(row, n) / n)
        for j in range(n):
            to[j] = row[j] - mean
        scale = np.float32(1.0 / math.sqrt(_sum_squares(to, n) / n + eps))
        for j in range(n):
            to[j] = to[j] * scale * weight[j] + bias[j]


@kernel
def rms_norm_columns(x: np.ndarray, first: int, count: int, weight: np.ndarray, eps: float) -> None:
    """`rms_norm` in place of `count` vectors that stand side by side in every row of `x`, from column `first` on."""
    size = weight.size
    for i in range(x.shape[0]):
        for at in range(first, first + count * size, size):
            part = x[i, at : at + size]
            scale = np.float32(1.0 / math.sqrt(_sum_squares(part, size) / size + eps))
            for j in range(size):
                part[j] = part[j] * scale * weight[j]


@kernel
def add(x: np.ndarray, branch: np.ndarray) -> None:
    """`x += branch`, both [rows, n]."""
    for i in range(x.shape[0]):
        row, other = x[i], branch[i]
        for j in range(row.size):
            row[j] += other[j]


@kernel
def add_rms_norm(x: np.ndarray, branch: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """`x += branch`, then `rms_norm` of x into `out`; all [rows, n]."""
    n = x.shape[1]
    for i in range(x.shape[0]):
        row, other, to = x[i], branch[i], out[i]
        for j in range(n):
            row[j] += other[j]
        scale = np.float32(1.0 / math.sqrt(_sum_squares(row, n) / n + eps))
        for j in range(n):
            to[j] = row[j] * scale * weight[j]


@kernel
def add_bias(x: np.ndarray, bias: np.ndarray) -> None:
    """`x += bias` in every row of [rows, n]."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] += bias[j]


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
def _capped(x: Any, cap: Any) -> Any:
    """cap * tanh(x / cap) of a float32 or of sixteen; absolute error under 2e-7 * cap."""
    return like(cap, x) - like(cap + cap, x) / (exp(x * like(_TWO / cap, x)) + like(_ONE, x))


@kernel
def soft_cap(x: np.ndarray, cap: np.float32) -> None:
    """Every number x of [rows, n] to cap * tanh(x / cap), in place."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            row[j] = _capped(row[j], cap)


@piece
def _softmax(row: Any, start: int, stop: int, cap: Any, sink: Any) -> Any:
    """Exponentials of the scores from `start` to `stop` less their maximum, in place, and zeros around; their sum.

    `row` holds a multiple of sixteen. Unless `cap` is 0 scores are bent by `soft_cap` first. `sink` counts as a score
    that belongs to no key.
    """
    row[:start] = _NOTHING
    row[stop:] = _NOTHING
    highest = splat(_NOTHING)
    for j in range(0, row.size, LANES):
        x = load(row, j)
        if cap > _ZERO:
            x = select(x == splat(_NOTHING), x, _capped(x, cap))
            store(row, j, x)
        highest = maximum(x, highest)
    top = maximum(largest(highest), sink)
    peak, total = splat(top), splat(_ZERO)
    for j in range(0, row.size, LANES):
        x = exp(load(row, j) - peak)
        store(row, j, x)
        total = total + x
    # Masked scores were exp(-87), about 1e-38: too small to change the sum, so zero them.
    row[:start] = _ZERO
    row[stop:] = _ZERO
    return np.float32(_total(total)) + (exp(sink - top) if sink > _NOTHING else _ZERO)


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
    keys = scratch[:at]
    values = scratch[at : at + width * v_tiles * LANES]
    at += values.size
    scores = scratch[at : at + _TILE_ROWS * width]
    at += scores.size
    rows = scratch[at : at + _TILE_ROWS * head_k]
    at += rows.size
    result = scratch[at : at + _TILE_ROWS * LANES]
    keys[(n_tiles - 1) * LANES * head_k :] = _ZERO
    values[:] = _ZERO
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
        rows[n * head_k :] = _ZERO
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
            seen = scores[r * width + begin * LANES : r * width + end * LANES]
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


@kernel
def multiply_sigmoid(x: np.ndarray, gate: np.ndarray) -> None:
    """`x *= sigmoid(gate)`, both [rows, n]."""
    for i in range(x.shape[0]):
        row, by = x[i], gate[i]
        for j in range(row.size):
            row[j] /= _ONE + exp(-by[j])


@kernel
def silu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`silu(gate) * up`: rows of gate's n numbers and then up's n to rows of n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            to[j] = gate[j] / (_ONE + exp(-gate[j])) * up[j]


# gpt-oss's bounds and slope.
_LIMIT, _SLOPE = np.float32(7.0), np.float32(1.702)


@kernel
def clamped_silu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """g sigmoid(1.702 g) (u + 1), with the gate at most 7 and u within 7 of 0: gate's n numbers, then up's, to n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            g, u = gate[j], up[j]
            g = g if not g > _LIMIT else _LIMIT
            u = u if not u > _LIMIT else _LIMIT
            u = u if not u < -_LIMIT else -_LIMIT
            to[j] = g / (_ONE + exp(-_SLOPE * g)) * (u + _ONE)


@piece
def _gelu(x: Any) -> Any:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016): x / (1 + e^-2u), which is x (1 + tanh u) / 2."""
    return x / (_ONE + exp(x * (_GELU_LINEAR + _GELU_CUBIC * x * x)))


@kernel
def gelu_gate(gate_up: np.ndarray, out: np.ndarray) -> None:
    """`gelu(gate) * up`: rows of gate's n numbers and then up's n to rows of n."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        gate, up, to = gate_up[i, :n], gate_up[i, n:], out[i]
        for j in range(n):
            to[j] = _gelu(gate[j]) * up[j]


@kernel
def gelu(x: np.ndarray, out: np.ndarray) -> None:
    """`gelu(x)`: rows of n to rows of n."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            to[j] = _gelu(row[j])


@kernel
def relu_squared(x: np.ndarray, out: np.ndarray) -> None:
    """The square of what is above 0, and 0: rows of n to rows of n."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            v = row[j] if row[j] > _ZERO or row[j] != row[j] else _ZERO
            to[j] = v * v


@kernel
def xielu(
    x: np.ndarray, positive: np.float32, negative: np.float32, beta: np.float32, eps: np.float32, out: np.ndarray
) -> None:
    """`positive` x^2 + `beta` x above 0, `negative` (e^min(x, eps) - 1 - x) + `beta` x below: [rows, n] to same."""
    for i in range(out.shape[0]):
        row, to = x[i], out[i]
        for j in range(row.size):
            v = row[j]
            if v > _ZERO:
                to[j] = positive * v * v + beta * v
            else:
                to[j] = negative * (np.float32(math.expm1(min(v, eps))) - v) + beta * v


# How `route` makes shares of logits.
SOFTMAX, SIGMOID, CHOSEN = 0, 1, 2
# What a sum of shares is at least when they are divided by it: float16's smallest normal number, as in llama.cpp.
_LEAST_SUM = np.float32(6.103515625e-5)


@piece
def _better(x: Any, y: Any) -> Any:
    """Whether x comes before y in a choice of the largest; what is not a number comes last."""
    return x > y or (y != y and x == x)


@allocating_piece
def _keep_best_groups(scores: Any, n_groups: int, n_kept: int) -> None:
    """Take those numbers of `scores` out of the choice that are in none of the groups with the best two numbers."""
    size = scores.size // n_groups
    sums = np.empty(n_groups, np.float32)
    for group in range(n_groups):
        first, second = _NOTHING, _NOTHING
        for e in range(group * size, (group + 1) * size):
            if scores[e] > first:
                first, second = scores[e], first
            elif scores[e] > second:
                second = scores[e]
        sums[group] = first + second if size > 1 else first
    for _ in range(n_groups - n_kept):
        worst = -1
        for group in range(n_groups):
            if sums[group] == sums[group] and (worst < 0 or sums[group] <= sums[worst]):
                worst = group
        scores[worst * size : (worst + 1) * size] = _NOTHING
        sums[worst] = np.nan


@allocating_kernel
def route(
    logits: np.ndarray,
    bias: np.ndarray,
    gating: int,
    groups: tuple[int, int],
    normalised: bool,
    scale: np.float32,
    chosen: np.ndarray,
    weights: np.ndarray,
) -> None:
    """The experts with the largest shares for each row, the first where they are equal, and their shares.

    `logits` is [rows, experts]; `chosen` (int32) and `weights`, [rows, experts used], get the experts and their shares:
    the softmax over all experts (`gating` SOFTMAX), the sigmoid of each (SIGMOID) or the softmax over the chosen
    (CHOSEN); made to sum to one if `normalised`, then times `scale`. `bias` [experts], unless it is empty, is added to
    shares for the choice alone. `groups` is into how many groups experts fall, and how many of these take part: those
    whose two largest sum highest. What is not a number is never chosen before a number is.
    """
    n_used, n = chosen.shape[1], logits.shape[1]
    shares, scores = np.empty(n, np.float32), np.empty(n, np.float32)
    plain = not bias.size and groups[0] == 1
    for i in range(logits.shape[0]):
        row = logits[i]
        peak, total = _maximum(row, n), _ZERO
        for e in range(n):
            if gating == SIGMOID:
                shares[e] = _ONE / (_ONE + exp(-row[e]))
            else:
                shares[e] = exp(row[e] - peak)
                total += shares[e]
        for e in range(n):
            if gating == SOFTMAX:
                shares[e] /= total
            # Logits are in the order of their shares, and do not become equal where these underflow.
            scores[e] = row[e] if plain or gating == CHOSEN else shares[e]
            if bias.size:
                scores[e] += bias[e]
        if groups[0] > groups[1]:
            _keep_best_groups(scores, groups[0], groups[1])
        for rank in range(n_used):
            best = -1
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                if not taken and (best < 0 or _better(scores[e], scores[best])):
                    best = e
            chosen[i, rank] = best
        if gating == CHOSEN or (gating == SOFTMAX and normalised and plain):
            peak, total = row[chosen[i, 0]], _ZERO
            for rank in range(n_used):
                peak = max(peak, row[chosen[i, rank]])
            for rank in range(n_used):
                weights[i, rank] = exp(row[chosen[i, rank]] - peak)
                total += weights[i, rank]
        else:
            total = _ZERO
            for rank in range(n_used):
                weights[i, rank] = shares[chosen[i, rank]]
                total += weights[i, rank]
            total = max(total, _LEAST_SUM) if normalised else _ONE
        for rank in range(n_used):
            weights[i, rank] = weights[i, rank] / total * scale


@kernel
def route_sparsely(logits: np.ndarray, tolerance: np.float32, chosen: np.ndarray, weights: np.ndarray) -> None:
    """The experts with the largest logits for each row, and their shares, as the sparse mixer gives them.

    Of each the share is the softmax over those that are not chosen before it and whose logits are at most `tolerance`
    below its own, of the larger of its own and their magnitude. Arrays as those of `route`.
    """
    n_used, n = chosen.shape[1], logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        for rank in range(n_used):
            best, total = -1, _ZERO
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                if not taken and (best < 0 or _better(row[e], row[best])):
                    best = e
            for e in range(n):
                taken = False
                for earlier in range(rank):
                    taken = taken or chosen[i, earlier] == e
                below = row[best] - row[e]
                if not taken and not below / max(abs(row[e]), row[best]) > tolerance:
                    total += exp(-below)
            chosen[i, rank] = best
            weights[i, rank] = _ONE / total


@kernel
def add_gated(x: np.ndarray, gate: np.ndarray, out: np.ndarray) -> None:
    """`out += sigmoid(gate) * x`: rows of [any, n], with one number of `gate` [any, 1] for each."""
    for i in range(x.shape[0]):
        row, to, share = x[i], out[i], _ONE / (_ONE + exp(-gate[i, 0]))
        for j in range(row.size):
            to[j] += share * row[j]


@kernel
def add_rows(x: np.ndarray, rows: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """`out[rows[i]] += weights[i] * x[i]`, of [any, n]."""
    for i in range(rows.size):
        row, to, weight = x[i], out[rows[i]], weights[i]
        for j in range(row.size):
            to[j] += weight * row[j]


def squares_by_column(x: np.ndarray) -> np.ndarray:
    """The sum of the squares of each column of `x` [rows, n]: float64 [n]."""
    sums = np.zeros(x.shape[1])
    add_squares(x, sums)
    return sums


@kernel
def add_squares(x: np.ndarray, sums: np.ndarray) -> None:
    """Add the squares of the rows of `x` [rows, n] to `sums`, float64 [n]."""
    for i in range(x.shape[0]):
        row = x[i]
        for j in range(row.size):
            v = np.float64(row[j])
            sums[j] += v * v


@kernel
def score_tile(
    logits: np.ndarray,
    first: int,
    targets: np.ndarray,
    maxima: np.ndarray,
    sums: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Take one tile of the vocabulary into the log-likelihood of each row's target token.

    `logits` is [rows, tile], of the tokens from `first` on. `maxima` and `sums` (float64, begun with -inf and 0) hold
    each row's running maximum and sum of exponentials less that maximum, `chosen` (float64) the target's logit.
    The log-likelihood is chosen - maximum - ln(sum) after the last tile.
    """
    n = logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        target = targets[i] - first
        if 0 <= target < n:
            chosen[i] = row[target]
        largest = max(np.float64(_maximum(row, n)), maxima[i])
        shift = np.float32(largest)
        for j in range(n):
            row[j] = exp(row[j] - shift)
        sums[i] = sums[i] * math.exp(maxima[i] - largest) + _sum(row, n)
        maxima[i] = largest
