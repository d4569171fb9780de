"""`quantkit imatrix`: importance matrices, computed, combined and shown."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantkit.cli.console import (
    Backend,
    Batch,
    Chunks,
    Context,
    Device,
    Force,
    Json,
    Memory,
    Pre,
    Precision,
    Quiet,
    Revision,
    Threads,
    Verbose,
    Workers,
    emit,
    joined,
    measure_progress,
    measured_ahead,
    note,
    read_text,
    setup,
)
from quantkit.errors import QuantkitError
from quantkit.evaluate.texts import CALIBRATION
from quantkit.wording import count_text

if TYPE_CHECKING:
    from quantkit.formats.atomic import OutputGroup
    from quantkit.formats.imatrix import ImportanceMatrix
    from quantkit.pipeline.naming import Destination

Format = Literal["gguf", "dat"]


def command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="GGUF file, checkpoint directory, or hub id ORG/NAME; none to combine files."
        ),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            "--text", "--file", "-f", metavar="FILE", help="Calibration text: a file (UTF-8), or wikitext-2[:SPLIT]."
        ),
    ] = CALIBRATION,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|DIR", show_default="imatrix.gguf", help="File to write, or directory."
        ),
    ] = None,
    force: Force = False,
    in_file: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Importance matrix to add; repeat it for several.")
    ] = [],  # noqa: B006
    output_format: Annotated[
        Format | None,
        typer.Option(metavar="FORMAT", show_default="dat for *.dat, else gguf", help="Format: gguf or dat."),
    ] = None,
    n_ctx: Context = 512,
    chunks: Chunks = None,
    from_chunk: Annotated[int, typer.Option(min=0, metavar="N", help="Chunks to skip at the start of the text.")] = 0,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Collect data for output.weight too.")
    ] = False,
    output_frequency: Annotated[
        int, typer.Option(min=0, metavar="N", help="Write the file every N chunks; 0: only at the end.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the chunks in the output file.")] = False,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Show statistics of the importance matrix.")
    ] = False,
    batch: Batch = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    memory: Memory = None,
    pre: Pre = None,
    revision: Revision = None,
    cluster: Workers = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compute an importance matrix for quantize --imatrix, as llama-imatrix does; or combine and show such files.

    The text is cut into chunks of --n-ctx tokens; for every matrix of the model, the squares of its
    inputs are summed column by column.
    """
    setup(verbose, quiet)
    from quantkit.cli.parsing import parse_memory
    from quantkit.evaluate.settings import Chunking, Compute
    from quantkit.formats.imatrix import ImportanceMatrix
    from quantkit.pipeline.naming import Destination

    compute = Compute(backend=backend, device=device, precision=precision, threads=threads, memory=parse_memory(memory))

    if source is None and not in_file:
        raise QuantkitError("nothing to do: name a model, or files to combine or show with --in-file")
    if resume and (source is None or in_file):
        raise QuantkitError(
            "--resume needs a model and cannot be used with --in-file: it continues from the output file"
        )
    destination = Destination.of(output)
    target = destination.file("imatrix.gguf") if output is not None or source is not None else None
    if target is None and not show_statistics:
        raise QuantkitError("name the file to write with -o, or show the files with --show-statistics")
    before = ImportanceMatrix()
    resuming = resume and target is not None and target.is_file()
    saver = None if target is None else _Saver(target, output_format, force or resuming, destination)
    if saver is not None:
        saver.inputs = [*in_file, Path(text)]
        saver.check()
    for path in in_file:
        before.merge(ImportanceMatrix.load(path).counted_in_tokens(n_ctx))
    stored = ImportanceMatrix.load(target) if resuming and target is not None else None
    if stored is not None:
        note(f"{target}: continuing after {count_text(stored.chunk_count, 'chunk')}")
    matrix = before
    if source is not None:
        words = read_text(text)
        from quantkit.evaluate.importance import importance_matrix
        from quantkit.sources.source import open_model

        model = open_model(source, revision=revision, pre=pre)

        if saver is not None:
            saver.inputs += model.files
            saver.check()

        def save_so_far(so_far: ImportanceMatrix) -> None:
            if saver is not None:
                saver.save(_merged(before, so_far) if in_file else so_far)

        ahead = nullcontext() if cluster else measured_ahead(model, threads, backend)
        with ahead, joined(cluster) as workers, measure_progress("imatrix") as progress:
            new = importance_matrix(
                model,
                words,
                chunking=Chunking(n_ctx=n_ctx, chunks=chunks, batch=batch),
                compute=compute,
                process_output=process_output,
                from_chunk=from_chunk,
                dataset=text,
                resume=stored,
                snapshot=save_so_far,
                snapshot_every=output_frequency,
                progress=progress,
                cluster=workers,
            )
        matrix = _merged(before, new) if in_file else new
    if saver is not None:
        saver.save(matrix)
        made = "" if source is None else f" ({'numpy' if backend == 'numpy' else f'torch {device}'}, {precision})"
        note(f"{target}: {count_text(len(matrix.entries), 'tensor')}, {count_text(matrix.chunk_count, 'chunk')}{made}")
    written = {"path": target, "n_tensors": len(matrix.entries), "n_chunks": matrix.chunk_count}
    if show_statistics:
        from quantkit.evaluate.importance import layer_statistics, statistics
        from quantkit.report.measurements import importance_tables

        rows = statistics(matrix)
        layers = layer_statistics(rows)
        emit(importance_tables(rows, layers), {**written, "tensors": rows, "layers": layers}, as_json)
    elif as_json:
        emit("", written, True)


def _merged(before: ImportanceMatrix, new: ImportanceMatrix) -> ImportanceMatrix:
    from quantkit.formats.imatrix import ImportanceMatrix

    both = ImportanceMatrix()
    both.merge(before)
    both.merge(new)
    return both


class _Saver:
    """Writes the matrix to a file: the first time only if it may replace what is there, then as often as asked."""

    def __init__(self, path: Path, output_format: Format | None, force: bool, destination: Destination) -> None:
        self.path, self._force, self._directory = path, force, destination.directory
        self._legacy = output_format == "dat" or (output_format is None and path.suffix == ".dat")
        self.inputs: list[Path] = []

    def check(self) -> None:
        """Raise QuantkitError when the file may not be written, before anything is computed."""
        self._group().add(self.path)

    def _group(self) -> OutputGroup:
        from quantkit.formats.atomic import OutputGroup

        return OutputGroup(force=self._force, inputs=self.inputs, directory=self._directory)

    def save(self, matrix: ImportanceMatrix) -> None:
        """Write `matrix`; what this command has written before is replaced."""
        with self._group() as group:
            file = group.add(self.path)
            if self._legacy:
                matrix.save_legacy(file)
            else:
                matrix.save(file)
        self._force = True
