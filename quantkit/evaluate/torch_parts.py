"""What all parts of a layer do alike through torch: multiply rows, normalise and rotate them, and tell who observes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from quantkit.architectures.mixers import Rope, RopeStyle
from quantkit.architectures.products import Linear, Norm, NormKind
from quantkit.evaluate.parts import Observer
from quantkit.evaluate.rotary import rotation_tables
from quantkit.evaluate.threads import Threads
from quantkit.evaluate.torch_weights import TorchWeights


class TorchParts:
    """The weights of a model, by name, and what is done to rows with them.

    Products run in the precision of `weights`, all else in float32. On a CPU `through_numpy` has numpy's BLAS multiply
    float32, on `threads`. `observed` says who is told of what is multiplied; `gradient_observer`, while gradients are
    taken, is told of those by what products make, the first of them as row `gradient_at` of the batch.
    """

    def __init__(
        self, weights: TorchWeights, threads: Threads, through_numpy: bool, observed: Callable[[], Observer | None]
    ) -> None:
        self.weights, self.dtype = weights, weights.dtype
        self._threads, self._through_numpy, self._observed = threads, through_numpy, observed
        self.gradient_observer: Callable[..., None] | None = None
        self.gradient_at = 0
        self._tables: dict[tuple[Rope, str | None, Any], tuple[Any, Any]] = {}

    def tensor(self, name: str) -> Any:
        """Tensor `name`, on the device of its layer."""
        return self.weights.tensors[name]

    # -- products

    def product(self, x: Any, linear: Linear) -> Any:
        """`x` [..., n_in] through `linear`, in the precision of products."""
        (made,) = self.products(x, linear)
        return made

    def products(self, x: Any, *linears: Linear | None) -> list[Any]:
        """`x` [..., n_in] through each of `linears` that there is."""
        x = x.to(self.dtype)
        present = [linear for linear in linears if linear is not None]
        self.observe(tuple(linear.weight for linear in present), x)
        products = [
            self.times(
                x,
                self.weights.matrix(linear.weight),
                None if linear.bias is None else self.tensor(linear.bias).to(x.dtype),
            )
            for linear in present
        ]
        if self.gradient_observer is not None:
            for linear, product in zip(present, products, strict=True):
                product.register_hook(partial(_tell, self.gradient_observer, linear.weight, self.gradient_at))
        return products

    def stacked(self, name: str, x: Any, n_out: int) -> Any:
        """Heads `x` [n_seq, n, heads, n_in], each through its own matrix of `name`: [n_seq, heads, n, n_out]."""
        x = x.to(self.dtype)
        n_head, n_in = x.shape[2:]
        if self._observed() is not None:
            for head in range(n_head):
                self.observe((name,), x[:, :, head], head)
        return x.transpose(1, 2) @ self.weights.matrix(name).view(n_head, n_out, n_in).transpose(1, 2)

    def times(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """`x` [..., n_in] times the rows of `weight`, plus `bias`, all of one type."""
        if not self._through_numpy or torch.is_grad_enabled():
            return functional.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(len(rows), len(weight))
        step = max(1, -(-len(rows) // self._threads.count))
        a, w, to = rows.numpy(), weight.numpy().T, out.numpy()

        def multiply(i: int) -> None:
            part = slice(i * step, (i + 1) * step)
            np.matmul(a[part], w, out=to[part])

        for _ in self._threads.map(multiply, range(-(-len(rows) // step))):
            pass
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], len(weight))

    def observe(self, names: tuple[str, ...], x: Any, expert: int | None = None, at: Any = 0) -> None:
        """Tell the observer, if there is one, what `names` are multiplied with: see `parts.Observer`."""
        observer = self._observed()
        if observer is not None and x.numel():
            observer(names, x.reshape(-1, x.shape[-1]), at, expert)

    # -- what is float32

    def normed(self, norm: Norm | None, x: Any) -> Any:
        """`x`, float32, normalised over its last axis; as it is where there is no norm."""
        if norm is None:
            return x
        weight = None if norm.weight is None else self.tensor(norm.weight)
        if norm.kind is NormKind.RMS:
            return functional.rms_norm(x, x.shape[-1:], weight, norm.eps)
        bias = None if norm.bias is None else self.tensor(norm.bias)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)

    def rotated(self, rope: Rope | None, x: Any) -> Any:
        """`x` [n_seq, n_ctx, heads, head size] rotated by its positions, in float32."""
        if rope is None or rope.n_dims == 0:
            return x
        cosines, sines = self._rope(rope, x.shape[1], x.device)
        rotary, rest = x[..., : rope.n_dims].float(), x[..., rope.n_dims :]
        neighbours = rope.style is RopeStyle.NORMAL
        a, b = (rotary[..., 0::2], rotary[..., 1::2]) if neighbours else rotary.chunk(2, dim=3)
        rotated = a * cosines - b * sines, a * sines + b * cosines
        result = torch.stack(rotated, dim=4).flatten(3) if neighbours else torch.cat(rotated, dim=3)
        return torch.cat((result, rest.float()), dim=3) if rest.shape[3] else result

    def _rope(self, rope: Rope, n_ctx: int, device: Any) -> tuple[Any, Any]:
        """Cosines and sines [n_ctx, 1, n_dims / 2]."""
        name = rope.factors_for(n_ctx)
        key = rope, name, device
        if key not in self._tables or len(self._tables[key][0]) < n_ctx:
            factors = None if name is None else self.weights.decoder.vector(name, rope.n_dims // 2)
            cosines, sines = (torch.from_numpy(t[:, None]) for t in rotation_tables(rope, n_ctx, factors))
            self._tables[key] = cosines.to(device), sines.to(device)
        cosines, sines = self._tables[key]
        return cosines[:n_ctx], sines[:n_ctx]


def _tell(observer: Callable[..., None], name: str, at: int, gradient: Any) -> None:
    with torch.no_grad():
        observer((name,), gradient.reshape(-1, gradient.shape[-1]), at, None)


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products without TF32, whatever the process asked for before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widest_float(device: Any) -> Any:
    """The widest floats that `device` has."""
    return torch.float32 if device.type == "mps" else torch.float64
