"""Rows that hold more than a layer works on: several streams, embeddings for each layer, keys that layers share.

A layer takes one stream out of the rows, works on it as any other does, and what it has made is put back.
"""

from __future__ import annotations

import math

import numpy as np

from quantkit.architectures.forward import AltUp, ForwardSpec, Layer, SideEmbedding, SideInput, Streams
from quantkit.architectures.products import Norm
from quantkit.evaluate import activation_kernels, norm_kernels
from quantkit.evaluate.parts import Parts, Product
from quantkit.evaluate.threads import Each
from quantkit.evaluate.weights import Weights

# What a mean square is at least where something is divided by its root, as in transformers.
LEAST = 1e-5


def is_wide(spec: ForwardSpec, layer: Layer) -> bool:
    """Whether something happens around `layer`, or rows hold more than its stream."""
    return spec.width != spec.n_embd or layer.out_scale is not None


def widened(spec: ForwardSpec, weights: Weights, tokens: np.ndarray, x: np.ndarray, each: Each) -> np.ndarray:
    """Rows [n_seq, n, width] for the first layer, of `tokens` [n_seq, n] with the embeddings `x` [n_seq, n, n_embd].

    `each` runs what is made of single sequences.
    """
    if spec.width == spec.n_embd:
        return x
    n_embd, side, streams = spec.n_embd, spec.side, spec.streams
    rows = np.zeros((*tokens.shape, spec.width), np.float32)
    rows[..., :n_embd] = x
    at = n_embd
    if streams is not None:
        spread = _square(spec, weights, streams.spread)

        def begin(seq: int) -> None:
            for i, matrix in enumerate(spread, 1):
                rows[seq, :, i * n_embd : (i + 1) * n_embd] = _as_long_as(x[seq] @ matrix.T, x[seq])

        each(begin, len(x))
        at *= streams.count
    if side is not None:
        n_all = len(spec.layers) * side.size
        project = weights.matrix("side", [(side.project.weight, n_all)], n_embd)
        weight = weights.vector(_weight_of(side.norm), side.size)
        own = weights.lookup(side.table, tokens, n_all)

        def embed(seq: int) -> None:
            made = x[seq] @ project.T * np.float32(1 / math.sqrt(n_embd))
            rows[seq, :, at : at + n_all] = _side_rows(side, made, weight, own[seq])

        each(embed, len(x))
    return rows


def _weight_of(norm: Norm) -> str:
    assert norm.weight is not None
    return norm.weight


def _side_rows(side: SideEmbedding, made: np.ndarray, weight: np.ndarray, own: np.ndarray) -> np.ndarray:
    """What all layers get of some tokens: `made` [n, all] of their embeddings, and `own` [n, all] from the table."""
    normed = np.ascontiguousarray(made).reshape(-1, side.size)
    norm_kernels.rms_norm(normed, weight, side.norm.eps, normed)
    normed += own.reshape(normed.shape) * np.float32(math.sqrt(side.size))
    normed *= np.float32(1 / math.sqrt(2))
    return normed.reshape(made.shape)


def _square(spec: ForwardSpec, weights: Weights, name: str) -> list[np.ndarray]:
    """The matrices [n_embd, n_embd] of tensor `name`, one for each stream but the first."""
    assert spec.streams is not None
    n = spec.streams.count - 1
    whole = weights.matrix("streams", [(name, n * spec.n_embd)], spec.n_embd)
    return [whole[i * spec.n_embd : (i + 1) * spec.n_embd] for i in range(n)]


def _as_long_as(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The rows of `made` brought to the lengths of those of `wanted`."""
    length = np.sqrt(np.mean(np.square(wanted), axis=-1, keepdims=True))
    own = np.sqrt(np.maximum(np.mean(np.square(made), axis=-1, keepdims=True), np.float32(LEAST)))
    result: np.ndarray = made * (length / own)
    return result


def merged(spec: ForwardSpec, weights: Weights, rows: np.ndarray, each: Each) -> np.ndarray:
    """The one vector of each token that the output norm reads: [n_seq, n, width] to [n_seq, n, n_embd]."""
    if spec.width == spec.n_embd:
        return rows
    n_embd, streams = spec.n_embd, spec.streams
    result = np.array(rows[..., :n_embd], order="C")
    if streams is None:
        return result
    merge = _square(spec, weights, streams.merge)

    def end(seq: int) -> None:
        active = rows[seq, :, streams.active * n_embd : (streams.active + 1) * n_embd]
        for i, matrix in enumerate(merge, 1):
            result[seq] += _as_long_as(rows[seq, :, i * n_embd : (i + 1) * n_embd] @ matrix.T, active)
        result[seq] /= np.float32(streams.count)

    each(end, len(rows))
    return result


class Around:
    """What happens around a layer, with its weights decoded; `parts` are the layer's."""

    def __init__(self, spec: ForwardSpec, layer: Layer, parts: Parts) -> None:
        n = spec.n_embd
        self._layer, self._parts, self._streams, self._n_embd = layer, parts, spec.streams, n
        if layer.side is not None:
            self._gate, self._out = parts.product(layer.side.gate.weight), parts.product(layer.side.out.weight)
        if (altup := layer.altup) is not None:
            self._router, self._predict, self._correct, self._scale = (
                parts.constant(name) for name in (altup.router, altup.predict, altup.correct, altup.scale)
            )
        self._out_scale = parts.constant(layer.out_scale)

    def enter(self, rows: np.ndarray, active: np.ndarray) -> None:
        """Put into `active` [n, n_embd] what the layer works on of `rows` [n, width], which AltUp predicts first."""
        streams, altup, n_embd = self._streams, self._layer.altup, self._n_embd
        for start, block in self._parts.blocks(rows):
            to = active[start : start + len(block)]
            if altup is None or streams is None:
                to[:] = block[:, :n_embd]
                continue
            own = slice(streams.active * n_embd, (streams.active + 1) * n_embd)
            to[:] = block[:, own]
            coefficients = self._modalities(altup, to) @ self._predict.T
            side_by_side = block[:, : streams.count * n_embd].reshape(len(block), streams.count, n_embd)
            side_by_side += np.matmul(coefficients.reshape(-1, streams.count, streams.count), side_by_side)
            to[:] = block[:, own]

    def leave(self, active: np.ndarray, rows: np.ndarray, at: int) -> None:
        """Put what the layer has made, `active`, back into `rows`, the first of which is row `at` of the batch."""
        streams, layer, n_embd = self._streams, self._layer, self._n_embd
        for start, block in self._parts.blocks(rows):
            made = active[start : start + len(block)]
            if layer.altup is None or streams is None:
                if layer.side is not None:
                    made += self._own(layer.side, made, block, at + start)
                if layer.out_scale is not None:
                    made *= self._out_scale
                block[:, :n_embd] = made
                continue
            own = slice(streams.active * n_embd, (streams.active + 1) * n_embd)
            side_by_side = block[:, : streams.count * n_embd].reshape(len(block), streams.count, n_embd)
            coefficients = self._modalities(layer.altup, made) @ self._correct.T + np.float32(1.0)
            side_by_side += coefficients[:, :, None] * (made - block[:, own])[:, None]
            if layer.side is not None:
                side_by_side[:, 1:] += self._own(layer.side, block[:, own] * self._scale, block, at + start)[:, None]

    def _modalities(self, altup: AltUp, x: np.ndarray) -> np.ndarray:
        """A number from -1 to 1 for each stream, of the rows of `x`."""
        normed = self._parts.normed(altup.router_norm, x, self._parts.take("modalities", *x.shape))
        normed *= np.float32(1.0 / self._n_embd)
        result: np.ndarray = np.tanh(normed @ self._router.T)
        return result

    def _own(self, side: SideInput, x: np.ndarray, rows: np.ndarray, at: int) -> np.ndarray:
        """What the layer's own embeddings, in `rows`, add to `x`."""
        take, n = self._parts.take, len(x)
        gate = self._times(x, self._gate, "side gate", at)
        activation_kernels.gelu(gate, gate)
        gate *= rows[:, side.at : side.at + side.size]
        made = self._times(gate, self._out, "side out", at)
        return self._parts.normed(side.norm, made, take("side normed", n, self._n_embd))

    def _times(self, x: np.ndarray, product: Product, role: str, at: int) -> np.ndarray:
        return self._parts.multiply(x, product, self._parts.take(role, len(x), len(product.matrix)), at)


def unsupported(streams: Streams | None) -> str | None:
    """What of several streams cannot be, in words."""
    if streams is not None and not 0 <= streams.active < streams.count:
        return f"stream {streams.active} of {streams.count}"
    return None
