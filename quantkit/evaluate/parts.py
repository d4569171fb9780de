"""What all parts of a layer do alike: decode weights, normalise rows, multiply them and tell who observes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from quantkit.architectures.forward import Layer
from quantkit.architectures.products import Norm, NormKind, Products
from quantkit.evaluate import norm_kernels
from quantkit.evaluate.threads import Each, Workspace, one_by_one
from quantkit.evaluate.weights import Weights

# Rows that go through a product together. BLAS rearranges the whole matrix for every product, which is worth it from
# so many rows on: products of 512 rows take 3 to 6% longer.
ROWS = 1024


def aligned(n_ctx: int) -> int:
    """How many sequences of `n_ctx` tokens make whole groups, of activations and of the logits of a half of each.

    Where batches begin at multiples of this, what goes together is the same however large they are.
    """
    return max(1, 2 * (ROWS // n_ctx))


# What names of a layer's tensors begin with.
_NUMBER = re.compile(r"^(enc\.)?blk\.\d+\.")
_NOTHING = np.empty(0, np.float32)
# The widest product of that many rows may take this many numbers (64 MB); of wider ones fewer rows go together.
_WIDEST = 1 << 24


class Product(NamedTuple):
    """A matrix [n_out, n_in] to multiply with, what is added after, and the tensors that its rows come from."""

    matrix: np.ndarray
    bias: np.ndarray | None
    names: tuple[str, ...]


# Told of what is multiplied, from several threads at once: the names of tensors that share an input, some rows of it
# (float32 [rows, n_in], valid during the call; of the backend's own kind), which row of the batch the first of them
# is, or, of rows that are not neighbours, each of them in rising order, and the expert (or the head, of tensors with a
# matrix for each) that multiplies them, None for other tensors. Rows come in the same parts whatever the number of
# threads, but in any order: `evaluate.inputs` sums them up by their place.
Observer = Callable[[tuple[str, ...], Any, Any, "int | None"], None]


class Parts:
    """The weights of a layer, decoded, and what is done to rows with them.

    They are those that `layer` says it reads, but for the matrices of experts, which come one by one, and their biases.
    `rows` is how many go through a product together. `take` gives a thread's own arrays (see `Workspace`). `observer`
    is told of products, `each_block` runs what is done to blocks of rows.
    """

    def __init__(
        self,
        layer: Layer,
        n_embd: int,
        weights: Weights,
        workspace: Workspace,
        observer: Observer | None,
        each_block: Each = one_by_one,
    ) -> None:
        self.n_embd, self.weights, self.take = n_embd, weights, workspace.take
        self._each_block = each_block
        self.observer = observer
        self.rows, widest = ROWS, _widest(layer, n_embd)
        while self.rows > 1 and self.rows * widest > _WIDEST:
            self.rows //= 2
        self._products: dict[str, Product] = {}
        for products in layer.products(n_embd):
            self._products |= dict.fromkeys(products.names, self._decoded(products))
        # By size as well: norms without weights are equal whatever they normalise.
        self._norms = {(norm, n): self._of_norm(norm, n) for norm, n in layer.norms(n_embd)}
        constants = layer.constants(n_embd)
        self._constants = {name: weights.constant(_role(name), name, shape) for name, shape in constants.items()}

    def blocks(self, x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of `x` in blocks that go through a product together, each with the number of its first row."""
        for start in range(0, len(x), self.rows):
            yield start, x[start : start + self.rows]

    def each(self, x: np.ndarray, task: Callable[[int, np.ndarray], None]) -> None:
        """Run `task` on every block of the rows of `x`, with the number of its first row."""
        blocks = list(self.blocks(x))
        if len(blocks) == 1:
            task(*blocks[0])
        else:
            self._each_block(lambda i: task(*blocks[i]), len(blocks))

    # Weights

    def product(self, name: str) -> Product:
        """The matrix `name`, with those below and above it that are multiplied with the same rows."""
        return self._products[name]

    def constant(self, name: str | None) -> np.ndarray:
        """Tensor `name` of the layer's constants; empty where there is none."""
        return _NOTHING if name is None else self._constants[name]

    def norm(self, norm: Norm, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What a norm of the layer's, of so many numbers, multiplies with, and what it adds."""
        return self._norms[norm, size]

    def _decoded(self, products: Products) -> Product:
        parts = [(linear.weight, n_out) for linear, n_out in products.linears]
        matrix = self.weights.matrix(_role(products.names[0]), parts, products.n_in)
        if all(linear.bias is None for linear, _ in products.linears):
            return Product(matrix, None, products.names)
        biases = [
            np.zeros(n_out, np.float32) if linear.bias is None else self.weights.vector(linear.bias, n_out)
            for linear, n_out in products.linears
        ]
        return Product(matrix, np.concatenate(biases), products.names)

    def _of_norm(self, norm: Norm, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        return (
            np.ones(size, np.float32) if norm.weight is None else self.weights.vector(norm.weight, size),
            None if norm.bias is None else self.weights.vector(norm.bias, size),
        )

    # Rows

    def observe(self, names: tuple[str, ...], x: np.ndarray, at: int | np.ndarray, expert: int | None = None) -> None:
        """Tell the observer, if there is one, what `names` are multiplied with: see `Observer`."""
        if self.observer is not None:
            self.observer(names, np.ascontiguousarray(x), at, expert)

    def multiply(self, x: np.ndarray, product: Product, out: np.ndarray, at: int) -> np.ndarray:
        """`out = x @ matrix.T + bias`; the first row of `x` is row `at` of the batch."""
        self.observe(product.names, x, at)
        np.matmul(x, product.matrix.T, out=out)
        if product.bias is not None:
            norm_kernels.add_bias(out, product.bias)
        return out

    def normed(self, norm: Norm | None, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The rows of `x` normalised into `out`, which may be `x`; `x` itself where there is no norm."""
        if norm is None:
            return x
        weight, bias = self.norm(norm, x.shape[1])
        if norm.kind is NormKind.RMS:
            norm_kernels.rms_norm(x, weight, norm.eps, out)
        else:
            norm_kernels.layer_norm(x, weight, np.zeros_like(weight) if bias is None else bias, norm.eps, out)
        return out


def _widest(layer: Layer, n_embd: int) -> int:
    """How many numbers the widest product of the layer's rows makes of each."""
    ff, widths = layer.feed_forward, [1]
    if ff is not None:
        widths.append(2 * ff.n_ff)
    for mixer in layer.mixers:
        of_rows = (linears for n_in, linears in mixer.products(n_embd) if n_in == n_embd)
        widths.append(sum(n_out for linears in of_rows for _, n_out in linears))
    return max(widths)


def _role(name: str) -> str:
    """What a tensor is in its layer: its name without the layer's number."""
    return _NUMBER.sub("", name)


def in_groups(n_chunks: int, n_ctx: int) -> list[slice]:
    """The chunks that go through products together, of `n_chunks`: what is summed, is summed group by group."""
    step = aligned(n_ctx)
    return [slice(at, min(at + step, n_chunks)) for at in range(0, n_chunks, step)]
