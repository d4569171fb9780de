"""What all parts of a layer do alike: decode weights, normalise rows, multiply them and tell who observes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from quantkit.architectures.forward import Linear, Norm, NormKind
from quantkit.evaluate import forward_kernels
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
    """The weights of a layer, decoded as its parts ask for them, and what is done to rows with them.

    `rows` is how many go through a product together, when the widest has `widest` columns. `take` gives a thread's own
    arrays (see `Workspace`). `norms` holds the weights and biases of norms, `observer` is told of products,
    `each_block` runs what is done to blocks of rows.
    """

    def __init__(
        self,
        n_embd: int,
        weights: Weights,
        workspace: Workspace,
        observer: Observer | None,
        widest: int,
        each_block: Each = one_by_one,
    ) -> None:
        self.n_embd, self.weights, self.take = n_embd, weights, workspace.take
        self._each_block = each_block
        self.observer = observer
        self.norms: dict[Norm, tuple[np.ndarray, np.ndarray | None]] = {}
        self.rows = ROWS
        while self.rows > 1 and self.rows * widest > _WIDEST:
            self.rows //= 2

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

    def vector(self, name: str | None, size: int) -> np.ndarray:
        """Tensor `name` of `size` numbers; empty where there is none."""
        return np.empty(0, np.float32) if name is None else self.weights.vector(name, size)

    def norm(self, norm: Norm | None, size: int) -> None:
        """Decode the weights of a norm of `size` numbers, which `normed` will ask for."""
        if norm is not None:
            self.norms[norm] = (
                np.ones(size, np.float32) if norm.weight is None else self.weights.vector(norm.weight, size),
                None if norm.bias is None else self.weights.vector(norm.bias, size),
            )

    def norm_weight(self, norm: Norm) -> np.ndarray:
        """What `norm` multiplies with."""
        return self.norms[norm][0]

    def product(self, role: str, parts: list[tuple[Linear | None, int]], n_in: int) -> Product:
        """Matrices below each other, each with its number of rows; `role` as in `Weights.matrix`."""
        present = [(part, n) for part, n in parts if part is not None]
        matrix = self.weights.matrix(role, [(part.weight, n) for part, n in present], n_in)
        names = tuple(part.weight for part, _ in present)
        if all(part.bias is None for part, _ in present):
            return Product(matrix, None, names)
        biases = [
            self.weights.vector(part.bias, n) if part.bias is not None else np.zeros(n, np.float32)
            for part, n in present
        ]
        return Product(matrix, np.concatenate(biases), names)

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
            forward_kernels.add_bias(out, product.bias)
        return out

    def normed(self, norm: Norm | None, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The rows of `x` normalised into `out`, which may be `x`; `x` itself where there is no norm."""
        if norm is None:
            return x
        weight, bias = self.norms[norm]
        if norm.kind is NormKind.RMS:
            forward_kernels.rms_norm(x, weight, norm.eps, out)
        else:
            forward_kernels.layer_norm(x, weight, np.zeros_like(weight) if bias is None else bias, norm.eps, out)
        return out


def in_groups(n_chunks: int, n_ctx: int) -> list[slice]:
    """The chunks that go through products together, of `n_chunks`: what is summed, is summed group by group."""
    step = aligned(n_ctx)
    return [slice(at, min(at + step, n_chunks)) for at in range(0, n_chunks, step)]
