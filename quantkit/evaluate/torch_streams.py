"""Rows that hold more than a layer works on, through torch: see `streams`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from quantkit.architectures.forward import AltUp, ForwardSpec, Layer, SideInput
from quantkit.architectures.products import Products
from quantkit.evaluate.streams import LEAST
from quantkit.evaluate.torch_parts import TorchParts
from quantkit.evaluate.torch_weights import Loading


def load_streams(spec: ForwardSpec, to: Loading) -> None:
    """Ask for what `widened` and `merged` read, but for the table of embeddings for each layer."""
    n_embd, side, streams = spec.n_embd, spec.side, spec.streams
    if streams is not None:
        for name in (streams.spread, streams.merge):
            to.matrix(name, (streams.count - 1) * n_embd, n_embd)
    if side is not None:
        to.products(Products.of(n_embd, (side.project, len(spec.layers) * side.size)))
        to.norm(side.norm, side.size)


def widened(spec: ForwardSpec, parts: TorchParts, x: Any, own: Any) -> Any:
    """Rows [n_seq, n, width] for the first layer, of embeddings `x` [n_seq, n, n_embd].

    `own` [n_seq, n, all] are those of all layers, where there are any.
    """
    if spec.width == spec.n_embd:
        return x
    side, streams, pieces = spec.side, spec.streams, [x]
    if streams is not None:
        for matrix in _square(spec, parts, streams.spread):
            pieces.append(_as_long_as(parts.times(x.to(parts.dtype), matrix).float(), x))
    if side is not None:
        made = parts.times(x.to(parts.dtype), parts.tensor(side.project.weight)).float() / math.sqrt(spec.n_embd)
        normed = parts.normed(side.norm, made.view(*made.shape[:2], -1, side.size)).flatten(2)
        pieces.append((normed + own * math.sqrt(side.size)) / math.sqrt(2))
    if spec.n_kept:
        pieces.append(x.new_zeros(*x.shape[:2], spec.n_kept))
    return torch.cat(pieces, 2)


def merged(spec: ForwardSpec, parts: TorchParts, rows: Any) -> Any:
    """The one vector of each token that the output norm reads: [..., width] to [..., n_embd]."""
    n_embd, streams = spec.n_embd, spec.streams
    result = rows[..., :n_embd]
    if streams is None:
        return result
    active = rows[..., streams.active * n_embd : (streams.active + 1) * n_embd]
    for i, matrix in enumerate(_square(spec, parts, streams.merge), 1):
        own = rows[..., i * n_embd : (i + 1) * n_embd]
        result = result + _as_long_as(parts.times(own.to(parts.dtype), matrix).float(), active)
    return result / streams.count


def _square(spec: ForwardSpec, parts: TorchParts, name: str) -> Any:
    """The matrices [n_embd, n_embd] of tensor `name`, one for each stream but the first."""
    return parts.tensor(name).view(-1, spec.n_embd, spec.n_embd)


def _as_long_as(made: Any, wanted: Any) -> Any:
    """The rows of `made` brought to the lengths of those of `wanted`."""
    length = wanted.square().mean(-1, keepdim=True).sqrt()
    return made * (length / made.square().mean(-1, keepdim=True).clamp(min=LEAST).sqrt())


class TorchAround:
    """What happens around a layer."""

    def __init__(self, spec: ForwardSpec, layer: Layer, parts: TorchParts) -> None:
        self._layer, self._parts, self._n_embd, self._streams = layer, parts, spec.n_embd, spec.streams
        self._count = spec.streams.count if layer.altup is not None and spec.streams is not None else 1

    def enter(self, rows: Any) -> tuple[Any, Any]:
        """What the layer works on of `rows` [n_seq, n, width], and all streams, which AltUp predicts first.

        They are [n_seq, n, n_embd] and [n_seq, n, streams, n_embd]; the streams that no AltUp moves are left out.
        """
        altup, streams, count = self._layer.altup, self._streams, self._count
        side_by_side = rows[..., : count * self._n_embd].view(*rows.shape[:2], count, self._n_embd)
        if altup is None or streams is None:
            return side_by_side[:, :, 0], side_by_side
        coefficients = self._modalities(altup, side_by_side[:, :, streams.active]) @ self._tensor(altup.predict).t()
        predicted = side_by_side + coefficients.view(*rows.shape[:2], count, count) @ side_by_side
        return predicted[:, :, streams.active], predicted

    def leave(self, made: Any, side_by_side: Any, rows: Any, kept: dict[int, Any]) -> Any:
        """`rows` with what the layer has `made` [n_seq, n, n_embd] of its stream, and with what it has `kept`.

        `side_by_side` are the streams as `enter` gave them.
        """
        layer, streams, altup = self._layer, self._streams, self._layer.altup
        if altup is None or streams is None:
            if layer.side is not None:
                made = made + self._own(layer.side, made, rows)
            if layer.out_scale is not None:
                made = made * self._tensor(layer.out_scale)
        else:
            coefficients = self._modalities(altup, made) @ self._tensor(altup.correct).t() + 1
            changed = made - side_by_side[:, :, streams.active]
            moved = side_by_side + coefficients[..., None] * changed[:, :, None]
            if layer.side is not None:
                own = self._own(layer.side, moved[:, :, streams.active] * self._tensor(altup.scale), rows)
                moved = torch.cat([moved[:, :, :1], moved[:, :, 1:] + own[:, :, None]], 2)
            made = moved.flatten(2)
        if made.shape[2] == rows.shape[2]:
            return made
        result = rows.clone()
        result[..., : made.shape[2]] = made
        for at, values in kept.items():
            result[..., at : at + values.shape[2]] = values
        return result

    def _tensor(self, name: str) -> Any:
        return self._parts.tensor(name)

    def _modalities(self, altup: AltUp, x: Any) -> Any:
        """A number from -1 to 1 for each stream, of the rows of `x`."""
        return torch.tanh(self._parts.normed(altup.router_norm, x) / self._n_embd @ self._tensor(altup.router).t())

    def _own(self, side: SideInput, x: Any, rows: Any) -> Any:
        """What the layer's own embeddings, in `rows`, add to `x`."""
        gate = functional.gelu(self._parts.product(x, side.gate).float(), approximate="tanh")
        made = self._parts.product(gate * rows[..., side.at : side.at + side.size], side.out)
        return self._parts.normed(side.norm, made.float())
