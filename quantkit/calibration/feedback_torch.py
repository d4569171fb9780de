"""Error feedback on a GPU, through torch: the arithmetic of `feedback` for all rows of a matrix at once.

Columns are settled one after another, each for all rows and all trials of scales in a few operations; errors reach
other sub-blocks and panels by matrix products. A panel's operations, which are hundreds and small, are recorded once
and then replayed (a CUDA graph). The search for scales, and the packing of blocks, are the processor's kernels: a
block of columns goes over at a time, to be searched by all threads. Formats with a grid are the processor's whole.

What the processor's kernels give differs from this by the order of sums of float32, which here and there moves a level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantkit import blocks
from quantkit.blocks.parts import parts
from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import DAMPING, Curvature
from quantkit.calibration.feedback import (
    COUPLED_SWEEPS,
    OUTPUT_DAMPING,
    SWEEPS,
    Rounded,
    coupled_groups,
    round_with_feedback,
)
from quantkit.calibration.settling import PANEL, LevelRule, level_rule
from quantkit.errors import QuantkitError
from quantkit.evaluate.torch_blocks import decode
from quantkit.evaluate.torch_parts import exact_products
from quantkit.machine import default_threads

# Rows that a thread of the processor searches or packs at a time.
_ROWS = 128
# Columns whose errors reach the others of a sub-block by a matrix product.
_CHAIN = 8
# Recorded panels that are kept: each holds what its trials need.
_RECORDED = 8


@dataclass(frozen=True)
class _SubSteps:
    """What settling sub-blocks needs, of each: float32 [sub-blocks, n_sub, n_sub]."""

    solve: Any
    chain: Any
    factor: Any


@dataclass(frozen=True)
class _PanelSteps:
    """The same for the sub-blocks of one panel, and what errors of the panel's others move them by."""

    solve: Any
    chain: Any
    factor: Any
    push: Any  # float32 [sub-blocks, n_sub, m]


class TorchCurvature:
    """`curvature.Curvature` on torch's device: there are its moments, damped and factored in float64."""

    def __init__(self, damped: Any, factor: Any, importance: np.ndarray, scale: float, damping: float) -> None:
        self.n = len(damped)
        self.importance, self.scale, self.damping = importance, scale, damping
        self.damped, self.factor = damped, factor
        self.left: np.ndarray = np.square(factor.diagonal().cpu().numpy())
        self._subs: dict[tuple[bool, int], _SubSteps] = {}
        self._host: Curvature | None = None

    @classmethod
    def of(cls, moments: Any, device: Any, *, damping: float = DAMPING) -> TorchCurvature:
        """The curvature that `moments` [n, n], of numpy or torch, describe. See `Curvature.of`, also for errors."""
        if not damping >= 0:
            raise QuantkitError(f"a damping of {damping} is not possible: use 0 or more")
        with running(device):
            given = torch.as_tensor(moments).to(device)
            importance = given.diagonal().float().cpu().numpy()
            # Reversed, so that the lower triangular factor becomes the upper triangular one.
            work, scale = normalised(given.flip(0, 1), "second moments")
            work.diagonal().add_(damping)
            damped = work.flip(0, 1).float()
            factor = factorised(work).flip(0, 1).t().float().contiguous()
        return cls(damped, factor, importance, scale, damping)

    def host(self) -> Curvature:
        """The same for the processor's kernels."""
        if self._host is None:
            damped, factor = self.damped.cpu().numpy(), self.factor.cpu().numpy()
            self._host = Curvature(damped, factor, self.importance, self.scale, self.damping)
        return self._host

    def loss(self, errors: Any) -> Any:
        """`e H eT` of each column of `errors`, float32 [n, n_rows], with H as it was before: float64 [n_rows]."""
        damped = (self.damped @ errors).mul_(errors).sum(0, dtype=torch.float64)
        return (damped - self.damping * errors.square().sum(0, dtype=torch.float64)) * self.scale

    def blocks(self, size: int) -> _SubSteps:
        """The first visit's steps of all blocks of `size` columns."""
        return self._steps(False, size)

    def panel(self, again: bool, start: int, stop: int, n_sub: int) -> _PanelSteps:
        """The steps of the panel from column `start` to `stop`: see `Curvature`."""
        every = self._steps(again, n_sub)
        subs = slice(start // n_sub, stop // n_sub)
        n_subs, m = subs.stop - subs.start, stop - start
        source = self.damped if again else self.factor
        coupling = source[start:stop, start:stop].reshape(n_subs, n_sub, n_subs, n_sub).clone()
        at = torch.arange(n_subs, device=coupling.device)
        # At first the columns after a sub-block are free, and the factor is 0 there.
        coupling[at, :, at] = 0
        push = torch.bmm(every.solve[subs], coupling.view(n_subs, n_sub, m))
        return _PanelSteps(every.solve[subs], every.chain[subs], every.factor[subs], push)

    def _steps(self, again: bool, n_sub: int) -> _SubSteps:
        key = again, n_sub
        if key not in self._subs:
            source = self.damped if again else self.factor
            n = self.n // n_sub
            own = source.view(n, n_sub, n, n_sub).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
            factor = torch.linalg.cholesky_ex(own.flip(1, 2))[0].flip(1, 2).transpose(1, 2) if again else own
            chain = factor / factor.diagonal(dim1=1, dim2=2)[:, :, None]
            unit = torch.eye(n_sub, dtype=own.dtype, device=own.device).expand_as(own)
            inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
            if again:
                inverse = inverse @ inverse.transpose(1, 2)
            self._subs[key] = _SubSteps(*(each.float().contiguous() for each in (inverse, chain, factor)))
        return self._subs[key]


def normalised(moments: Any, what: str) -> tuple[Any, float]:
    """`curvature`'s on torch's device: moments by the mean of their diagonal, float64, a copy, and that mean."""
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or moments.shape[0] == 0:
        raise QuantkitError(f"{what} must be a square matrix, not of shape {tuple(moments.shape)}")
    diagonal = moments.diagonal().double()
    scale = float(diagonal.mean())
    if not np.isfinite(scale) or not bool(moments.isfinite().all()):
        raise QuantkitError(f"{what} are not finite: the calibration text makes the model overflow")
    if scale == 0 and not bool(moments.any()):
        raise QuantkitError(f"{what} are all zero: nothing has passed through this matrix")
    if scale == 0 or not bool((diagonal >= 0).all()):
        raise QuantkitError(f"{what} with a negative diagonal are no moments")
    result = moments.double() / scale
    size = float(result.abs().max())
    if any(
        float((result[at : at + PANEL] - result[:, at : at + PANEL].t()).abs().max()) > 1e-4 * size
        for at in range(0, len(result), PANEL)
    ):
        raise QuantkitError(f"{what} must be symmetric")
    return result, scale


def factorised(a: Any) -> Any:
    """The lower triangular Cholesky factor of `a`, float64."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if int(failed):
        raise QuantkitError("second moments are not positive definite: too few tokens for this damping, or not moments")
    return factor


@contextmanager
def running(device: Any) -> Iterator[None]:
    """No gradients, exact float32 products, and one line where the memory is too small."""
    try:
        with torch.no_grad(), exact_products(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError:
        raise QuantkitError(
            f"error feedback does not fit into the memory of {device}: use another device, or the default backend"
        ) from None


class _Panel:
    """The operations that settle a panel of `m` columns for `n_rows` rows: see `feedback_kernels.visit_levels`.

    Its arrays are where what it works on is put before `run`, and found afterwards; [columns or sub-blocks, rows].
    """

    def __init__(self, rule: LevelRule, m: int, n_rows: int, again: bool, device: Any) -> None:
        n_sub = rule.parts.n_sub
        self._rule, self._again, self._n_sub = rule, again, n_sub
        self._affine, self._coded = rule.parts.affine, rule.coded

        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, device=device)

        n_subs = m // n_sub
        # What is rounded, the same with what errors of other panels move it by, and errors against the former.
        self.targets, self.moved, self.errors = (zeros(m, n_rows) for _ in range(3))
        self.values = zeros(m, n_rows)
        self.scales, self.lows, self.units = zeros(n_subs, n_rows), zeros(n_subs, n_rows), zeros(2, n_rows)
        self.push = zeros(n_subs, n_sub, m)
        self.chain, self.factor = zeros(n_subs, n_sub, n_sub), zeros(n_subs, n_sub, n_sub)
        trials = torch.from_numpy(rule.trials[again].reshape(-1, 2)).to(device)
        self._steps, self._low_steps = trials[:, :1].contiguous(), trials[:, 1:].contiguous()
        self._levels = torch.from_numpy(rule.values).to(device)
        self._borders = None if rule.borders is None else torch.from_numpy(rule.borders).to(device)
        self._ranges = [float(each) for each in rule.ranges]
        self._graph: Any = None
        if device.type == "cuda":
            self._record(device)

    def run(self) -> None:
        """Settle the sub-blocks in order."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._settle()

    def _record(self, device: Any) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._settle()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be fetching weights.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._settle()
        self._graph = graph

    def _settle(self) -> None:
        for u in range(len(self.scales)):
            self._settle_sub(u, slice(u * self._n_sub, (u + 1) * self._n_sub))

    def _settle_sub(self, u: int, sub: slice) -> None:
        ts = torch.addmm(self.moved[sub], self.push[u], self.errors)
        codes, low_codes = self._tried(self.scales[u], self.lows[u])
        scale, low = self._stepped(codes, low_codes)
        values, losses = self._rounded(ts, u, scale, low)
        best = losses.argmin(0, keepdim=True)
        code, low_code = codes.gather(0, best)[0], low_codes.gather(0, best)[0]
        found = values.gather(1, best.expand(self._n_sub, 1, -1))[:, 0]
        if self._again:
            scale, low = self._stepped(self.scales[u], self.lows[u])
            gaps = ts - self.values[sub] * scale - low
            had = (self.factor[u] @ gaps).square().sum(0)
            better = losses.gather(0, best)[0] < had
            code = torch.where(better, code, self.scales[u])
            low_code = torch.where(better, low_code, self.lows[u])
            found = torch.where(better, found, self.values[sub])
        scale, low = self._stepped(code, low_code)
        self.scales[u], self.lows[u] = code, low_code
        self.values[sub] = found
        self.errors[sub] = self.targets[sub] - (found * scale + low)

    def _tried(self, code: Any, low_code: Any) -> tuple[Any, Any]:
        """What is tried for a sub-block's scale and low, as they are stored: [trials, rows]."""
        if self._coded:
            least, most, _, most_low = self._ranges
            codes = (code + self._steps).clamp(least, most)
            return codes, (low_code + self._low_steps).clamp(0.0, most_low)
        return (code * (1 + self._steps)).half().float(), (low_code + code * self._low_steps).half().float()

    def _stepped(self, codes: Any, low_codes: Any) -> tuple[Any, Any]:
        """The scale and the low of what is stored."""
        if not self._coded:
            return codes, low_codes
        return codes * self.units[0], -(low_codes * self.units[1])

    def _rounded(self, ts: Any, u: int, scale: Any, low: Any) -> tuple[Any, Any]:
        """Round a sub-block's targets [n_sub, rows], for each trial: values [n_sub, trials, rows] and losses.

        Targets are taken by the scale, so that levels are integers. Where it is 0 the value is 0, and errors count
        as they are.
        """
        n_sub, (n_trials, n_rows) = self._n_sub, scale.shape
        some = scale != 0
        weight = torch.where(some, scale, 1.0)
        inverse = weight.reciprocal()
        if self._affine:
            moved = (ts[:, None] - low).mul_(inverse).view(n_sub, -1)
        else:
            moved = (ts[:, None] * inverse).view(n_sub, -1)
        values, gaps = torch.empty_like(moved), torch.empty_like(moved)
        if self._borders is None:
            least, most = float(self._rule.values[0]), float(self._rule.values[-1])
            bottom, top = (torch.where(some, each, 0.0).view(-1) for each in (least, most))
        else:
            mask = some.float().view(-1)
        chain = self.chain[u]
        for start in range(0, n_sub, _CHAIN):
            group = slice(start, start + _CHAIN)
            targets = moved[group]
            if start:
                targets = torch.addmm(targets, chain[group, :start], gaps[:start])
            for j in range(_CHAIN):
                at = start + j
                x = targets[j]
                if j:
                    x = torch.addmv(x, gaps[start:at].t(), chain[at, start:at])
                if self._borders is None:
                    torch.clamp(x.round(), bottom, top, out=values[at])
                else:
                    level = torch.bucketize(x, self._borders, out_int32=True, right=True)
                    torch.mul(self._levels[level], mask, out=values[at])
                torch.sub(moved[at], values[at], out=gaps[at])
        losses = (self.factor[u] @ gaps).square().sum(0).view(n_trials, n_rows) * weight.square()
        return values.view(n_sub, n_trials, n_rows), losses.nan_to_num(nan=torch.inf, posinf=torch.inf)


class TorchRounder:
    """Rounds matrices with error feedback on torch's `device`: see `rounder.Rounder`."""

    shared, rows = False, 1 << 14

    def __init__(self, device: Any) -> None:
        self._device = device
        self._made: dict[tuple[GGMLType, int, int, bool], _Panel] = {}

    def curvature(self, moments: Any, damping: float) -> TorchCurvature:
        """See `TorchCurvature.of`."""
        return TorchCurvature.of(moments, self._device, damping=damping)

    def round(
        self,
        weights: np.ndarray,
        curvature: TorchCurvature,
        kind: GGMLType,
        *,
        outputs: np.ndarray | None = None,
        threads: int | None = None,
    ) -> Rounded:
        """See `feedback.round_with_feedback`, which is what rounds formats with a grid."""
        if self.note(kind):
            return round_with_feedback(weights, curvature.host(), kind, outputs=outputs, threads=threads)
        n_rows, n = weights.shape
        if n != curvature.n:
            raise QuantkitError(f"rows of {n} weights cannot be rounded by the moments of {curvature.n} columns")
        result = Rounded.empty(n_rows, n, kind)
        if n_rows == 0:
            return result
        with ThreadPoolExecutor(threads or default_threads()) as pool, running(self._device):
            rows = np.ascontiguousarray(weights, np.float32)
            targets = self._upload(rows).t().contiguous()

            def rounding(of: Any) -> _TorchRounding:
                return _TorchRounding(of, curvature, kind, self._panel, pool)

            if outputs is not None and n_rows > 1:
                groups = _coupled(targets, outputs, rounding)
            else:
                groups = [(np.arange(n_rows), rounding(targets))]
                groups[0][1].first()
            # The processor has nothing to do meanwhile.
            plain, waiting = _by_rows(rows, kind, curvature.importance, pool)
            if outputs is None or n_rows == 1:
                for _ in range(SWEEPS):
                    groups[0][1].again()
            for where, settled in groups:
                wanted = targets[:, self._upload(where)] if len(groups) > 1 else targets
                result.loss[where] = curvature.loss(wanted - settled.rounded).cpu().numpy()
                result.data[where] = settled.packed()
            for each in waiting:
                each.result()
            coded = decode(self._upload(plain), kind).t()
            result.plain_loss[:] = curvature.loss(targets - coded).cpu().numpy()
        # Rows that have made up for others' errors are not kept each for itself: only where their loss is no number.
        better = result.loss < result.plain_loss if outputs is None else np.isfinite(result.loss)
        result.data[~better], result.loss[~better] = plain[~better], result.plain_loss[~better]
        return result

    def losses(self, errors: np.ndarray, curvature: TorchCurvature) -> np.ndarray:
        """What `errors`, float32 [n_rows, n], cost under `curvature`: float64 [n_rows]."""
        with running(self._device):
            found: np.ndarray = curvature.loss(self._upload(errors).t()).cpu().numpy()
        return found

    def note(self, kind: GGMLType) -> str:
        """Whether tensors of `kind` are the processor's."""
        return "" if kind in parts() else f"rounded by the processor, not by {self._device}"

    def _panel(self, kind: GGMLType, m: int, n_rows: int, again: bool) -> _Panel:
        """A panel of this shape, made where none is kept."""
        key = kind, m, n_rows, again
        if key not in self._made:
            while len(self._made) >= _RECORDED:
                self._made.pop(next(iter(self._made)))
            self._made[key] = _Panel(level_rule(kind), m, n_rows, again, self._device)
        return self._made[key]

    def _upload(self, array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(self._device)


def _by_rows(
    rows: np.ndarray, kind: GGMLType, weights: np.ndarray, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, list[Future[None]]]:
    """Where `rows` in blocks of `kind`, rounded to the nearest, will be, and what to wait for."""
    out = np.empty((len(rows), kind.row_nbytes(rows.shape[1])), np.uint8)

    def encode(start: int) -> None:
        part = slice(start, start + _ROWS)
        blocks.encode(rows[part], kind, weights, out[part])

    return out, [pool.submit(encode, start) for start in range(0, len(rows), _ROWS)]


def _coupled(
    targets: Any, outputs: np.ndarray, rounding: Callable[[Any], _TorchRounding]
) -> list[tuple[np.ndarray, _TorchRounding]]:
    """Round rows whose outputs are coupled, one group after another: see `feedback`. Their numbers, and the rows."""
    n_rows = targets.shape[1]
    if outputs.shape != (n_rows, n_rows):
        raise QuantkitError(f"{n_rows} outputs cannot be coupled by moments of shape {outputs.shape}")
    groups = coupled_groups(n_rows)
    order = torch.from_numpy(np.concatenate(groups)).to(targets.device)
    backwards = order.flip(0)
    work, _ = normalised(torch.from_numpy(outputs).to(targets.device)[backwards][:, backwards], "moments of outputs")
    work.diagonal().add_(OUTPUT_DAMPING)
    coupling, factor = (each.flip(0, 1) for each in (work, factorised(work)))
    targets = targets[:, order]
    errors, at, found = torch.zeros_like(targets), 0, []
    for group in groups:
        own = slice(at, at := at + len(group))
        unit = torch.eye(len(group), dtype=factor.dtype, device=factor.device)
        solve = torch.linalg.solve_triangular(factor[own, own], unit, upper=True)
        moved = errors[:, : own.start] @ (factor[: own.start, own] @ solve).float()
        settled = rounding(targets[:, own] + moved)
        settled.first()
        settled.again()
        errors[:, own] = settled.errors - moved
        found.append((own, settled))
    for _ in range(COUPLED_SWEEPS):
        for own, settled in found:
            push = (coupling[:, own] / coupling[own, own].abs().sum(1)).float()
            moved = errors @ push - errors[:, own]
            settled.retarget(targets[:, own] + moved)
            settled.again()
            errors[:, own] = settled.errors - moved
    return [(group, settled) for group, (_, settled) in zip(groups, found, strict=True)]


class _TorchRounding:
    """Rows on their way to being rounded: `settling`'s, all in arrays of float32 [columns, rows] on the device."""

    def __init__(
        self, targets: Any, curvature: TorchCurvature, kind: GGMLType, panel: Callable[..., _Panel],
        pool: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self.targets, self.errors = targets, torch.zeros_like(targets)
        self._values = torch.zeros_like(targets)
        self._curvature, self._kind, self._rule, self._panel, self._pool = (
            curvature, kind, level_rule(kind), panel, pool,
        )  # fmt: skip
        n, n_rows = targets.shape
        self._n_sub, size = self._rule.parts.n_sub, kind.block_size
        self._scales = torch.zeros((n // self._n_sub, n_rows), device=targets.device)
        self._lows = torch.zeros_like(self._scales)
        self._units = torch.zeros((n // size, 2, n_rows), device=targets.device) if self._rule.coded else None

    @property
    def rounded(self) -> Any:
        """What the rows are rounded to."""
        return self.targets - self.errors

    def retarget(self, targets: Any) -> None:
        """Other targets for the values that the rows have."""
        self.errors += targets - self.targets
        self.targets = targets

    def first(self) -> None:
        """Settle all columns in order: scales by the encoder's search, levels with feedback."""
        c, size = self._curvature, self._kind.block_size
        solve = c.blocks(size).solve
        for start in range(0, c.n, size):
            stop = start + size
            targets = self.targets[start:stop]
            if start:
                pushed = c.factor[start:stop, :start] @ self.errors[:start]
                targets = torch.addmm(targets, solve[start // size], pushed)
            self._search(targets, start // size)
            panel = self._prepared(start, stop, targets, False)
            panel.moved.copy_(targets)
            panel.errors.zero_()
            panel.run()
            self._take(panel, start, stop)
            self.errors[start:stop] = panel.errors + (self.targets[start:stop] - targets)

    def again(self) -> None:
        """Settle every sub-block anew, as all others are."""
        c = self._curvature
        for start in range(0, c.n, PANEL):
            stop = min(c.n, start + PANEL)
            errors, own = self.errors[start:stop], c.damped[start:stop, start:stop]
            outside = torch.addmm(c.damped[start:stop] @ self.errors, own, errors, alpha=-1)
            panel = self._prepared(start, stop, self.targets[start:stop], True)
            steps = c.panel(True, start, stop, self._n_sub)
            shape = len(steps.solve), self._n_sub, outside.shape[1]
            torch.baddbmm(panel.targets.view(shape), steps.solve, outside.view(shape), out=panel.moved.view(shape))
            panel.errors.copy_(errors)
            panel.run()
            self._take(panel, start, stop)
            self.errors[start:stop] = panel.errors

    def _prepared(self, start: int, stop: int, targets: Any, again: bool) -> _Panel:
        """A panel that holds what columns `start` to `stop` are."""
        panel = self._panel(self._kind, stop - start, self.targets.shape[1], again)
        steps = self._curvature.panel(again, start, stop, self._n_sub)
        subs = slice(start // self._n_sub, stop // self._n_sub)
        for name in ("push", "chain", "factor"):
            getattr(panel, name).copy_(getattr(steps, name))
        panel.targets.copy_(targets)
        panel.scales.copy_(self._scales[subs])
        panel.lows.copy_(self._lows[subs])
        if self._units is not None:
            panel.units.copy_(self._units[start // self._kind.block_size])
        if again:
            panel.values.copy_(self._values[start:stop])
        return panel

    def _take(self, panel: _Panel, start: int, stop: int) -> None:
        subs = slice(start // self._n_sub, stop // self._n_sub)
        self._values[start:stop] = panel.values
        self._scales[subs], self._lows[subs] = panel.scales, panel.lows

    def _search(self, targets: Any, block: int) -> None:
        """The scales of one block of every row, as the encoder chooses them for `targets`: on the processor."""
        size, count = self._kind.block_size, self._kind.block_size // self._n_sub
        rows = targets.t().contiguous().cpu().numpy()
        weights = self._curvature.left[block * size : (block + 1) * size]
        codes = np.empty((len(rows), 2 * count), np.int32)
        floats = np.empty((len(rows), 2), np.float32)

        def search(start: int) -> None:
            some = rows[start : start + _ROWS]
            part = slice(start, start + len(some))
            codes[part], floats[part] = self._rule.take(blocks.encode(some, self._kind, weights), len(some))

        for _ in self._pool.map(search, range(0, len(rows), _ROWS)):
            pass
        found = torch.from_numpy(floats).to(targets.device).t()
        subs = slice(block * count, (block + 1) * count)
        if self._units is None:
            self._scales[subs], self._lows[subs] = found[:1], found[1:]
            return
        self._units[block] = found
        coded = torch.from_numpy(codes).to(targets.device).t().float()
        self._scales[subs], self._lows[subs] = coded[:count], coded[count:]

    def packed(self) -> np.ndarray:
        """The rows as blocks: uint8 [n_rows, bytes of a row]."""
        count, (n, n_rows) = self._kind.block_size // self._n_sub, self.targets.shape
        out = np.empty((n_rows, self._kind.row_nbytes(n)), np.uint8)
        values = (self._values + 128).to(torch.uint8).t().contiguous().cpu().numpy()
        scales, lows = (
            each.t().contiguous().cpu().numpy().reshape(n_rows, -1, count) for each in (self._scales, self._lows)
        )
        units = None if self._units is None else self._units.permute(2, 0, 1).contiguous().cpu().numpy()

        def pack(start: int) -> None:
            part = slice(start, start + _ROWS)
            own = None if units is None else units[part]
            self._rule.pack(values[part], scales[part], lows[part], own, out[part])

        for _ in self._pool.map(pack, range(0, n_rows, _ROWS)):
            pass
        return out
