"""Mixers that read a text in order and carry a state along, through torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from quantkit.architectures.recurrent_mixers import (
    ChannelMix,
    Convolution,
    DeltaNet,
    LowRank,
    Mamba,
    Mamba2,
    ShortConvolution,
    TimeMix,
)
from quantkit.evaluate.torch_mixers import TorchMixer
from quantkit.evaluate.torch_parts import TorchParts
from quantkit.evaluate.torch_scans import convolve, recur, remember, select


def _convolved(convolution: Convolution, x: Any, parts: TorchParts) -> Any:
    """`x` [n_seq, n_ctx, channels], in float32, after `convolution`."""
    bias = None if convolution.bias is None else parts.tensor(convolution.bias)
    return convolve(x.float(), parts.tensor(convolution.kernel), bias, convolution.silu)


class TorchShortConvolution(TorchMixer[ShortConvolution]):
    """A convolution between two gates."""

    fields = "project convolution out"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 6 * self.mixer.width

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        b, c, read = self.parts.product(x, self.mixer.project).float().chunk(3, 2)
        return (_convolved(self.mixer.convolution, b * read, self.parts) * c)[:, span]


def _unit(x: Any, eps: float) -> Any:
    """`x` [..., head size] with heads of the length one."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


class TorchDeltaNet(TorchMixer[DeltaNet]):
    """Each head's matrix is corrected by what it does not know yet."""

    fields = "n_head_k n_head head_k head_v eps qkv gate convolution dt_bias decay norm out tiled beta alpha beta_alpha"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 6 * (2 * self.mixer.n_keys + 2 * self.mixer.width)

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        d, parts, sizes = self.mixer, self.parts, x.shape[:2]
        qkv, gate, *rates = parts.products(x, d.qkv, d.gate, d.beta, d.alpha, d.beta_alpha)
        mixed = _convolved(d.convolution, qkv, parts)
        q, k, v = mixed.split([d.n_keys, d.n_keys, d.width], 2)
        q, k = (_unit(y.reshape(*sizes, d.n_head_k, d.head_k).transpose(1, 2), d.eps) for y in (q, k))
        q = q / math.sqrt(d.head_k)
        shared = d.n_head // d.n_head_k
        if d.beta_alpha is None:
            beta, alpha = (rate.float() for rate in rates)
        else:
            both = rates[0].float().view(*sizes, d.n_head_k, 2, shared)
            beta, alpha = both[:, :, :, 0].flatten(2), both[:, :, :, 1].flatten(2)
        log_decay = functional.softplus(alpha + parts.tensor(d.dt_bias)) * parts.tensor(d.decay)
        log_decay, share = (self._grouped(y)[..., 0] for y in (log_decay, beta.sigmoid()))
        out = recur(q, k, self._grouped(v), log_decay, share, True)
        # From [n_seq, groups, heads of a group, n_ctx, numbers] to heads in their order.
        out = out[..., span, :].permute(0, 3, 2, 1, 4) if d.tiled else out[..., span, :].permute(0, 3, 1, 2, 4)
        out = parts.normed(d.norm, out.reshape(*out.shape[:2], d.n_head, d.head_v)).flatten(2)
        return out * functional.silu(gate[:, span].float())

    def _grouped(self, y: Any) -> Any:
        """What there is for each head of values, as [n_seq, heads of keys, heads that share them, n_ctx, numbers]."""
        d, shared = self.mixer, self.mixer.n_head // self.mixer.n_head_k
        if d.tiled:
            return y.reshape(*y.shape[:2], shared, d.n_head_k, -1).permute(0, 3, 2, 1, 4)
        return y.reshape(*y.shape[:2], d.n_head_k, shared, -1).permute(0, 2, 3, 1, 4)


class TorchMamba(TorchMixer[Mamba]):
    """A state for each channel."""

    fields = "n_channels n_state n_step project convolution select step decay skip out step_norm b_norm c_norm"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 9 * self.mixer.n_channels

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        m, parts = self.mixer, self.parts
        read, gate = parts.product(x, m.project).chunk(2, 2)
        read = _convolved(m.convolution, read, parts)
        chosen = parts.product(read, m.select).float().split([m.n_step, m.n_state, m.n_state], 2)
        low, b, c = (
            parts.normed(norm, piece)
            for (norm, _), piece in zip(m.norms, chosen, strict=True)
        )  # fmt: skip
        steps = functional.softplus(parts.product(low, m.step).float())
        made = select(read, steps, parts.tensor(m.decay), b, c) + read * parts.tensor(m.skip)
        return made[:, span] * functional.silu(gate[:, span].float())


class TorchMamba2(TorchMixer[Mamba2]):
    """A matrix for each head, which decays at one rate."""

    fields = "n_head n_groups head n_state project convolution dt_bias decay skip out norm"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 6 * (self.mixer.convolution.n_channels + self.mixer.width)

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        m, parts, sizes = self.mixer, self.parts, x.shape[:2]
        n_keys = m.n_groups * m.n_state
        gate, mixed, steps = parts.product(x, m.project).split([m.width, m.convolution.n_channels, m.n_head], 2)
        read, *keys = _convolved(m.convolution, mixed, parts).split([m.width, n_keys, n_keys], 2)
        b, c = (y.reshape(*sizes, m.n_groups, m.n_state).transpose(1, 2) for y in keys)
        share = functional.softplus(steps.float() + parts.tensor(m.dt_bias))
        log_decay = share * parts.tensor(m.decay)[:, 0]
        heads = read.reshape(*sizes, m.n_groups, m.n_head // m.n_groups, m.head)
        v, log_decay, share = (
            y.reshape(*heads.shape[:4], -1).permute(0, 2, 3, 1, 4) for y in (heads, log_decay, share)
        )
        made = recur(c, b, v, log_decay[..., 0], share[..., 0], False)
        made = made[..., span, :].permute(0, 3, 1, 2, 4).reshape(sizes[0], -1, m.n_head, m.head)
        made = made + read[:, span].reshape(made.shape) * parts.tensor(m.skip)
        made = made.flatten(2) * functional.silu(gate[:, span].float())
        if m.norm is None:
            return made
        grouped = made.view(*made.shape[:2], m.n_groups, -1)
        weight = None if m.norm.weight is None else parts.tensor(m.norm.weight)
        normed = functional.rms_norm(grouped, grouped.shape[3:], None, m.norm.eps)
        return (normed if weight is None else normed * weight).flatten(2)


def _shift(x: Any) -> Any:
    """How much each row of `x` [n_seq, n_ctx, columns] lacks of the one before it; there are zeros before the first."""
    return functional.pad(x, (0, 0, 1, 0))[:, :-1] - x


class TorchTimeMix(TorchMixer[TimeMix]):
    """RWKV 7's memory."""

    fields = "n_head head lerp receptance key value out decay rate gate values key_scale key_rate bonus norm values_at"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 24 * self.mixer.width

    def _through(self, part: LowRank, x: Any, between: Any = None) -> Any:
        """What the two matrices of `part` make of `x`."""
        few = self.parts.product(x, part.down).float()
        made = self.parts.product(few if between is None else between(few), part.up).float()
        return made if part.bias is None else made + self.parts.tensor(part.bias)

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        m, parts, sizes = self.mixer, self.parts, x.shape[:2]
        shift = _shift(x)
        r_in, w_in, k_in, v_in, a_in, g_in = (x + shift * mixture for mixture in parts.tensor(m.lerp))
        r, k, v = (
            parts.product(read, linear).float()
            for read, linear in ((r_in, m.receptance), (k_in, m.key), (v_in, m.value))
        )
        log_decay = self._through(m.decay, w_in, torch.tanh).sigmoid() * -math.exp(-0.5)
        if m.values is None:
            kept[m.values_at] = v
        else:
            first = rows[:, :, m.values_at : m.values_at + m.width]
            v = v + (first - v) * self._through(m.values, v_in).sigmoid()
        rate = self._through(m.rate, a_in).sigmoid()
        unit = functional.normalize((k * parts.tensor(m.key_scale)).view(*sizes, m.n_head, m.head), dim=3, eps=1e-12)
        unit = unit.flatten(2)
        k = k * (1 + (rate - 1) * parts.tensor(m.key_rate))
        seen = remember(
            *(y.view(*sizes, m.n_head, m.head).transpose(1, 2) for y in (r, log_decay, k, v, unit, unit * rate))
        )
        seen = functional.layer_norm(seen.transpose(1, 2)[:, span], (m.head,), None, None, m.norm.eps).flatten(2)
        assert m.norm.weight is not None and m.norm.bias is not None
        seen = seen * parts.tensor(m.norm.weight) + parts.tensor(m.norm.bias)
        heads = sizes[0], -1, m.n_head, m.head
        bonus = (r * k * parts.tensor(m.bonus))[:, span].reshape(heads).sum(3, keepdim=True)
        seen = seen + (bonus * v[:, span].reshape(heads)).flatten(2)
        return seen * self._through(m.gate, g_in, torch.sigmoid)[:, span]


class TorchChannelMix(TorchMixer[ChannelMix]):
    """RWKV's feed-forward block."""

    fields = "n_embd n_ff lerp key out"

    @property
    def numbers(self) -> int:
        """See `TorchMixer`."""
        return 2 * self.mixer.n_ff + 2 * self.mixer.n_embd

    def run(self, x: Any, span: slice, rows: Any, kept: dict[int, Any]) -> Any:
        """See `TorchMixer`."""
        read = x + _shift(x) * self.parts.tensor(self.mixer.lerp)
        return functional.relu(self.parts.product(read[:, span], self.mixer.key)).square()
