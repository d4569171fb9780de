"""Executing plans: read, encode and write as a stream, in bounded memory.

The rows of every tensor are cut into pieces. A pool of threads decodes each piece to float32 and encodes it for
every output; the calling thread writes the results in order. The kernels release the GIL, so reading, arithmetic and
writing overlap. Memory is a few pieces per thread, whatever the size of a tensor.
"""

from __future__ import annotations

import logging
import os
import threading
import time
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
from quantkit.formats.gguf import encode_header
from quantkit.formats.output import GGUFOutput
from quantkit.machine import default_threads
from quantkit.pipeline.plan import Plan, PlannedTensor
from quantkit.sources.source import TensorSource, open_model
from quantkit.wording import count_text, size_text

if TYPE_CHECKING:
    import numpy as np

    from quantkit.compile.ahead import KernelJob
    from quantkit.formats.unfinished import WorkDirectory
    from quantkit.pipeline.cluster import Cluster

log = logging.getLogger(__name__)

PIECE = 1 << 20  # weights handed to a thread at a time
BITE = 1 << 16  # weights decoded at a time: as float32 they fit the second-level cache
MAPPED = 64 << 20  # bytes of a tensor that may stay mapped after being read
PART = 1 << 26  # weights handed to a worker of a cluster at a time
SAVED = 2.0  # seconds between two records of what is done
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
    work: WorkDirectory | None = None,
    cluster: Cluster | None = None,
) -> list[Path]:
    """Write every (plan, path) of `outputs` in one reading of `source`; returns the paths.

    A split plan's shards are named after its path. All plans must hold the same tensors in the same order, as plans for
    one source do. `progress(tensor, nbytes)` is called as bytes of the source are finished. `max_buffer_size`, in
    bytes, bounds the memory of the pieces being processed. An existing file is refused, or replaced with `force`; with
    `group`, the files belong to that, appear when it does, and its `force` counts. With `work`, tensors that are done
    are kept there when the run is stopped, and not done again when it is repeated. With `cluster`, its workers encode
    and write; `threads` and `max_buffer_size` then do nothing.
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
        journal = None if work is None else Journal(work, source, plans, group)
        kept_in, present = (None, frozenset[str]()) if journal is None else (journal.directory, journal.done)
        shards = [
            [GGUFOutput(group.add(name, kept_in=kept_in), metadata, infos, present)
             for name, metadata, infos in plan.files(path)]
            for plan, path in zip(plans, paths, strict=True)
        ]  # fmt: skip
        group.check_space()
        for each in shards:
            for shard in each:
                stack.enter_context(shard)
        if journal is not None:
            journal.files = [shard for each in shards for shard in each]
        for line in plans[0]:
            if progress is not None and line.info.name in present:
                progress(line.info.name, source.tensors[line.source_name].nbytes)
        todo = (p for p in pieces(plans[0], piece if cluster is None else PART)
                if plans[0].tensors[p.index].info.name not in present)  # fmt: skip
        if cluster is not None:
            _execute_on(cluster, source, plans, shards, list(todo), allow_nonfinite, progress, journal)
        else:
            files = [_Shards(each) for each in shards]
            mapped = min(MAPPED, max_buffer_size or MAPPED)
            writer = _Writer(files, plans[0], source, mapped, progress, journal)
            encoded = encode_pieces(source, plans, todo, threads, allow_nonfinite)
            stack.enter_context(closing(encoded))
            for p, results in encoded:
                writer.take(p, results)
    return [path for plan, target in zip(plans, paths, strict=True) for path, _, _ in plan.files(target)]


class Journal:
    """Which tensors of a run are whole in all its files, kept in `work`, so that a repeated run goes on after them.

    Raises QuantkitError when the work there is of another run: of another source, other types or other weights.
    """

    def __init__(self, work: WorkDirectory, source: TensorSource, plans: Sequence[Plan], group: OutputGroup) -> None:
        self._work, self._digest = work, _identify(source, plans)
        record = work.load_record(self._digest).get("tensors", [])
        self.done = frozenset(name for name in record if isinstance(name, str))
        self.directory = work.make()
        self.files: Sequence[GGUFOutput] = ()
        self._names, self._saved = list(self.done), time.monotonic()
        work.save_record(self._digest, {"tensors": self._names})
        group.then(work.remove)

    def finish(self, name: str) -> None:
        """Note that tensor `name` is whole; now and then see what has been noted on the disk, and record it."""
        self._names.append(name)
        if time.monotonic() - self._saved >= SAVED:
            for file in self.files:
                file.sync()
            self._work.save_record(self._digest, {"tensors": self._names})
            self._saved = time.monotonic()


def _identify(source: TensorSource, plans: Sequence[Plan]) -> str:
    """What the bytes of a run depend on, without reading every weight: a digest."""
    import hashlib

    import numpy as np

    from quantkit import __version__

    digest = hashlib.sha256(__version__.encode())
    for path in source.files:
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    for plan in plans:
        for path, metadata, infos in plan.files("x.gguf"):
            digest.update(str(path).encode() + encode_header(metadata, infos, metadata.alignment))
        for line in plan:
            digest.update(f"{line.source_name} {line.source_type.name}".encode())
            if line.weights is not None:
                digest.update(np.ascontiguousarray(line.weights).tobytes())
    for line in plans[0]:
        digest.update(np.ascontiguousarray(source.read(line.source_name, 0, 1)).tobytes())
    return digest.hexdigest()


def _execute_on(
    cluster: Cluster,
    source: TensorSource,
    plans: Sequence[Plan],
    shards: Sequence[Sequence[GGUFOutput]],
    parts: Sequence[Piece],
    allow_nonfinite: bool,
    progress: Progress | None,
    journal: Journal | None,
) -> None:
    """Have `parts` of tensors encoded and written by the workers of `cluster`."""
    from quantkit.pipeline.cluster import Task, packed

    what, tasks, jobs = packed(source), [], []
    for some in _together(parts, plans[0]):
        job = []
        for part in some:
            lines = [plan.tensors[part.index] for plan in plans]
            name = lines[0].info.name
            job.append((lines, part, [_file_of(each, name).place(name) for each in shards]))
        lines, part, _ = job[0]
        label = (
            lines[0].info.name if part.start == 0 and part.last else f"{lines[0].info.name}[{part.start}:{part.stop}]"
        )
        if len(some) > 1:
            label += f" and {len(some) - 1} more"
        tasks.append(Task(label, encode_parts, (what, job, allow_nonfinite)))
        jobs.append(some)
    left = Counter(part.index for part in parts)

    for number, _ in cluster.run(tasks):
        for part in jobs[number]:
            line = plans[0].tensors[part.index]
            for plan, each in zip(plans, shards, strict=True):
                info = plan.tensors[part.index].info
                row = info.type.row_nbytes(info.n_per_row)
                _file_of(each, info.name).written_elsewhere(info.name, part.start * row, (part.stop - part.start) * row)
            left[part.index] -= 1
            if journal is not None and not left[part.index]:
                journal.finish(line.info.name)
            if progress is not None:
                progress(line.info.name, (part.stop - part.start) * line.source_type.row_nbytes(line.info.n_per_row))


def _together(parts: Iterable[Piece], plan: Plan) -> Iterator[list[Piece]]:
    """`parts` in order, small ones together: a task takes a scheduler as long as some million weights a worker."""
    some: list[Piece] = []
    size = 0
    for part in parts:
        n = (part.stop - part.start) * plan.tensors[part.index].info.n_per_row
        if some and size + n > PART // 4:
            yield some
            some, size = [], 0
        some.append(part)
        size += n
    if some:
        yield some


def _file_of(shards: Sequence[GGUFOutput], name: str) -> GGUFOutput:
    return next(file for file in shards if name in file)


def encode_parts(
    source: bytes,
    parts: Sequence[tuple[Sequence[PlannedTensor], Piece, Sequence[tuple[Path, tuple[int, int], int]]]],
    allow_nonfinite: bool,
) -> None:
    """Encode parts of tensors into unfinished files: what a worker does.

    Each of `parts` has the tensor's lines, one of each plan, the part, and its places: the files, what identifies them,
    and where the tensor begins in each. `source` is packed.
    """
    from quantkit.formats.atomic import SharedFile
    from quantkit.pipeline.cluster import opened

    model = opened(source)
    with ExitStack() as stack:
        files: dict[tuple[Path, tuple[int, int]], SharedFile] = {}
        for _, _, places in parts:
            for path, identity, _ in places:
                if (path, identity) not in files:
                    files[path, identity] = stack.enter_context(SharedFile(path, identity))
        # What is encoded goes to the disk while what comes after it is encoded. It ends before the files are closed.
        disk = stack.enter_context(ThreadPoolExecutor(1))
        written: Future[None] | None = None

        def write(pieces: Sequence[tuple[SharedFile, int, np.ndarray]], last: bool) -> None:
            for file, at, data in pieces:
                file.write_at(at, data)
                if last:
                    file.sync()

        for lines, part, places in parts:
            step = max(1, PIECE // max(1, lines[0].info.n_per_row))
            for start in range(part.start, part.stop, step):
                piece = Piece(part.index, start, min(start + step, part.stop), False)
                results = _encode_piece(model, lines, piece, allow_nonfinite, lambda: False)
                pieces = [
                    (files[path, identity], at + start * line.info.type.row_nbytes(line.info.n_per_row), data)
                    for (path, identity, at), line, data in zip(places, lines, results, strict=True)
                ]
                if written is not None:
                    written.result()
                written = disk.submit(write, pieces, piece.stop == part.stop)
            model.release(lines[0].source_name)
        if written is not None:
            written.result()


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
        self,
        files: Sequence[_Shards],
        plan: Plan,
        source: TensorSource,
        release_after: int,
        progress: Progress | None,
        journal: Journal | None = None,
    ) -> None:
        self._files, self._plan, self._source, self._journal = files, plan, source, journal
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
        if piece.last and self._journal is not None:
            self._journal.finish(tensor.info.name)
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
