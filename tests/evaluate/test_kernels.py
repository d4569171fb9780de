"""The kernels between the products, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.evaluate import (
    activation_kernels,
    attention_kernels,
    expert_kernels,
    logit_kernels,
    norm_kernels,
    row_pieces,
)


def test_exponential_keeps_its_stated_bound_over_its_whole_range():
    x = np.linspace(-87.0, 88.0, 4_000_001).astype(np.float32)
    out = np.empty_like(x)
    row_pieces.exponentials(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1).max() < 1.5e-7


def test_exponential_at_the_ends():
    x = np.array([-np.inf, -200.0, 0.0, -0.0, 200.0, np.inf, np.nan], np.float32)
    out = np.empty_like(x)
    row_pieces.exponentials(x, out)
    assert out[0] == out[1] < 2e-38
    assert out[2] == out[3] == 1.0
    assert out[4] == out[5] > 1e38
    assert np.isnan(out[6])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 70),
    heads=st.integers(1, 7),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    first=st.integers(0, 9),
    past=st.integers(0, 40),
    reach=st.tuples(st.integers(1, 130), st.sampled_from([0, 0, 5, 200]), st.sampled_from([0, 0, 1, 32, 50])),
    cap=st.sampled_from([0.0, 0.0, 4.0]),
    extras=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_attention_sees_what_is_in_its_reach(n, heads, sizes, first, past, reach, cap, extras, seed):
    rng = np.random.default_rng(seed)
    (head_k, head_v), base, (before, after, chunk) = sizes, past + first, reach
    n_keys = min(base + n + 20, base + n + after)
    # Positions from base + n on, and queries before `first`, are nobody's business: NaN would show.
    q = rng.standard_normal((first + n, heads, head_k)).astype(np.float32) * 2 / np.float32(head_k**0.5)
    k = rng.standard_normal((base + n + 20, head_k)).astype(np.float32) * 2
    v = rng.standard_normal((base + n + 20, head_v)).astype(np.float32)
    q[:first], k[n_keys:], v[n_keys:] = np.nan, np.nan, np.nan
    lowest = max(0, base - before + 1, base // chunk * chunk if chunk else 0)
    k[: lowest // 16 * 16] = np.nan
    query, key = base + np.arange(n)[:, None], np.arange(n_keys)
    seen = (key <= query + after) & (key > query - before)
    if chunk:
        seen &= key >= query // chunk * chunk
    scores = np.einsum("nhd,kd->hnk", q[first:], np.nan_to_num(k[:n_keys]), dtype=np.float64)
    sinks = rng.standard_normal(heads if extras[0] else 0).astype(np.float32) * 3
    bias = rng.standard_normal((heads, 2 * n_keys + 1) if extras[1] else (0, 0)).astype(np.float32)
    if extras[1]:
        scores += bias[:, key - query + n_keys]
    scores = np.where(seen, cap * np.tanh(scores / cap) if cap else scores, -np.inf)
    sink = sinks[:, None, None] if extras[0] else np.full((1, 1, 1), -np.inf)
    peak = np.maximum(scores.max(2, keepdims=True), sink)
    p = np.exp(scores - peak)
    expected = np.einsum("hnk,kd->nhd", p / (p.sum(2, keepdims=True) + np.exp(sink - peak)), v[:n_keys])
    scratch = np.full(attention_kernels.attention_scratch(n_keys, head_k, head_v) + 9, np.nan, np.float32)
    out = np.full((n, 5 + heads * head_v + 3), np.nan, np.float32)
    attention_kernels.attention(
        q, k[: base + n + 20], v, first, past, reach, np.float32(cap), sinks, bias, scratch[:-9], out, 5
    )
    # Scores of up to 40 round by 40 * 2^-24, and so do their exponents.
    np.testing.assert_allclose(out[:, 5:-3].reshape(expected.shape), expected, rtol=1e-5, atol=2e-5)
    assert np.isnan(out[:, :5]).all() and np.isnan(out[:, -3:]).all() and np.isnan(scratch[-9:]).all()


def test_attention_keeps_a_query_that_is_not_a_number():
    q, k, v = np.ones((3, 1, 4), np.float32), np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    q[1] = np.nan
    out = np.empty((3, 4), np.float32)
    scratch = np.empty(attention_kernels.attention_scratch(3, 4, 4), np.float32)
    nothing = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    attention_kernels.attention(q, k, v, 0, 0, (3, 0, 0), np.float32(0), *nothing, scratch, out, 0)
    assert np.isnan(out).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("neighbours", [True, False])
def test_rotation_turns_pairs_and_leaves_the_rest(neighbours):
    rng = np.random.default_rng(1)
    groups, heads, size, pairs, n, start = 2, 3, 10, 4, 5, 2
    x = rng.standard_normal((n, 7 + groups * heads * size)).astype(np.float32)
    angle = rng.uniform(0, 6, (n + start, pairs))
    out = np.full((groups, n + start, heads, size), np.nan, np.float32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    attention_kernels.split_heads(x, 7, cos, sin, start, neighbours, np.float32(0.5), out)
    whole = x[:, 7:].reshape(n, groups, heads, size).astype(np.float64)
    a, b = (whole[..., 0:8:2], whole[..., 1:8:2]) if neighbours else (whole[..., :4], whole[..., 4:8])
    rotated = (a + 1j * b) * np.exp(1j * angle[start:, None, None])
    expected = whole.copy()
    if neighbours:
        expected[..., 0:8:2], expected[..., 1:8:2] = rotated.real, rotated.imag
    else:
        expected[..., :4], expected[..., 4:8] = rotated.real, rotated.imag
    np.testing.assert_allclose(out[:, start:], expected.transpose(1, 0, 2, 3) * 0.5, rtol=1e-5, atol=1e-6)
    assert np.isnan(out[:, :start]).all()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 100), seed=st.integers(0, 99))
def test_norm_and_gate(n, seed):
    rng = np.random.default_rng(seed)
    x, branch = rng.standard_normal((2, 3, n)).astype(np.float32)
    weight = rng.standard_normal(n).astype(np.float32)
    y = (x + branch).astype(np.float64)
    expected = y / np.sqrt((y * y).mean(1, keepdims=True) + 1e-3) * weight
    out = np.empty_like(x)
    norm_kernels.add_rms_norm(x, branch, weight, 1e-3, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x, y.astype(np.float32))
    norm_kernels.rms_norm(x, weight, 1e-3, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    gate_up = np.concatenate([x * 30, branch], axis=1)
    g = gate_up[:, :n].astype(np.float64)
    activation_kernels.silu_gate(gate_up, out)
    np.testing.assert_allclose(out, g / (1 + np.exp(-g)) * branch, rtol=1e-6, atol=1e-35)


@settings(deadline=None, max_examples=30)
@given(n_vocab=st.integers(1, 300), tile=st.integers(1, 300), scale=st.floats(0.1, 60), seed=st.integers(0, 99))
def test_log_likelihood_does_not_depend_on_tiles(n_vocab, tile, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((4, n_vocab)) * scale).astype(np.float32)
    targets = rng.integers(0, n_vocab, 4).astype(np.int32)
    wide = logits.astype(np.float64)
    top = wide.max(1)
    expected = wide[np.arange(4), targets] - top - np.log(np.exp(wide - top[:, None]).sum(1))
    maxima, sums, chosen = np.full(4, -np.inf), np.zeros(4), np.zeros(4)
    for at in range(0, n_vocab, tile):
        logit_kernels.score_tile(np.ascontiguousarray(logits[:, at : at + tile]), at, targets, maxima, sums, chosen)
    np.testing.assert_allclose(chosen - maxima - np.log(sums), expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 100), seed=st.integers(0, 99))
def test_layer_norm_in_place_and_not(n, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, n)) * 4 + 9).astype(np.float32)
    weight, bias = rng.standard_normal((2, n)).astype(np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred * centred).mean(1, keepdims=True) + 1e-3) * weight + bias
    out = np.empty_like(x)
    norm_kernels.layer_norm(x, weight, bias, 1e-3, out)
    # The mean rounds to float32: by 9 * 2^-24 of a value, over a deviation that may be as small as sqrt(eps).
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    norm_kernels.layer_norm(x, weight, bias, 1e-3, x)
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize(("size", "count"), [(24, 3), (72, 1), (5, 4)])
def test_norm_of_columns_touches_no_others(size, count):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 11 + size * count + 4)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    heads = x[:, 11:-4].reshape(6, count, size).astype(np.float64)
    expected = heads / np.sqrt((heads * heads).mean(-1, keepdims=True) + 1e-4) * weight
    before = x.copy()
    norm_kernels.rms_norm_columns(x, 11, count, weight, 1e-4)
    np.testing.assert_allclose(x[:, 11:-4].reshape(6, count, size), expected, rtol=1e-5)
    np.testing.assert_array_equal(x[:, :11], before[:, :11])
    np.testing.assert_array_equal(x[:, -4:], before[:, -4:])


def test_gelu_is_the_tanh_approximation():
    x = np.linspace(-30, 30, 5000).astype(np.float32).reshape(2, -1)
    wide = x.astype(np.float64)
    expected = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    out = np.empty_like(x)
    activation_kernels.gelu(x, out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    gated = np.empty((2, 1250), np.float32)
    activation_kernels.gelu_gate(x, gated)
    np.testing.assert_allclose(gated, expected[:, :1250] * wide[:, 1250:], rtol=1e-5, atol=1e-5)


def test_gates_that_are_clamped():
    x = np.linspace(-12, 12, 2000).astype(np.float32).reshape(2, -1)
    gate, up = np.minimum(x[:, :500], 7).astype(np.float64), np.clip(x[:, 500:], -7, 7).astype(np.float64)
    out = np.empty((2, 500), np.float32)
    activation_kernels.clamped_silu_gate(x, out)
    np.testing.assert_allclose(out, gate / (1 + np.exp(-1.702 * gate)) * (up + 1), rtol=1e-5, atol=1e-6)


def test_squared_relu_and_the_learned_activation():
    x = np.linspace(-9, 9, 2001).astype(np.float32)[None]
    out, wide = np.empty_like(x), x.astype(np.float64)
    activation_kernels.relu_squared(x, out)
    np.testing.assert_allclose(out, np.maximum(wide, 0) ** 2, rtol=1e-6)
    activation_kernels.xielu(x, *(np.float32(n) for n in (0.8, 1.3, 0.5, -1e-6)), out)
    below = 1.3 * (np.expm1(np.minimum(wide, -1e-6)) - wide) + 0.5 * wide
    np.testing.assert_allclose(out, np.where(wide > 0, 0.8 * wide**2 + 0.5 * wide, below), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_soft_cap_keeps_its_stated_bound(cap):
    x = np.concatenate([np.linspace(-400, 400, 999), [np.inf, -np.inf, 1e-8]]).astype(np.float32)[None]
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    capped = x.copy()
    logit_kernels.soft_cap(capped, np.float32(cap))
    assert np.abs(capped - expected).max() < 2e-7 * cap


def routed(logits, bias, gating, groups, normalised, scale, n_used):
    """The definition, in float64: the experts of each row and their shares."""
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    shares = {
        expert_kernels.SOFTMAX: softmax,
        expert_kernels.SIGMOID: 1 / (1 + np.exp(-wide)),
        expert_kernels.CHOSEN: wide,
    }[gating]
    scores = shares + (bias if bias.size else 0)
    if groups[0] > 1:
        parts = scores.reshape(len(scores), groups[0], -1)
        sums = np.sort(parts, axis=2)[:, :, -2:].sum(2)
        left_out = np.argsort(-sums, axis=1, kind="stable")[:, groups[1] :]
        parts = parts.copy()
        np.put_along_axis(parts, np.broadcast_to(left_out[..., None], (*left_out.shape, parts.shape[2])), -np.inf, 1)
        scores = parts.reshape(scores.shape)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :n_used]
    shares = np.take_along_axis(shares, chosen, 1)
    if gating == expert_kernels.CHOSEN:
        shares = np.exp(shares - shares.max(1, keepdims=True))
    if normalised or gating == expert_kernels.CHOSEN:
        shares = shares / np.maximum(shares.sum(1, keepdims=True), 2.0**-14)
    return chosen, shares * scale


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(1, 5), n_groups=st.integers(1, 4), biased=st.booleans(), data=st.data(),
    gating=st.sampled_from([expert_kernels.SOFTMAX, expert_kernels.SIGMOID, expert_kernels.CHOSEN]),
    normalised=st.booleans(), scale=st.sampled_from([1.0, 2.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_routing_follows_its_definition(size, n_groups, biased, data, gating, normalised, scale, seed):
    n_expert = size * n_groups
    groups = n_groups, data.draw(st.integers(1, n_groups))
    n_used = data.draw(st.integers(1, size * groups[1]))
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((7, n_expert)) * 4).astype(np.float32)
    bias = rng.standard_normal(n_expert if biased else 0).astype(np.float32)
    if not biased and n_groups == 1:
        logits[0] = 1.0
    chosen, shares = np.empty((7, n_used), np.int32), np.empty((7, n_used), np.float32)
    expert_kernels.route(logits, bias, gating, groups, normalised, np.float32(scale), chosen, shares)
    expected, wanted = routed(logits, bias, gating, groups, normalised, scale, n_used)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(shares, wanted, rtol=4e-6)


def test_routing_avoids_what_is_not_a_number():
    logits = np.array([[np.nan, 1.0, np.nan, 2.0]], np.float32)
    chosen, shares = np.empty((1, 2), np.int32), np.empty((1, 2), np.float32)
    expert_kernels.route(
        logits, np.empty(0, np.float32), expert_kernels.SOFTMAX, (1, 1), True, np.float32(1), chosen, shares
    )
    assert chosen.tolist() == [[3, 1]]


def test_adding_rows_that_were_gathered():
    rng = np.random.default_rng(3)
    out, x = rng.standard_normal((9, 5)).astype(np.float32), rng.standard_normal((3, 5)).astype(np.float32)
    rows, weights = np.array([7, 0, 4]), np.array([0.5, 2.0, -1.0], np.float32)
    expected = out.copy()
    expected[rows] += x * weights[:, None]
    expert_kernels.add_rows(x, rows, weights, out)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
