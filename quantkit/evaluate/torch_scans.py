"""Recurrences along a text through torch, as `recurrent_kernels` on the CPU: chunks of tokens at a time, in float32.

Within a chunk all tokens are worked on together, by matrix products; only what is carried along goes from one chunk to
the next (Yang et al., arXiv 2406.06484, for matrices that are corrected; Dao and Gu, arXiv 2405.21060, for others).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# Tokens of a chunk: as many as keep a GPU busy with products of this size.
_CHUNK = 64
# Fewer where each number of a key decays at its own rate, by at least e^-0.61 a token: the factors of a product, which
# are grown and shrunk by what decays within the chunk, are then at most e^20, far from the bounds of float32.
_CHUNK_OF_RATES = 32
# Numbers of all states that stand in memory together.
_STATES = {"cpu": 1 << 20, "cuda": 1 << 26, "mps": 1 << 24}


def convolve(x: Any, taps: Any, bias: Any, silu: bool) -> Any:
    """A causal convolution of each column of `x` [n_seq, n_ctx, channels] by itself, with `taps` [channels, size]."""
    n_ctx, size = x.shape[1], taps.shape[1]
    padded = functional.pad(x, (0, 0, size - 1, 0))
    made = padded[:, :n_ctx] * taps[:, 0]
    for i in range(1, size):
        made = torch.addcmul(made, padded[:, i : i + n_ctx], taps[:, i])
    if bias is not None:
        made = made + bias
    return functional.silu(made) if silu else made


def recur(q: Any, k: Any, v: Any, log_decay: Any, share: Any, corrected: bool) -> Any:
    """Linear recurrences: a head's matrix S [n, m] forgets, is added to, and is read.

    Queries and keys are [n_seq, groups, n_ctx, n], values [n_seq, groups, heads of a group, n_ctx, m], `log_decay` and
    `share` the same without m. With d = e^log_decay and b = share the matrix becomes d S + k (b v), or with `corrected`
    d S + k (b (v - k d S)), and the result, as the values, is q S.

    With c the sum of log_decay from the chunk's start on, what a token of the chunk adds, u, is
    b (v - e^c k S - sum over those before it of e^(c - c') (k . k') u'): a triangular system.
    """
    n_ctx = q.shape[2]
    state = v.new_zeros(*v.shape[:3], q.shape[3], v.shape[4])
    later = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)
    made = []
    for start in range(0, n_ctx, _CHUNK):
        part = slice(start, min(start + _CHUNK, n_ctx))
        n = part.stop - start
        queries, keys, by = q[:, :, None, part], k[:, :, None, part], share[..., part, None]
        between, since = _decays(log_decay[..., part], later[:n, :n])
        new = v[..., part, :]
        if corrected:
            seen = by * between * (keys @ keys.transpose(3, 4))
            new = by * (new - since * (keys @ state))
            new = torch.linalg.solve_triangular(seen, new, upper=False, unitriangular=True)
        else:
            new = by * new
        made.append((between * (queries @ keys.transpose(3, 4))) @ new + since * (queries @ state))
        state = state * since[..., -1:, :] + keys.transpose(3, 4) @ (between[..., -1, :, None] * new)
    return torch.cat(made, 3)


def _decays(log_decay: Any, later: Any) -> tuple[Any, Any]:
    """What is left at token t of a chunk of what token i added, [..., t, i], and of what was there, [..., t, 1].

    `log_decay` is [..., n], `later` [n, n] says where i is after t. Differences of sums would be rounded as these are,
    which a single token that forgets everything makes large: what lies between two tokens is added up for each two.
    """
    apart = log_decay[..., None].masked_fill(later | torch.eye(len(later), dtype=torch.bool, device=later.device), 0)
    sums = apart.cumsum(-2)
    return sums.masked_fill(later, -torch.inf).exp(), (sums[..., :1] + log_decay[..., :1, None]).exp()


def select(x: Any, steps: Any, decay: Any, b: Any, c: Any) -> Any:
    """Selective state spaces: each channel's state [n] decays, is added to, and is read.

    `x` and `steps` are [n_seq, n_ctx, channels], `decay` [channels, n], `b` and `c` [n_seq, n_ctx, n]. A token makes
    the state e^(step decay) state + b (step x), and the result is the sum of c state, as `x`. Numbers of a state know
    nothing of each other, so there is nothing to multiply matrices for: what tokens bring is worked out for many
    together, and the states one after another.
    """
    n_seq, n_ctx, n_channels = x.shape
    state = x.new_zeros(n_seq, n_channels, decay.shape[1])
    together = max(1, _STATES[x.device.type] // max(1, state.numel()))
    brought, made = steps * x, []
    for start in range(0, n_ctx, together):
        part = slice(start, start + together)
        kept = (steps[:, part, :, None] * decay).exp()
        new = brought[:, part, :, None] * b[:, part, None]
        states = []
        for i in range(new.shape[1]):
            state = torch.addcmul(new[:, i], kept[:, i], state)
            states.append(state)
        made.append((torch.stack(states, 1) @ c[:, part, :, None])[..., 0])
    return torch.cat(made, 1)


def remember(r: Any, log_decay: Any, k: Any, v: Any, unit: Any, learned: Any) -> Any:
    """RWKV 7's recurrence, all arrays [n_seq, heads, n_ctx, size]: what is read, of the same shape.

    A token makes a head's matrix S [keys, values] diag(e^log_decay) S - learned (unit S) + k v, and reads r S.

    With c the sums of log_decay from the chunk's start on, z = unit S of a token before it is changed is
    (unit e^(c - log_decay)) (S + sum over those before it of e^-c' (k' v' - learned' z')): a triangular system.
    """
    n_ctx = r.shape[2]
    state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
    made = []
    for start in range(0, n_ctx, _CHUNK_OF_RATES):
        part = slice(start, start + _CHUNK_OF_RATES)
        rates, values = log_decay[:, :, part], v[:, :, part]
        sums = rates.cumsum(2)
        sees, reads = unit[:, :, part] * (sums - rates).exp(), r[:, :, part] * sums.exp()
        grown = (-sums).exp()
        keys, learns = (k[:, :, part] * grown).transpose(2, 3), (learned[:, :, part] * grown).transpose(2, 3)
        seen = sees @ state + (sees @ keys).tril(-1) @ values
        seen = torch.linalg.solve_triangular(sees @ learns, seen, upper=False, unitriangular=True)
        made.append(reads @ state + (reads @ keys).tril() @ values - (reads @ learns).tril() @ seen)
        state = sums[:, :, -1, :, None].exp() * (state + keys @ values - learns @ seen)
    return torch.cat(made, 2)
