"""A model's weights on torch's devices: all of them, or those of one layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.products import Norm, Products
from quantkit.evaluate.threads import Threads
from quantkit.evaluate.torch_blocks import DECODABLE, decode
from quantkit.evaluate.weights import Weights
from quantkit.sources.source import TensorSource

log = logging.getLogger(__name__)

# Of what a GPU has free, the weights' share, and the bytes of packed weights that go over together.
_SHARE_OF_WEIGHTS = 0.8
_PACKED = 1 << 26


class Loading:
    """Tensors on their way to `device`: into `tensors`, by name, each once."""

    def __init__(self, weights: TorchWeights, device: Any, tensors: dict[str, Any]) -> None:
        self._weights, self.device, self.tensors = weights, device, tensors

    def matrix(self, name: str, n_rows: int, n_in: int) -> None:
        """A matrix that rows are multiplied with, in the precision of products."""
        if name not in self.tensors:
            self.tensors[name] = self._weights.fetch(name, n_rows, n_in, self.device)

    def constant(self, name: str, shape: tuple[int, ...]) -> None:
        """A vector or a matrix of this shape in float32, whatever the precision of products."""
        if name not in self.tensors:
            decoded = self._weights.decoder.constant("any", name, shape)
            self.tensors[name] = torch.from_numpy(decoded).to(self.device, copy=True)

    def products(self, products: Products) -> None:
        """What products read: their matrices, and what is added after."""
        for linear, n_out in products.linears:
            self.matrix(linear.weight, n_out, products.n_in)
            if linear.bias is not None:
                self.constant(linear.bias, (n_out,))

    def norm(self, norm: Norm | None, size: int) -> None:
        """What a norm of so many numbers reads, where there is one."""
        for name in () if norm is None else (norm.weight, norm.bias):
            if name is not None:
                self.constant(name, (size,))

    def table(self, name: str, n_in: int) -> None:
        """A matrix whose rows are looked up, however many there are."""
        info = self._weights.source.tensors.get(name)
        self.matrix(name, 0 if info is None else info.n_rows, n_in)


class Loadable(Protocol):
    """What knows the tensors that it reads: a layer."""

    def load(self, to: Loading) -> None:
        """Ask for them."""
        ...


class TorchWeights:
    """The weights of `source` on `devices`, those of products in `dtype`.

    The outer ones (those that are no layer's) are on the first device. With `keep`, and where a GPU has room for them,
    all layers' stay; neighbours are on one device. Otherwise there are those of one layer at a time, on the first
    device, and the next layer's are fetched while it computes, by a thread and in a stream of its own. A GPU gets
    weights packed and decodes them itself, with `packs`. `tensors` are those that are there, by name; `decoder` decodes
    on the CPU. Layers read and write `n_embd` numbers of a token.
    """

    def __init__(
        self, source: TensorSource, spec: ForwardSpec, threads: Threads, devices: Sequence[Any], dtype: Any, keep: bool
    ) -> None:
        self.source, self.dtype, self.n_embd = source, dtype, spec.n_embd
        self._spec, self._threads = spec, threads
        self.devices, self.device, kind = list(devices), devices[0], devices[0].type
        self.packs = self._pins = kind == "cuda"
        self.keep = keep and (kind != "cuda" or self._fits())
        if not self.keep:
            del self.devices[1:]
        self.tensors: dict[str, Any] = {}
        self.decoder = Weights(source, threads.run, keep=False)
        self._outer: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        self._layers: Sequence[Loadable] = ()
        self._held = -1
        self._coming: tuple[int, Future[dict[str, Any]]] | None = None
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="quantkit-fetch")
        self._side = torch.cuda.Stream(self.device) if kind == "cuda" else None

    def load(self, outer: Callable[[Loading], None], layers: Sequence[Loadable]) -> None:
        """Bring what `outer` asks for, and what those of `layers` do that are kept; `hold` may be called then."""
        outer(Loading(self, self.device, self.tensors))
        self._outer, self._layers = dict(self.tensors), layers
        for index, layer in enumerate(layers if self.keep else ()):
            layer.load(Loading(self, self.place(index), self.tensors))

    def place(self, index: int) -> Any:
        """The device that has layer `index`: neighbours are together."""
        if not self.keep:
            return self.device
        return self.devices[index * len(self.devices) // len(self._layers)]

    def free(self) -> int:
        """The bytes that are free on the fullest GPU."""
        return min(int(torch.cuda.mem_get_info(device)[0]) for device in self.devices)

    def _fits(self) -> bool:
        """Whether the GPUs have room for all weights, and for the activations beside them."""
        tensors, spec = self.source.tensors, self._spec
        # What is looked up for each layer stays on the CPU.
        left_out = {*spec.idle, *([] if spec.side is None else [spec.side.table])}
        names = (spec.tensors - left_out) & tensors.keys()
        needed = sum(tensors[name].n_elements for name in names) * self.dtype.itemsize
        free = self.free() * len(self.devices)
        if needed > _SHARE_OF_WEIGHTS * free:
            log.info(
                "%s: %.1f GB of weights and the activations do not fit into the %.1f GB that %s has free: its layers "
                "come and go",
                self.source.label, needed / 1e9, free / 1e9, ",".join(map(str, self.devices)),
            )  # fmt: skip
            return False
        return True

    def hold(self, index: int, after: int | None = None) -> None:
        """See that the weights of layer `index` are on the device, alone of the layers unless all are kept.

        Those of the layer `after` it, the next where None, are fetched meanwhile.
        """
        if self.keep or index == self._held:
            return
        # What was held can go before the next is there.
        self.tensors, self._held = self._outer, -1
        coming, self._coming = self._coming, None
        if self._side is None:
            own = self._fetched(index)
        else:
            if coming is None or coming[0] != index:
                coming = index, self._fetcher.submit(self._fetched, index)
            own = coming[1].result()
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            for tensor in own.values():
                tensor.record_stream(current)
            following = index + 1 if after is None else after
            if 0 <= following < len(self._layers):
                self._coming = following, self._fetcher.submit(self._fetched, following)
        self.tensors, self._held = {**self._outer, **own}, index

    def _fetched(self, index: int) -> dict[str, Any]:
        """The weights of layer `index`, on the device. Several threads may not call this."""
        own: dict[str, Any] = {}
        with torch.no_grad(), torch.cuda.stream(self._side):  # that of None is the usual one
            self._layers[index].load(Loading(self, self.device, own))
        return own

    def fetch(self, name: str, n_rows: int, n_in: int, device: Any) -> Any:
        """Matrix `name` [n_rows, n_in] on `device`, in the precision of products."""
        info = self.source.tensors.get(name)
        if not self.packs or info is None or info.type not in DECODABLE:
            decoded = torch.from_numpy(self.decoder.matrix("any", [(name, n_rows)], n_in))
            return decoded.to(self.dtype).to(device, copy=True)
        # Packed weights are fewer bytes, and the device decodes them in no time.
        self.decoder.check(name, n_rows, n_in)
        whole = torch.empty((n_rows, n_in), dtype=self.dtype, device=device)
        step = max(1, _PACKED // info.type.row_nbytes(n_in))
        for start in range(0, n_rows, step):
            packed = self._packed(name, start, min(n_rows, start + step))
            whole[start : start + step] = decode(packed.to(device, non_blocking=True), info.type, self.dtype)
        self.source.release(name)
        return whole

    def _packed(self, name: str, start: int, stop: int) -> Any:
        """Rows of a tensor as they are stored, in memory that a GPU reads by itself."""
        rows = self.source.read(name, start, stop)
        pinned = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=self._pins)
        into, step = pinned.numpy(), max(1, -(-len(rows) // self._threads.count))

        def copy(at: int) -> None:
            into[at : at + step] = rows[at : at + step]

        for _ in self._threads.map(copy, range(0, len(rows), step)):
            pass
        return pinned

    def matrix(self, name: str) -> Any:
        """A matrix that is there, or what replaces it."""
        return self._others[name] if name in self._others else self.tensors[name]

    @contextmanager
    def replaced(self, tensors: Mapping[str, np.ndarray]) -> Iterator[None]:
        """See `Model.replaced`."""
        shapes = {name: self.source.tensors[name].shape for name in tensors}
        self._others = {
            # Experts are stacked.
            name: torch.from_numpy(np.ascontiguousarray(rows))
            .to(self.dtype)
            .to(self.tensors[name].device if name in self.tensors else self.device)
            .view(*reversed(shapes[name]))
            for name, rows in tensors.items()
        }
        try:
            yield
        finally:
            self._others = {}
