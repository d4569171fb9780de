"""Sums over what matrices are multiplied with, on torch's device."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import torch

from quantkit.evaluate.inputs import Balance, InputSum, Key
from quantkit.evaluate.torch_parts import exact_products, widest_float


class TorchInputSums:
    """Sums over the inputs of matrices on torch's device, as `inputs.InputSums` on the CPU.

    Products and squares of a part of a batch are summed in float32, the parts in float64 where the device has it.
    Sums of products `stay` where they are when they are taken, if told so.
    """

    def __init__(
        self,
        full: bool,
        device: Any,
        wanted: Container[str] | None = None,
        balance: Balance | None = None,
        stay: bool = False,
    ) -> None:
        self._full, self._device, self._wanted, self._stay = full, device, wanted, stay and full
        self._balance = balance
        self._wide = widest_float(device)
        self._roots: dict[tuple[str, ...], Any] = {}
        self._totals: dict[Key, Any] = {}
        self._counts: dict[Key, int] = {}

    def observe(self, names: tuple[str, ...], rows: Any, at: Any, expert: int | None) -> None:
        """Take torch's `rows`, which tensors `names` are multiplied with; for `at` see `parts.Observer`."""
        if self._wanted is not None and not any(name in self._wanted for name in names):
            return
        key = names, expert
        if self._full:
            rows = rows.float()
            if self._balance is not None:
                rows = self._balanced(names, rows, at, self._balance)
            sums = (rows.t() @ rows).to(self._wide)
        else:
            # One reading of the rows, whatever they are.
            sums = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).to(self._wide).square()
        if key in self._totals:
            self._totals[key] += sums
        else:
            self._totals[key] = sums
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def _balanced(self, names: tuple[str, ...], rows: Any, at: Any, balance: Balance) -> Any:
        """See `inputs.Balance.balanced`."""
        places = at if isinstance(at, torch.Tensor) else at + torch.arange(len(rows), device=rows.device)
        roots = balance.roots(names)
        if roots is not None:
            if names not in self._roots:
                self._roots[names] = torch.from_numpy(roots).to(rows.device)
            return rows * self._roots[names][balance.first_token + places][:, None]
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=self._wide)
        sizes = torch.where(places % balance.n_ctx == 0, balance.first**0.5, 1.0).to(lengths)
        scales = torch.where(lengths > 0, sizes / lengths, lengths)
        return rows * scales.float()[:, None]

    def add(self, names: tuple[str, ...], rows: np.ndarray, at: int = 0) -> None:
        """See `inputs.Sums`."""
        with torch.no_grad(), exact_products():
            self.observe(names, torch.from_numpy(rows).to(self._device), at, None)

    def settle(self) -> None:
        """See `inputs.Sums`: nothing waits."""

    def take_groups(self, n_rows: int) -> list[dict[Key, InputSum]]:
        """See `inputs.Sums`: one of the whole batch."""
        return [self.take()]

    def take(self) -> dict[Key, InputSum]:
        """See `inputs.Sums`."""
        totals, self._totals = self._totals, {}
        counts, self._counts = self._counts, {}
        if not self._stay:
            totals = {key: total.cpu().numpy().astype(np.float64) for key, total in totals.items()}
        return {key: InputSum(total, counts[key]) for key, total in totals.items()}
