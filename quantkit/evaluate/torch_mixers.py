"""Attention through torch, and what all kinds of mixers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.nn import functional

from quantkit.architectures.mixers import Attention, LatentAttention, Mixer
from quantkit.architectures.products import Norm
from quantkit.evaluate.attention import buckets, falling
from quantkit.evaluate.torch_parts import TorchParts

M = TypeVar("M", bound=Mixer)
# Scores of attention that stand in memory together.
_SCORES = {"cpu": 1 << 24, "cuda": 1 << 27, "mps": 1 << 26}


class TorchMixer(ABC, Generic[M]):
    """A mixer that runs through torch. `fields` names what it carries out of its description."""

    fields: ClassVar[str]

    def __init__(self, mixer: M, parts: TorchParts) -> None:
        self.mixer, self.parts = mixer, parts

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers its activations hold for a token, about."""

    @abstractmethod
    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """What the output product reads at positions of `span`, [n_seq, positions, width], of whole sequences.

        `x` [n_seq, n_ctx, n_embd], float32, is normalised. `rows` [n_seq, n_ctx, width of the model's rows] are those
        that it was taken of, with what earlier layers have kept there; `kept` gets what later ones will read, as values
        [n_seq, n_ctx, any] by the first of their columns.
        """


class TorchAttention(TorchMixer[Attention]):
    """Attention to keys and values of each head."""

    fields = (
        "n_head n_head_kv head_k head_v scale out q k v qkv rope window chunk sinks softcap q_norm k_norm norm_whole "
        "norm_rotated clamp temperature causal alibi distances gated v_norm shared kept_at"
    )

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return (8 if self.mixer.gated else 6) * self.mixer.n_head * max(self.mixer.head_k, self.mixer.head_v)

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        a, parts = self.mixer, self.parts
        q, k, v, gate = self._projected(x)
        q = self._heads(q, a.n_head, a.q_norm)
        if a.temperature is not None:
            steps = (torch.arange(x.shape[1], device=x.device) + a.temperature.offset) // a.temperature.step
            growth = 1 + a.temperature.scale * torch.log(steps.float() + 1)
            q = q * growth[:, None].to(parts.dtype)
        q = q[:, :, span]
        if a.shared is not None:
            k, v = self._kept(rows, a.shared.at)
        else:
            k = self._heads(k, a.n_head_kv, a.k_norm)
            v = v.reshape(*x.shape[:2], a.n_head_kv, a.head_v)
            if a.v_norm is not None:
                v = parts.normed(a.v_norm, v.float()).to(parts.dtype)
            v = v.transpose(1, 2)
            if a.kept_at is not None:
                at = a.kept_at
                for heads in (k, v):
                    kept[at] = heads.transpose(1, 2).flatten(2)
                    at += kept[at].shape[2]
        if a.n_head != a.n_head_kv:
            k, v = (y.repeat_interleave(a.n_head // a.n_head_kv, dim=1) for y in (k, v))
        mixed = self._mixed(q, k, v, span)
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed if gate is None else mixed * torch.sigmoid(gate[:, span])

    def _projected(self, x: Any) -> tuple[Any, Any, Any, Any]:
        """Queries, keys, values and gates, side by side; None where there are none."""
        a = self.mixer
        made = self.parts.products(x, a.qkv, a.q, a.k, a.v)
        gate = None
        if a.qkv is not None:
            n_q, n_k = a.n_head * a.head_k, a.n_head_kv * a.head_k
            made = list(made[0].split([n_q, n_k, a.n_head_kv * a.head_v], dim=2))
        elif a.gated:
            pairs = made[0].view(*x.shape[:2], a.n_head, 2, a.head_k)
            made[0], gate = pairs[:, :, :, 0].flatten(2), pairs[:, :, :, 1].flatten(2)
        if a.clamp is not None:
            made = [y.clamp(-a.clamp, a.clamp) for y in made]
        if a.shared is not None:
            return made[0], None, None, gate
        return made[0], made[1], made[2] if len(made) == 3 else made[1], gate

    def _heads(self, y: Any, n_head: int, norm: Norm | None) -> Any:
        """`y` as heads [n_seq, heads, n_ctx, head size], normalised and rotated."""
        a, parts = self.mixer, self.parts
        if norm is not None and a.norm_whole:
            y = parts.normed(norm, y.float())
        y = y.reshape(*y.shape[:2], n_head, a.head_k)
        if norm is not None and not a.norm_whole and not a.norm_rotated:
            y = parts.normed(norm, y.float())
        y = parts.rotated(a.rope, y)
        if norm is not None and a.norm_rotated:
            y = parts.normed(norm, y.float())
        return y.to(parts.dtype).transpose(1, 2)

    def _kept(self, rows: Any, at: int) -> tuple[Any, Any]:
        """Keys and values that an earlier layer has left in `rows` from column `at` on, as heads."""
        a, found = self.mixer, []
        for size in (a.head_k, a.head_v):
            heads = rows[:, :, at : at + a.n_head_kv * size].reshape(*rows.shape[:2], a.n_head_kv, size)
            found.append(heads.transpose(1, 2).to(self.parts.dtype))
            at += a.n_head_kv * size
        return found[0], found[1]

    def _mask(self, n_ctx: int, span: slice, device: Any) -> Any:
        """Which positions those of `span` see: [positions, n_ctx]."""
        a, positions = self.mixer, torch.arange(n_ctx, device=device)
        distance = positions[span, None] - positions
        if not a.causal:
            return distance.abs() <= (n_ctx if a.window is None else a.window // 2)
        mask = distance >= 0 if a.window is None else (distance >= 0) & (distance < a.window)
        if a.chunk is not None:
            mask &= positions // a.chunk == positions[span, None] // a.chunk
        return mask

    def _mixed(self, q: Any, k: Any, v: Any, span: slice) -> Any:
        """What queries at positions of `span` see: [n_seq, heads, positions, head size]."""
        a, n_ctx = self.mixer, k.shape[2]
        if a.softcap is None and a.sinks is None and a.alibi is None and a.distances is None:
            plain = a.window is None and a.chunk is None
            mask: Any = None
            if not plain or (a.causal and q.shape[2] != n_ctx):
                mask = self._mask(n_ctx, span, q.device)
            causal = a.causal and mask is None
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=a.scale)
        mask = self._mask(n_ctx, span, q.device)
        far = self._by_distance(n_ctx, span, q.device)
        step = _together(q, n_ctx)
        parts = [slice(at, at + step) for at in range(0, max(1, len(q)), step)]
        return torch.cat([self._seen(q[part], k[part], v[part], mask, far) for part in parts])

    def _by_distance(self, n_ctx: int, span: slice, device: Any) -> Any:
        """What is added to scores by the distance from query to key: [heads, positions, n_ctx], or None."""
        a, positions = self.mixer, torch.arange(n_ctx, device=device)
        if a.alibi is not None:
            table = torch.from_numpy(falling(a.alibi, a.n_head, n_ctx)).to(device)
        elif a.distances is not None:
            rows = torch.from_numpy(buckets(a.distances.n_buckets, n_ctx)).to(device)
            table = self.parts.tensor(a.distances.table)[rows].t()
        else:
            return None
        return table[:, positions - positions[span, None] + n_ctx - 1]

    def _seen(self, q: Any, k: Any, v: Any, mask: Any, far: Any) -> Any:
        """Attention whose scores are bent, or have company."""
        a = self.mixer
        scores = (q @ k.transpose(2, 3)).float() * a.scale
        if far is not None:
            scores = scores + far
        if a.softcap is not None:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        scores = scores.masked_fill(~mask, -torch.inf)
        if a.sinks is None:
            return scores.softmax(3).to(v.dtype) @ v
        sinks = self.parts.tensor(a.sinks)[None, :, None, None].expand(len(q), -1, scores.shape[2], 1)
        return torch.cat([scores, sinks], dim=3).softmax(3)[..., :-1].to(v.dtype) @ v


def _together(q: Any, n_ctx: int) -> int:
    """How many sequences of queries `q` [n_seq, heads, positions, any] have their scores in memory together."""
    n_scores: int = q.shape[1] * q.shape[2] * n_ctx
    return max(1, _SCORES[q.device.type] // max(1, n_scores))


class TorchLatentAttention(TorchMixer[LatentAttention]):
    """Queries are taken to the latents, as in `attention.LatentRunner`."""

    fields = "n_head head_k head_v n_latent scale rope kv_down kv_norm k_up v_up out q n_latent_q q_down q_norm q_up"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        a = self.mixer
        return 4 * a.n_head * (a.n_latent + a.rope.n_dims) + 3 * a.n_queries

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        a, parts = self.mixer, self.parts
        queries, down = parts.products(x, a.q, a.q_down, a.kv_down)
        if a.q_up is not None:
            queries = parts.product(parts.normed(a.q_norm, queries.float()), a.q_up)
        queries = queries.view(*x.shape[:2], a.n_head, -1)
        latents = parts.normed(a.kv_norm, down[..., : a.n_latent].float()).to(parts.dtype)
        turned = parts.rotated(a.rope, queries[..., a.head_k :])[:, span].to(parts.dtype).transpose(1, 2)
        q = torch.cat([parts.stacked(a.k_up, queries[:, span, :, : a.head_k], a.n_latent), turned], 3)
        own = parts.rotated(a.rope, down[:, :, None, a.n_latent :])[:, :, 0].to(parts.dtype)
        k, v = torch.cat([latents, own], 2)[:, None], latents[:, None]
        mask: Any = None
        if q.shape[2] != x.shape[1]:
            positions = torch.arange(x.shape[1], device=x.device)
            mask = positions[span, None] >= positions
        step, seen = _together(q, x.shape[1]), []
        for at in range(0, max(1, len(q)), step):
            part = slice(at, at + step)
            keys, values = (y[part].expand(-1, a.n_head, -1, -1) for y in (k, v))
            seen.append(
                functional.scaled_dot_product_attention(
                    q[part], keys, values, attn_mask=mask, is_causal=mask is None, scale=a.scale
                )
            )
        return parts.stacked(a.v_up, torch.cat(seen).transpose(1, 2), a.head_v).transpose(1, 2).flatten(2)
