"""Executing plans: read, encode and write as a stream, in bounded memory.

The rows of every tensor are cut into pieces. A pool of threads decodes each piece to float32 and encodes it for
every output; the calling thread writes the results in order. The kernels release the GIL, so reading, arithmetic and
writing overlap. Memory is a few pieces per thread, whatever the size of a tensor.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputGroup
from quantkit.formats.output import GGUFOutput
from quantkit.machine import default_threads
from quantkit.pipeline.plan import Plan, PlannedTensor
from quantkit.sources.source import TensorSource, open_model
from quantkit.wording import count_text, size_text

if TYPE_CHECKING:
    import numpy as np

    from quantkit.compile.ahead import KernelJob

log = logging.getLogger(__name__)

PIECE = 1 << 20  # weights handed to a thread at a time
BITE = 1 << 16  # weights decoded at a time: as float32 they fit the second-level cache
MAPPED = 64 << 20  # bytes of a tensor that may stay mapped after being read
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
HALF_MAX = 65504.0

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of the tensor that every plan has at place `index`."""

    index: int
    start: int
    stop: int
    last: bool


def execute(
    source: TensorSource | str | os.PathLike[str],
    outputs: Sequence[tuple[Plan, str | os.PathLike[str]]],
    *,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    max_buffer_size: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    group: OutputGroup | None = None,
) -> list[Path]:
    """Write every (plan, path) of `outputs` in one reading of `source`; returns the paths.

    A split plan's shards are named after its path. All plans must hold the same tensors in the same order, as plans for
    one source do. `progress(tensor, nbytes)` is called as bytes of the source are finished. `max_buffer_size`, in
    bytes, bounds the memory of the pieces being processed. An existing file is refused, or replaced with `force`; with
    `group`, the files belong to that, appear when it does, and its `force` counts.
    Raises QuantkitError for NaN or infinity in a weight (unless `allow_nonfinite`), for weights that a type cannot
    hold, and when a file cannot be written; no output is left behind then.
    """
    source = open_model(source)
    plans = [plan for plan, _ in outputs]
    paths = [Path(path) for _, path in outputs]
    _check_plans(plans)
    threads = threads or default_threads()
    piece = PIECE
    if max_buffer_size is not None:
        # A piece costs the bytes read and those encoded, at most 4 a weight and output.
        piece = max(1, min(PIECE, max_buffer_size // (4 * (len(plans) + 1) * 3 * threads)))

    for plan, path in zip(plans, paths, strict=True):
        kinds = Counter(tensor.info.type.name for tensor in plan)
        types = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
        log.info("%s: %s, %s (%s)", path, plan.name, size_text(plan.file_size), types)
    log.info("%s: read once, on %s", source.label, count_text(threads, "thread"))

    with ExitStack() as stack:
        if group is None:
            group = stack.enter_context(OutputGroup(force=force))
        group.protect(source.files)
        shards = [
            [GGUFOutput(group.add(name), metadata, infos) for name, metadata, infos in plan.files(path)]
            for plan, path in zip(plans, paths, strict=True)
        ]
        group.check_space()
        files = [_Shards([stack.enter_context(shard) for shard in each]) for each in shards]
        writer = _Writer(files, plans[0], source, min(MAPPED, max_buffer_size or MAPPED), progress)
        encoded = encode_pieces(source, plans, pieces(plans[0], piece), threads, allow_nonfinite)
        stack.enter_context(closing(encoded))
        for p, results in encoded:
            writer.take(p, results)
    return [path for plan, target in zip(plans, paths, strict=True) for path, _, _ in plan.files(target)]


def encode_pieces(
    source: TensorSource, plans: Sequence[Plan], wanted: Iterable[Piece], threads: int, allow_nonfinite: bool = False
) -> Generator[tuple[Piece, list[np.ndarray]]]:
    """Each piece in order, with its bytes for every plan: uint8 of shape (rows, bytes of a row).

    `threads` work ahead, a few pieces each. Close the generator to end them early; they are not waited for.
    Raises QuantkitError as `execute` does.
    """
    given_up = threading.Event()

    def work(p: Piece) -> list[np.ndarray]:
        return _encode_piece(source, [plan.tensors[p.index] for plan in plans], p, allow_nonfinite, given_up.is_set)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantkit")
    waiting: deque[tuple[Piece, Future[list[np.ndarray]]]] = deque()
    try:
        for p in wanted:
            waiting.append((p, pool.submit(work, p)))
            if len(waiting) >= 3 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # The remaining pieces are not needed any more, and one may be compiling a kernel for seconds.
        given_up.set()
        pool.shutdown(wait=False, cancel_futures=True)


def quantizing_kernels(plans: Iterable[Plan]) -> list[KernelJob]:
    """The kernels that `execute` will need for `plans`, to be compiled ahead."""
    tensors = [t for plan in plans for t in plan if not t.is_copy]
    encoded = dict.fromkeys((t.info.type, t.weights is not None) for t in tensors)
    return blocks.codec_kernels(encoded, dict.fromkeys(t.source_type for t in tensors))


class _Shards:
    """The files of one output, filled one after the other."""

    def __init__(self, files: Sequence[GGUFOutput]) -> None:
        self._files = deque(files)

    def write(self, data: np.ndarray) -> None:
        """Append the bytes of the next piece."""
        while self._files and self._files[0].complete:
            self._files.popleft()
        if data.nbytes:
            self._files[0].write(data)


def _check_plans(plans: Sequence[Plan]) -> None:
    for plan in plans:
        plan.check()
    for plan in plans[1:]:
        if [t.source_name for t in plan] != [t.source_name for t in plans[0]]:
            raise QuantkitError("plans that are carried out together must hold the same tensors in the same order")
    tensors = [t for plan in plans for t in plan if not t.is_copy]
    for kind in {t.info.type for t in tensors} | {t.source_type for t in tensors}:
        blocks.block(kind)


def pieces(plan: Plan, size: int = PIECE) -> Iterator[Piece]:
    """The tensors of `plan` cut into pieces of about `size` weights, in order."""
    for index, tensor in enumerate(plan):
        info = tensor.info
        step = max(1, size // max(1, info.n_per_row))
        # Each matrix of a 3-D tensor has importance weights of its own: pieces do not cross from one to the next.
        per_matrix = info.shape[1] if len(info.shape) > 2 else info.n_rows
        for matrix in range(0, info.n_rows, max(1, per_matrix)):
            end = min(info.n_rows, matrix + per_matrix)
            for start in range(matrix, end, step):
                stop = min(end, start + step)
                yield Piece(index, start, stop, last=stop == info.n_rows)


class _Writer:
    """Takes finished pieces in order: writes them, releases the memory that reading mapped, reports progress."""

    def __init__(
        self, files: Sequence[_Shards], plan: Plan, source: TensorSource, release_after: int, progress: Progress | None
    ) -> None:
        self._files, self._plan, self._source = files, plan, source
        self._release_after, self._progress, self._mapped = release_after, progress, 0

    def take(self, piece: Piece, results: Sequence[np.ndarray]) -> None:
        """Write a piece."""
        for file, data in zip(self._files, results, strict=True):
            file.write(data)
        tensor = self._plan.tensors[piece.index]
        nbytes = (piece.stop - piece.start) * tensor.source_type.row_nbytes(tensor.info.n_per_row)
        self._mapped += nbytes
        # A tensor of experts can be larger than memory, so release what has been read before its end.
        if piece.last or self._mapped >= self._release_after:
            self._source.release(tensor.source_name)
            self._mapped = 0
        if self._progress is not None:
            self._progress(tensor.info.name, nbytes)


def _encode_piece(
    source: TensorSource,
    tensors: Sequence[PlannedTensor],
    piece: Piece,
    allow_nonfinite: bool,
    given_up: Callable[[], bool],
) -> list[np.ndarray]:
    """Encode a piece for every output; stop early once `given_up`."""
    import numpy as np

    info, kind = tensors[0].info, tensors[0].source_type
    rows = source.read(tensors[0].source_name, piece.start, piece.stop)
    check = kind in FLOAT_TYPES and not allow_nonfinite
    if all(t.is_copy for t in tensors):
        rows = np.ascontiguousarray(rows)
        if check and (at := blocks.first_nonfinite_stored(rows, kind)) >= 0:
            raise _nonfinite(source, tensors[0], blocks.decode(rows, kind), at, piece.start)
        return [rows for _ in tensors]
    results = []
    for t in tensors:
        encoded_shape = (len(rows), t.info.type.row_nbytes(info.n_per_row))
        results.append(np.ascontiguousarray(rows) if t.is_copy else np.empty(encoded_shape, np.uint8))
    matrix = piece.start // info.shape[1] if len(info.shape) > 2 else 0
    step = max(1, BITE // max(1, info.n_per_row))
    bite = np.empty((min(step, len(rows)), info.n_per_row), np.float32)
    for start in range(0, len(rows), step):
        if given_up():
            break
        part = rows[start : start + step]
        values = blocks.decode(part, kind, bite[: len(part)])
        if check and (at := blocks.first_nonfinite(values)) >= 0:
            raise _nonfinite(source, tensors[0], values, at, piece.start + start)
        for tensor, result in zip(tensors, results, strict=True):
            if not tensor.is_copy:
                weights = None if tensor.weights is None else tensor.weights[matrix]
                encoded = blocks.encode(values, tensor.info.type, weights, result[start : start + step])
                if check and blocks.largest(values) > HALF_MAX:
                    _check_range(source, tensor, encoded)
    return results


def _nonfinite(
    source: TensorSource, tensor: PlannedTensor, values: np.ndarray, at: int, first_row: int
) -> QuantkitError:
    row, column = divmod(at, tensor.info.n_per_row)
    return QuantkitError(
        f"{source.label}: tensor {tensor.source_name!r} holds {values[row, column]} at row {first_row + row}, "
        f"column {column}; the checkpoint is damaged",
        option="allow_nonfinite",
    )


def _check_range(source: TensorSource, tensor: PlannedTensor, encoded: np.ndarray) -> None:
    """Refuse weights so large that a block's float16 scale would become infinite."""
    if blocks.first_nonfinite(blocks.decode(encoded, tensor.info.type)) >= 0:
        raise QuantkitError(
            f"{source.label}: tensor {tensor.source_name!r} holds weights too large for {tensor.info.type.name}",
            option="allow_nonfinite",
        )
