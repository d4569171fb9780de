"""Mixers that read a text in order and carry a state along: short convolutions, gated delta nets, state spaces.

Their work is cut by rows as that of all layers is; the state goes from one block of rows to the next.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from quantkit.architectures.mixers import Mixer
from quantkit.architectures.products import NormKind
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
from quantkit.evaluate import activation_kernels, norm_kernels, recurrent_kernels
from quantkit.evaluate.mixer_runner import Memory, MixerRunner, Part, positioned
from quantkit.evaluate.parts import Parts, Product
from quantkit.evaluate.threads import Each, one_by_one

R = TypeVar("R", bound=Mixer)
# Fewer rows than this go through a recurrence on one thread: they are over before threads have met.
_FEW_ROWS = 16
# Channels of a state space that one task takes through a text.
_CHANNELS = 512


class RecurrentRunner(MixerRunner[R]):
    """What recurrent mixers share. `project` is the first product of each row."""

    project: Product

    def projected(self, normed: np.ndarray, at: int) -> np.ndarray:
        """What `step` reads of rows, which are normalised; the first is row `at` of the batch."""
        return self.parts.multiply(
            normed, self.project, self.parts.take("projected", len(normed), len(self.project.matrix)), at
        )

    @abstractmethod
    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """Read `rows` [n, any], which follow what `state` holds, and change it: into `out` [n, width].

        The first row is row `at` of the batch. `own` [n, width of the model's rows] are the rows that these were made
        of, where they hold more.
        """

    def run(
        self,
        x: np.ndarray,
        span: tuple[int, int],
        each: Each,
        at: int,
        continued: Sequence[Part] | None,
        carried: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `MixerRunner`."""
        n_seq, n_ctx, _ = x.shape
        width, take = self.mixer.width, self.parts.take
        first, stop = span
        mixed = self.mixed(n_seq, stop - first, width)
        if continued is None:
            lengths = [n_ctx] * n_seq
            shapes = self.memory(self.mixer, n_ctx)
            states = [tuple(take(f"state {self.index} {i}", *shape) for i, shape in enumerate(shapes))] * n_seq
        else:
            lengths = [part.rows.stop - part.rows.start for part in continued]
            states = [part.memory for part in continued]
        whole = None if carried is None else carried.reshape(-1, carried.shape[2])
        for start, normed in self.normed_blocks(x.reshape(-1, x.shape[2])):
            n = len(normed)
            rows = self.projected(normed, at + start)
            for seq, begin, done, count in positioned(start, n, lengths):
                if continued is None and begin == 0:
                    for part in states[seq]:
                        part[:] = 0
                out = take("stepped", count, width)
                within = each if count >= _FEW_ROWS else one_by_one
                own = None if whole is None else whole[start + done : start + done + count]
                self.step(rows[done : done + count], states[seq], out, within, at + start + done, own)
                where = (seq, begin) if continued is None else (0, start + done)
                wanted = slice(max(first, where[1]), min(stop, where[1] + count))
                if wanted.start < wanted.stop:
                    mixed[where[0], wanted.start - first : wanted.stop - first] = out[
                        wanted.start - where[1] : wanted.stop - where[1]
                    ]
        return mixed.reshape(-1, width)


class Taps:
    """A causal convolution of each channel, its weights decoded."""

    def __init__(self, convolution: Convolution, parts: Parts) -> None:
        self._convolution = convolution
        self._taps = np.ascontiguousarray(parts.constant(convolution.kernel).T)
        self._bias = np.zeros(convolution.n_channels, np.float32)
        if convolution.bias is not None:
            self._bias = parts.constant(convolution.bias)

    @staticmethod
    def memory(convolution: Convolution) -> tuple[int, int]:
        """The shape of the rows before, which are remembered."""
        return convolution.size - 1, convolution.n_channels

    def __call__(self, x: np.ndarray, before: np.ndarray, out: np.ndarray) -> None:
        """Convolve the rows of `x` [n, channels], which follow those of `before`, into `out`; `before` moves on."""
        recurrent_kernels.convolve(x, before, self._taps, self._bias, self._convolution.silu, out)
        kept = len(before)
        if len(x) >= kept:
            before[:] = x[len(x) - kept :]
        else:
            before[: kept - len(x)] = before[len(x) :].copy()
            before[kept - len(x) :] = x


class ShortConvolutionRunner(RecurrentRunner[ShortConvolution]):
    """The last products of the first two parts are remembered."""

    @staticmethod
    def unsupported(mixer: ShortConvolution) -> Iterable[str]:
        """See `MixerRunner`."""
        yield from ()

    @staticmethod
    def memory(mixer: ShortConvolution, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return (Taps.memory(mixer.convolution),)

    def load(self) -> None:
        """See `MixerRunner`."""
        self.project = self.parts.product(self.mixer.project.weight)
        self._taps = Taps(self.mixer.convolution, self.parts)

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        n, width = out.shape
        gated = self.parts.take("gated", n, width)
        np.multiply(rows[:, :width], rows[:, 2 * width :], out=gated)
        self._taps(gated, state[0], out)
        out *= rows[:, width : 2 * width]


def _softplus(x: np.ndarray) -> np.ndarray:
    """ln(1 + e^x)."""
    result: np.ndarray = np.logaddexp(np.float32(0.0), x)
    return result


class DeltaNetRunner(RecurrentRunner[DeltaNet]):
    """The rows before that the convolution reads are remembered, and each head's matrix."""

    @staticmethod
    def unsupported(mixer: DeltaNet) -> Iterable[str]:
        """See `MixerRunner`."""
        if mixer.n_head % mixer.n_head_k:
            yield f"{mixer.n_head} heads of values for {mixer.n_head_k} of keys"
        if mixer.norm.kind is not NormKind.RMS:
            yield "LayerNorms of the results of a delta net"

    @staticmethod
    def memory(mixer: DeltaNet, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return Taps.memory(mixer.convolution), (mixer.n_head, mixer.head_k, mixer.head_v)

    def load(self) -> None:
        """See `MixerRunner`."""
        d, parts = self.mixer, self.parts
        self.project = parts.product(d.qkv.weight)
        self._taps = Taps(d.convolution, parts)
        self._bias, self._decay = parts.constant(d.dt_bias), parts.constant(d.decay)

    def _rates(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each head forgets and learns, float32 [n, heads] each, of what the products made of `rows`."""
        d, n = self.mixer, len(rows)
        shared = d.n_head // d.n_head_k
        if d.beta_alpha is None:
            beta, alpha = rows[:, : d.n_head], rows[:, d.n_head :]
        else:
            both = rows.reshape(n, d.n_head_k, 2, shared)
            beta, alpha = both[:, :, 0].reshape(n, -1), both[:, :, 1].reshape(n, -1)
        decay = np.exp(_softplus(alpha + self._bias) * self._decay)
        return decay, np.float32(1.0) / (np.float32(1.0) + np.exp(-beta))

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        d, take, n = self.mixer, self.parts.take, len(rows)
        n_channels = 2 * d.n_keys + d.width
        plain, mixed = take("plain", n, n_channels), take("convolved", n, n_channels)
        plain[:] = rows[:, :n_channels]
        self._taps(plain, state[0], mixed)
        # Divided by the root of the mean square, and then by that of the size, which is by the length.
        length = np.full(d.head_k, 1.0 / math.sqrt(d.head_k), np.float32)
        for first, weight in ((0, length * length[0]), (d.n_keys, length)):
            norm_kernels.rms_norm_columns(mixed, first, d.n_head_k, weight, d.eps / d.head_k)
        decay, share = self._rates(rows[:, n_channels + d.width :])
        shared = d.n_head // d.n_head_k

        def read(head: int) -> None:
            keys = (head % d.n_head_k if d.tiled else head // shared) * d.head_k
            places = keys, d.n_keys + keys, 2 * d.n_keys + head * d.head_v
            scratch = take("tile", (d.head_k + 2) * recurrent_kernels.TILE)
            recurrent_kernels.recur(
                mixed, places, decay, share, head, True, state[1][head], scratch, out, head * d.head_v
            )

        each(read, d.n_head)
        weight, _ = self.parts.norm(d.norm, d.head_v)
        norm_kernels.rms_norm_columns(out, 0, d.n_head, weight, d.norm.eps)
        gate = take("gate", n, d.width)
        gate[:] = rows[:, n_channels : n_channels + d.width]
        recurrent_kernels.multiply_silu(out, gate)


class MambaRunner(RecurrentRunner[Mamba]):
    """The rows before that the convolution reads are remembered, and the state of each channel."""

    @staticmethod
    def unsupported(mixer: Mamba) -> Iterable[str]:
        """See `MixerRunner`."""
        norms = (mixer.step_norm, mixer.b_norm, mixer.c_norm)
        if any(norm is not None and norm.kind is not NormKind.RMS for norm in norms):
            yield "LayerNorms within a state space"

    @staticmethod
    def memory(mixer: Mamba, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return Taps.memory(mixer.convolution), (mixer.n_state, mixer.n_channels)

    def load(self) -> None:
        """See `MixerRunner`."""
        m, parts = self.mixer, self.parts
        self.project, self._select, self._step = (
            parts.product(linear.weight) for linear in (m.project, m.select, m.step)
        )
        self._taps = Taps(m.convolution, parts)
        self._decay, self._skip = np.ascontiguousarray(parts.constant(m.decay).T), parts.constant(m.skip)

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        m, parts, take, n = self.mixer, self.parts, self.parts.take, len(rows)
        plain, x = take("plain", n, m.n_channels), take("convolved", n, m.n_channels)
        plain[:] = rows[:, : m.n_channels]
        self._taps(plain, state[0], x)
        chosen = parts.multiply(x, self._select, take("selected", n, m.n_step + 2 * m.n_state), at)
        pieces, first = [], 0
        for norm, size in m.norms:
            piece = take(f"selected {first}", n, size)
            piece[:] = chosen[:, first : first + size]
            pieces.append(parts.normed(norm, piece, piece))
            first += size
        low, b, c = pieces
        steps = parts.multiply(low, self._step, take("steps", n, m.n_channels), at)
        steps[:] = _softplus(steps)

        def read(part: int) -> None:
            span = part * _CHANNELS, min((part + 1) * _CHANNELS, m.n_channels)
            recurrent_kernels.select(x, steps, self._decay, b, c, span, state[1], out)

        each(read, -(-m.n_channels // _CHANNELS))
        x *= self._skip
        out += x
        gate = take("gate", n, m.n_channels)
        gate[:] = rows[:, m.n_channels :]
        recurrent_kernels.multiply_silu(out, gate)


class Mamba2Runner(RecurrentRunner[Mamba2]):
    """The rows before that the convolution reads are remembered, and each head's matrix."""

    @staticmethod
    def unsupported(mixer: Mamba2) -> Iterable[str]:
        """See `MixerRunner`."""
        if mixer.n_head % mixer.n_groups:
            yield f"{mixer.n_head} heads of a state space in {mixer.n_groups} groups"
        if mixer.norm is not None and mixer.norm.kind is not NormKind.RMS:
            yield "LayerNorms of the results of a state space"

    @staticmethod
    def memory(mixer: Mamba2, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return Taps.memory(mixer.convolution), (mixer.n_head, mixer.n_state, mixer.head)

    def load(self) -> None:
        """See `MixerRunner`."""
        m, parts = self.mixer, self.parts
        self.project = parts.product(m.project.weight)
        self._taps = Taps(m.convolution, parts)
        self._bias, self._decay = parts.constant(m.dt_bias), parts.constant(m.decay)[:, 0]
        self._skip = parts.constant(m.skip)
        if m.norm is not None and m.norm.weight is not None:
            self._norm = parts.constant(m.norm.weight).reshape(-1)

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        m, take, n, width = self.mixer, self.parts.take, len(rows), self.mixer.width
        n_channels, n_keys = m.convolution.n_channels, m.n_groups * m.n_state
        plain, mixed = take("plain", n, n_channels), take("convolved", n, n_channels)
        plain[:] = rows[:, width : width + n_channels]
        self._taps(plain, state[0], mixed)
        share = _softplus(rows[:, width + n_channels :] + self._bias)
        decay = np.exp(share * self._decay)

        def read(head: int) -> None:
            keys = width + head // (m.n_head // m.n_groups) * m.n_state
            scratch = take("tile", (m.n_state + 2) * recurrent_kernels.TILE)
            recurrent_kernels.recur(
                mixed, (keys + n_keys, keys, head * m.head), decay, share, head, False, state[1][head], scratch, out,
                head * m.head,
            )  # fmt: skip

        each(read, m.n_head)
        heads = (n, m.n_head, m.head)
        out.reshape(heads)[:] += mixed[:, :width].reshape(heads) * self._skip
        gate = take("gate", n, width)
        gate[:] = rows[:, :width]
        recurrent_kernels.multiply_silu(out, gate)
        if m.norm is not None:
            even = np.ones(width // m.n_groups, np.float32)
            norm_kernels.rms_norm_columns(out, 0, m.n_groups, even, m.norm.eps)
            if m.norm.weight is not None:
                out *= self._norm


def _shifted(rows: np.ndarray, before: np.ndarray, out: np.ndarray) -> np.ndarray:
    """How much each of `rows` [n, columns] lacks of the one before it, into `out`; `before` [1, columns] moves on."""
    out[0] = before[0]
    out[1:] = rows[:-1]
    out -= rows
    before[0] = rows[-1]
    return out


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.float32(1.0) / (np.float32(1.0) + np.exp(-x))
    return result


class TimeMixRunner(RecurrentRunner[TimeMix]):
    """The last token is remembered, as it was read, and each head's matrix."""

    @staticmethod
    def unsupported(mixer: TimeMix) -> Iterable[str]:
        """See `MixerRunner`."""
        if mixer.norm.kind is not NormKind.LAYER:
            yield "RMS norms of what RWKV remembers"

    @staticmethod
    def memory(mixer: TimeMix, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return (1, mixer.width), (mixer.n_head, mixer.head, mixer.head)

    def load(self) -> None:
        """See `MixerRunner`."""
        m, parts = self.mixer, self.parts
        self._lerp, self._key_scale, self._key_rate, self._bonus = (
            parts.constant(name) for name in (m.lerp, m.key_scale, m.key_rate, m.bonus)
        )
        self._made = [parts.product(linear.weight) for linear in (m.receptance, m.key, m.value)]
        self._norm, self._norm_bias = parts.norm(m.norm, m.width)

    def _through(
        self, part: LowRank, x: np.ndarray, at: int, between: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """What the two matrices of `part` make of `x`, whose first row is row `at` of the batch."""
        down, up = self.parts.product(part.down.weight), self.parts.product(part.up.weight)
        self.parts.observe(down.names, x, at)
        few = x @ down.matrix.T
        few = few if between is None else between(few)
        self.parts.observe(up.names, few, at)
        made: np.ndarray = few @ up.matrix.T
        if part.bias is not None:
            made += self.parts.constant(part.bias)
        return made

    def projected(self, normed: np.ndarray, at: int) -> np.ndarray:
        """See `RecurrentRunner`: rows as they are."""
        return normed

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        m, take, n = self.mixer, self.parts.take, len(rows)
        shift = _shifted(rows, state[0], take("shift", *rows.shape))
        r_in, w_in, k_in, v_in, a_in, g_in = (rows + shift * mixture for mixture in self._lerp)
        r, k, v = (
            self.parts.multiply(read, product, take(f"made {i}", n, m.width), at)
            for i, (read, product) in enumerate(zip((r_in, k_in, v_in), self._made, strict=True))
        )
        decay = np.exp(_sigmoid(self._through(m.decay, w_in, at, np.tanh)) * np.float32(-math.exp(-0.5)))
        assert own is not None
        first = own[:, m.values_at : m.values_at + m.width]
        if m.values is None:
            first[:] = v
        else:
            v += (first - v) * _sigmoid(self._through(m.values, v_in, at))
        rate = _sigmoid(self._through(m.rate, a_in, at))
        heads = n, m.n_head, m.head
        unit = (k * self._key_scale).reshape(heads)
        unit /= np.maximum(np.sqrt(np.square(unit).sum(2, keepdims=True)), np.float32(1e-12))
        k *= np.float32(1.0) + (rate - np.float32(1.0)) * self._key_rate
        learned = np.ascontiguousarray(unit.reshape(n, m.width) * rate)
        unit = unit.reshape(n, m.width)

        def read(head: int) -> None:
            scratch = take("seen", m.head)
            recurrent_kernels.remember(r, decay, k, v, unit, learned, head * m.head, state[1][head], scratch, out)

        each(read, m.n_head)
        grouped = out.reshape(heads)
        grouped -= grouped.mean(2, keepdims=True)
        grouped /= np.sqrt(np.square(grouped).mean(2, keepdims=True) + np.float32(m.norm.eps))
        out *= self._norm
        if self._norm_bias is not None:
            out += self._norm_bias
        bonus = (r * k * self._bonus).reshape(heads).sum(2, keepdims=True)
        grouped += bonus * v.reshape(heads)
        out *= self._through(m.gate, g_in, at, _sigmoid)


class ChannelMixRunner(RecurrentRunner[ChannelMix]):
    """The last token is remembered, as it was read."""

    @staticmethod
    def unsupported(mixer: ChannelMix) -> Iterable[str]:
        """See `MixerRunner`."""
        yield from ()

    @staticmethod
    def memory(mixer: ChannelMix, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return ((1, mixer.n_embd),)

    def load(self) -> None:
        """See `MixerRunner`."""
        self._lerp, self._key = self.parts.constant(self.mixer.lerp), self.parts.product(self.mixer.key.weight)

    def projected(self, normed: np.ndarray, at: int) -> np.ndarray:
        """See `RecurrentRunner`: rows as they are."""
        return normed

    def step(
        self, rows: np.ndarray, state: Memory, out: np.ndarray, each: Each, at: int, own: np.ndarray | None = None
    ) -> None:
        """See `RecurrentRunner`."""
        shift = _shifted(rows, state[0], self.parts.take("shift", *rows.shape))
        shift *= self._lerp
        shift += rows
        made = self.parts.multiply(shift, self._key, self.parts.take("channels", *out.shape), at)
        activation_kernels.relu_squared(made, out)
