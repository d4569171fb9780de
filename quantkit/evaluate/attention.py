"""Attention: to keys and values of each head, and to latent vectors that all heads share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from quantkit.architectures.mixers import Attention, LatentAttention, RopeStyle, Temperature
from quantkit.architectures.products import NormKind
from quantkit.evaluate import activation_kernels, attention_kernels, norm_kernels
from quantkit.evaluate.mixer_runner import MixerRunner, Part, positioned
from quantkit.evaluate.rotary import rotate, unsupported_rotation
from quantkit.evaluate.threads import Each, one_by_one

_NO_BIAS = np.empty(0, np.float32)
_NO_DISTANCES = np.empty((0, 0), np.float32)
# Heads that see the latents together, in one task.
_HEADS = 16
# Numbers that queries may take when they meet the latents: 16 MB.
_MOST_QUERIES = 1 << 22


def temperatures(temperature: Temperature, positions: np.ndarray) -> np.ndarray:
    """What queries at these positions are multiplied with: float32 [positions, 1]."""
    grown = 1.0 + temperature.scale * np.log((positions + temperature.offset) // temperature.step + 1.0)
    return grown.astype(np.float32)[:, None]


# What scores gain where a key stands this far from the query, or further.
_FAR = 128


def buckets(n_buckets: int, n_positions: int) -> np.ndarray:
    """The rows of `LearnedDistances` by the distance from query to key: int64 [2 * n_positions - 1]."""
    half = n_buckets // 2
    exact = half // 2
    distance = np.arange(1 - n_positions, n_positions)
    size = np.abs(distance)
    # In float32, as T5 was trained: at the ends of ranges the last bit decides.
    logarithms = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(_FAR / exact))
    ranges = exact + (logarithms * np.float32(half - exact)).astype(np.int64)
    rows: np.ndarray = np.where(size < exact, size, np.minimum(ranges, half - 1)) + half * (distance > 0)
    return rows


@lru_cache(maxsize=2)
def falling(steepest: float, n_head: int, n_positions: int) -> np.ndarray:
    """What ALiBi adds to scores by the distance from query to key: float32 [n_head, 2 * n_positions - 1]."""
    whole = 1 << (n_head.bit_length() - 1)
    powers = [steepest * (h + 1) / whole if h < whole else steepest / 2 * (2 * (h - whole) + 1) / whole
              for h in range(n_head)]  # fmt: skip
    distance = np.abs(np.arange(1 - n_positions, n_positions))
    falling: np.ndarray = -np.exp2(-np.array(powers))[:, None] * distance
    return falling.astype(np.float32)


def side_by_side(go_on: Callable[[Part, Each], None], continued: Sequence[Part], each: Each) -> None:
    """Run `go_on` for each part: several side by side, each on one thread; what a single one is made of by `each`."""
    if len(continued) == 1:
        go_on(continued[0], each)
    else:
        each(lambda i: go_on(continued[i], one_by_one), len(continued))


class AttentionRunner(MixerRunner[Attention]):
    """Keys and values are remembered."""

    @staticmethod
    def unsupported(mixer: Attention) -> Iterable[str]:
        """See `MixerRunner`."""
        if mixer.n_head % mixer.n_head_kv:
            yield f"{mixer.n_head} heads for {mixer.n_head_kv} of keys and values"
        if mixer.window is not None and mixer.window < 1:
            yield f"a window of {mixer.window} positions"
        if mixer.softcap is not None and not mixer.softcap > 0:
            yield f"scores capped at {mixer.softcap}"
        if any(norm is not None and norm.kind is not NormKind.RMS for norm in (mixer.q_norm, mixer.k_norm)):
            yield "LayerNorms of queries and keys"
        if mixer.norm_rotated and mixer.norm_whole:
            yield "norms of whole queries and keys after rotation"
        if mixer.chunk is not None and mixer.chunk < 1:
            yield f"chunks of {mixer.chunk} positions"
        if mixer.chunk is not None and not mixer.causal:
            yield "chunks of positions where attention is not causal"
        if mixer.clamp is not None and not mixer.clamp > 0:
            yield f"queries, keys and values clamped at {mixer.clamp}"
        if mixer.v is None and mixer.qkv is None and mixer.head_k != mixer.head_v:
            yield f"values of {mixer.head_v} numbers that are keys of {mixer.head_k}"
        if ((mixer.v is None and mixer.qkv is None) or mixer.shared) and (mixer.gated or mixer.norm_rotated):
            yield "gates of heads, or norms after rotation, without a product for values"
        if mixer.gated and mixer.q is None:
            yield "gates of heads in one product with keys and values"
        if mixer.temperature is not None and not 0 < mixer.temperature.step < 1 << 62:
            yield f"queries that grow every {mixer.temperature.step} positions"
        if mixer.alibi is not None and mixer.distances is not None:
            yield "two kinds of scores by distance"
        yield from unsupported_rotation(mixer.rope, mixer.head_k)

    @staticmethod
    def memory(mixer: Attention, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        if mixer.shared is not None:
            return ()
        return (mixer.n_head_kv, n_ctx, mixer.head_k), (mixer.n_head_kv, n_ctx, mixer.head_v)

    def load(self) -> None:
        """See `MixerRunner`."""
        a, parts = self.mixer, self.parts
        queries = a.qkv or a.q
        assert queries is not None
        self.qkv, self.sinks = parts.product(queries.weight), parts.constant(a.sinks)
        self.learned = parts.constant(None if a.distances is None else a.distances.table)

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
        q, k, v, gates = self._queries_keys_values(x, continued, at)
        first, stop = span
        mixed = self.mixed(len(x), stop - first, self.mixer.width)
        if continued is None:
            k, v = self._shared(k, v, carried)
            for seq in range(len(x)):
                self._mix(q[seq], k[seq], v[seq], first, 0, mixed[seq], each)
        else:

            def go_on(part: Part, each: Each) -> None:
                (keys, values), mine = part.memory, part.rows
                if self.mixer.shared is None:
                    keys[:, part.positions], values[:, part.positions] = k[0][:, mine], v[0][:, mine]
                self._mix(q[0][:, mine], keys, values, 0, part.positions.start, mixed[0, mine], each)

            side_by_side(go_on, continued, each)
        if gates is not None:
            for seq in range(len(x)):
                activation_kernels.multiply_sigmoid(mixed[seq], gates[seq, first:stop])
        return mixed.reshape(-1, self.mixer.width)

    def _shared(self, k: np.ndarray, v: np.ndarray, carried: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [n_seq, groups, n_ctx, head size], those of another layer from `carried` if they are shared.

        What other layers will use is put into `carried` [n_seq, n_ctx, width].
        """
        a = self.mixer
        if carried is None or (a.shared is None and a.kept_at is None):
            return k, v
        at = a.kept_at if a.shared is None else a.shared.at
        for heads in (k, v):
            n_seq, groups, n_ctx, size = heads.shape
            columns = carried[:, :, at : (at or 0) + groups * size].reshape(n_seq, n_ctx, groups, size).swapaxes(1, 2)
            if a.shared is None:
                columns[:] = heads
            else:
                heads[:] = columns
            at = (at or 0) + groups * size
        return k, v

    def _mix(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, past: int, out: np.ndarray, each: Each
    ) -> None:
        """What the queries from `first` on of one sequence see: into `out` [queries, heads * head size].

        `q` is [groups, queries, heads of a group, head size], its first query at position `past`; `k` and `v` are
        [groups, positions, head size], from position 0 on. `each` runs the groups.
        """
        attention = self.mixer
        (_, _, heads, head_k), head_v, stop = q.shape, attention.head_v, past + first + len(out)
        if attention.causal:
            reach = min(stop, attention.window or stop), 0, attention.chunk or 0
        else:
            stop = k.shape[1]
            half = stop if attention.window is None else attention.window // 2
            reach = half + 1, half, 0
        cap, sinks = np.float32(attention.softcap or 0.0), self.sinks
        distances = self._by_distance(k.shape[1])

        def mix_group(group: int) -> None:
            scratch = self.parts.take("attention", attention_kernels.attention_scratch(stop, head_k, head_v))
            column = group * heads * head_v
            mine = slice(group * heads, (group + 1) * heads)
            far = _NO_DISTANCES if distances is None else distances[mine]
            attention_kernels.attention(
                q[group], k[group], v[group], first, past, reach, cap, sinks[mine], far, scratch, out, column
            )

        each(mix_group, len(q))

    def _by_distance(self, n_positions: int) -> np.ndarray | None:
        """What is added to scores by the distance from query to key: float32 [n_head, 2 * n_positions - 1], or None."""
        a = self.mixer
        if a.alibi is not None:
            return falling(a.alibi, a.n_head, n_positions)
        if a.distances is not None:
            return np.ascontiguousarray(self.learned[buckets(a.distances.n_buckets, n_positions)].T)
        return None

    def _queries_keys_values(
        self, x: np.ndarray, continued: Sequence[Part] | None, at: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """The heads of `x` [n_seq, n_ctx, n_embd], normalised and rotated, and the gates, where there are any.

        Queries are [n_seq, groups, n_ctx, heads of a group, head size], keys and values [n_seq, groups, n_ctx, head
        size], gates [n_seq, n_ctx, heads * head size]. The first row of `x` is row `at` of the batch.
        """
        attention, parts = self.mixer, self.parts
        n_seq, n_ctx, n_embd = x.shape
        groups, head_k, head_v = attention.n_head_kv, attention.head_k, attention.head_v
        heads = attention.n_head // groups
        n_q, n_k = attention.n_head * head_k, groups * head_k
        neighbours = attention.rope is not None and attention.rope.style is RopeStyle.NORMAL
        tables, one, scale = self.tables(attention.rope), np.float32(1.0), np.float32(attention.scale)
        still = np.ascontiguousarray(tables[0][:, :0])
        take = parts.take
        q, k = take("q", n_seq, groups, n_ctx, heads, head_k), take("k", n_seq, groups, n_ctx, 1, head_k)
        v = take("v", n_seq, groups, n_ctx, 1, head_v)
        gates = take("gates", n_seq, n_ctx, n_q) if attention.gated else None
        positions = np.arange(n_ctx)
        if continued is not None:
            positions = np.concatenate([np.arange(part.positions.start, part.positions.stop) for part in continued])

        def project(start: int, block: np.ndarray) -> None:
            n = len(block)
            normed = parts.normed(self.norm, block, take("normed", n, n_embd))
            qkv = parts.multiply(normed, self.qkv, take("qkv", n, len(self.qkv.matrix)), at + start)
            if attention.v is None and attention.qkv is None:
                qkv = self._with_values(qkv)
            if gates is not None:
                qkv = self._ungated(qkv, gates.reshape(-1, n_q)[start : start + n])
            if attention.clamp is not None:
                np.clip(qkv, -np.float32(attention.clamp), np.float32(attention.clamp), out=qkv)
            for norm, first, size in ((attention.q_norm, 0, n_q), (attention.k_norm, n_q, n_k)):
                if norm is not None and not attention.norm_rotated:
                    own = size if attention.norm_whole else head_k
                    weight, _ = parts.norm(norm, own)
                    norm_kernels.rms_norm_columns(qkv, first, size // own, weight, norm.eps)
            if attention.v_norm is not None and attention.shared is None:
                weight, _ = parts.norm(attention.v_norm, head_v)
                norm_kernels.rms_norm_columns(qkv, n_q + n_k, groups, weight, attention.v_norm.eps)
            if attention.temperature is not None:
                of_rows = positions[np.arange(start, start + n) % n_ctx]
                qkv[:, :n_q] *= temperatures(attention.temperature, of_rows)
            for seq, position, done, count in positioned(start, n, [n_ctx] * n_seq):
                part = qkv[done : done + count]
                factor = one if attention.norm_rotated and attention.q_norm else scale
                attention_kernels.split_heads(part, 0, *tables, position, neighbours, factor, q[seq])
                if attention.shared is not None:
                    continue
                attention_kernels.split_heads(part, n_q, *tables, position, neighbours, one, k[seq])
                attention_kernels.split_heads(part, n_q + n_k, still, still, position, neighbours, one, v[seq])

        parts.each(x.reshape(-1, n_embd), project)
        if attention.norm_rotated:
            for norm, heads_of, factor in ((attention.q_norm, q, scale), (attention.k_norm, k, one)):
                if norm is not None:
                    head_rows, (weight, _) = heads_of.reshape(-1, head_k), parts.norm(norm, head_k)
                    norm_kernels.rms_norm(head_rows, weight * factor, norm.eps, head_rows)
        return q, k[..., 0, :], v[..., 0, :], gates

    def _with_values(self, qk: np.ndarray) -> np.ndarray:
        """Rows of queries and keys with the keys once more, as values; queries alone as they are."""
        a = self.mixer
        if a.shared is not None:
            return qk
        n_q, n_k = a.n_head * a.head_k, a.n_head_kv * a.head_k
        whole = self.parts.take("qkv with values", len(qk), n_q + 2 * n_k)
        whole[:, : n_q + n_k] = qk
        whole[:, n_q + n_k :] = qk[:, n_q:]
        return whole

    def _ungated(self, qkv: np.ndarray, gates: np.ndarray) -> np.ndarray:
        """The rows of `qkv` without the gates that follow each query, which go into `gates`."""
        a = self.mixer
        n, n_q = gates.shape
        pairs = qkv[:, : 2 * n_q].reshape(n, a.n_head, 2, a.head_k)
        gates[:] = pairs[:, :, 1].reshape(n, n_q)
        plain = self.parts.take("ungated", n, qkv.shape[1] - n_q)
        plain[:, :n_q] = pairs[:, :, 0].reshape(n, n_q)
        plain[:, n_q:] = qkv[:, 2 * n_q :]
        return plain


class LatentRunner(MixerRunner[LatentAttention]):
    """Queries are taken to the latents, which are all that is remembered: keys with their rotated part, and values.

    All heads see the same ones, so `k_up` and `v_up` are applied to queries and to results, never to what is
    remembered (the absorbed form of the DeepSeek-V2 paper).
    """

    @staticmethod
    def unsupported(mixer: LatentAttention) -> Iterable[str]:
        """See `MixerRunner`."""
        if any(norm is not None and norm.kind is not NormKind.RMS for norm in (mixer.q_norm, mixer.kv_norm)):
            yield "LayerNorms of latents"
        if mixer.rope.n_dims < 2:
            yield f"latent attention with {mixer.rope.n_dims} rotated dimensions"
        yield from unsupported_rotation(mixer.rope, mixer.rope.n_dims)

    @staticmethod
    def memory(mixer: LatentAttention, n_ctx: int) -> tuple[tuple[int, ...], ...]:
        """See `MixerRunner`."""
        return (n_ctx, mixer.n_latent + mixer.rope.n_dims), (n_ctx, mixer.n_latent)

    def load(self) -> None:
        """See `MixerRunner`."""
        a, parts = self.mixer, self.parts
        self._down = parts.product(a.kv_down.weight)
        if a.q_up is not None:
            self._q_up = parts.product(a.q_up.weight)
        self._k_up, self._v_up = parts.product(a.k_up).matrix, parts.product(a.v_up).matrix

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
        a, n_ctx = self.mixer, x.shape[1]
        q, keys, values = self._queries_and_latents(x, at)
        first, stop = span
        mixed = self.mixed(len(x), stop - first, a.width)
        if continued is None:
            for seq in range(len(x)):
                row = at + seq * n_ctx + first
                self._attend(q[seq, first:stop], keys[seq], values[seq], first, mixed[seq], each, row)
            return mixed.reshape(-1, a.width)

        def go_on(part: Part, each: Each) -> None:
            rows, (held, held_values) = part.rows, part.memory
            held[part.positions], held_values[part.positions] = keys[0, rows], values[0, rows]
            self._attend(q[0, rows], held, held_values, part.positions.start, mixed[0, rows], each, at + rows.start)

        side_by_side(go_on, continued, each)
        return mixed.reshape(-1, a.width)

    def _queries_and_latents(self, x: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of `x` [n_seq, n_ctx, n_embd]: queries, their last part rotated; latents and rotated keys; latents alone.

        They are [n_seq, n_ctx, heads, head_k + rotated], [n_seq, n_ctx, n_latent + rotated], [n_seq, n_ctx, n_latent].
        """
        a, parts = self.mixer, self.parts
        n_seq, n_ctx, n_embd = x.shape
        rotated, take = a.rope.n_dims, parts.take
        size, width = a.head_k + rotated, a.n_latent + rotated
        cosines, sines = self.tables(a.rope)
        neighbours = a.rope.style is RopeStyle.NORMAL
        q, keys = take("q", n_seq, n_ctx, a.n_head, size), take("k", n_seq, n_ctx, width)
        values = take("v", n_seq, n_ctx, a.n_latent)

        def project(start: int, block: np.ndarray) -> None:
            n = len(block)
            normed = parts.normed(self.norm, block, take("normed", n, n_embd))
            down = parts.multiply(normed, self._down, take("qkv", n, len(self._down.matrix)), at + start)
            kv, queries = down[:, -width:], down[:, :-width]
            if a.q_up is not None:
                latent = take("latent", n, a.n_latent_q)
                latent[:] = queries
                parts.normed(a.q_norm, latent, latent)
                queries = parts.multiply(latent, self._q_up, take("queries", n, a.n_queries), at + start)
            rows = slice(start, start + n)
            latents = values.reshape(-1, a.n_latent)[rows]
            latents[:] = kv[:, : a.n_latent]
            parts.normed(a.kv_norm, latents, latents)
            keys.reshape(-1, width)[rows, : a.n_latent] = latents
            heads = q.reshape(-1, a.n_head, size)[rows]
            heads[:] = queries.reshape(n, a.n_head, size)
            positions = np.arange(start, start + n) % n_ctx
            c, s = cosines[positions, None], sines[positions, None]
            rotate(heads[:, :, a.head_k :], c, s, neighbours)
            turned = keys.reshape(-1, 1, width)[rows, :, a.n_latent :]
            turned[:, 0] = kv[:, a.n_latent :]
            rotate(turned, c, s, neighbours)

        parts.each(x.reshape(-1, n_embd), project)
        return q, keys, values

    def _attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, out: np.ndarray, each: Each, at: int
    ) -> None:
        """What the queries `q` [queries, heads, head_k + rotated] from `position` on see: into `out` [queries, width].

        `keys` and `values` are those from position 0 on. The first query is row `at` of the batch.
        """
        a = self.mixer
        step = max(1, _MOST_QUERIES // (a.n_head * (a.n_latent + a.rope.n_dims)))
        for start in range(0, len(q), step):
            some = slice(start, min(start + step, len(q)))
            self._attend_some(q[some], keys, values, position + start, out[some], each, at + start)

    def _attend_some(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, out: np.ndarray, each: Each, at: int
    ) -> None:
        a, parts, scale = self.mixer, self.parts, np.float32(self.mixer.scale)
        n, width = len(q), keys.shape[1]
        together = max(size for size in range(1, min(_HEADS, a.n_head) + 1) if a.n_head % size == 0)
        groups = a.n_head // together
        absorbed = parts.take("absorbed", groups, n, together, width)
        for head in range(a.n_head):
            own, part = q[:, head, : a.head_k], absorbed[head // together, :, head % together]
            parts.observe((a.k_up,), own, at, head)
            up = self._k_up[head * a.n_latent : (head + 1) * a.n_latent]
            np.matmul(own, up.T, out=part[:, : a.n_latent])
            part[:, a.n_latent :] = q[:, head, a.head_k :]
        absorbed *= scale
        stop = position + n
        reach = stop, 0, 0
        latents = parts.take("latents", n, a.n_head * a.n_latent)

        def mix_group(group: int) -> None:
            scratch = parts.take("attention", attention_kernels.attention_scratch(stop, width, a.n_latent))
            attention_kernels.attention(
                absorbed[group], keys, values, 0, position, reach, np.float32(0.0), _NO_BIAS, _NO_DISTANCES, scratch,
                latents, group * together * a.n_latent,
            )  # fmt: skip

        each(mix_group, groups)
        for head in range(a.n_head):
            own = latents[:, head * a.n_latent : (head + 1) * a.n_latent]
            parts.observe((a.v_up,), own, at, head)
            up = self._v_up[head * a.head_v : (head + 1) * a.head_v]
            np.matmul(own, up.T, out=out[:, head * a.head_v : (head + 1) * a.head_v])
