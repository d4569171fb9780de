"""Importance-matrix files, as llama-imatrix writes and llama-quantize reads them: GGUF, and the older .dat.

For every matrix of a model they hold the sums of squares of its inputs, column by column, over a calibration text, and
how many tokens were summed (for each expert separately). Layouts: llama.cpp's imatrix tool.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputFile, write_whole
from quantkit.formats.gguf import MAGIC, MAX_NAME, GGUFFile, Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.formats.reading import InputFile

_DIGEST, _FIRST_CHUNK = "quantkit.calibration.sha256", "quantkit.calibration.first_chunk"
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass
class Importance:
    """One tensor's entry: `sums` is float32 of shape (n_matrices, n_per_row), `counts` int64 of n_matrices tokens."""

    sums: np.ndarray
    counts: np.ndarray

    def _spread(self, n_matrices: int) -> Importance:
        """The entry as one of `n_matrices` that have one count together."""
        if len(self.counts) == n_matrices or self.sums.size % n_matrices:
            return self
        return Importance(self.sums.reshape(n_matrices, -1), np.repeat(self.counts, n_matrices))

    def weights(self) -> np.ndarray:
        """Mean squares, float32 of the shape of `sums`; all 1 for an expert that saw no token."""
        counts = self.counts.astype(np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            means = self.sums / counts
        return np.where(counts > 0, means, np.float32(1)).astype(np.float32)


@dataclass
class ImportanceMatrix:
    """The importance of a model's columns: entries by tensor name, and where they come from.

    `chunk_count` and `chunk_size` (in tokens) are those of the calibration run, `datasets` its texts. `text_sha256` is
    the digest of its only text, of which `first_chunk` chunks were left out; "" where it is not known, or there were
    several.
    """

    entries: dict[str, Importance] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0
    text_sha256: str = ""
    first_chunk: int = 0

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImportanceMatrix:
        """Read either format. Raises QuantkitError for a file that is neither, or that is malformed or not finite."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            raise QuantkitError(f"{path}: {error.strerror or error}") from None
        matrix = _load_gguf(path) if start == MAGIC else _load_legacy(path)
        if not matrix.entries:
            raise QuantkitError(f"{path}: the importance matrix has no entries")
        for name, entry in matrix.entries.items():
            if not (np.isfinite(entry.sums) & (entry.sums >= 0)).all() or (entry.counts < 0).any():
                raise QuantkitError(f"{path}: the sums of squares for {name!r} are negative or not finite")
        return matrix

    def save(self, target: str | os.PathLike[str] | OutputFile) -> None:
        """Write the GGUF format, entries in order of their names. `target` is as for `GGUFOutput`."""
        metadata = Metadata()
        metadata.set("general.type", ValueType.STRING, "imatrix")
        metadata.set("imatrix.datasets", ValueType.ARRAY, self.datasets, ValueType.STRING)
        metadata.set("imatrix.chunk_count", ValueType.UINT32, self.chunk_count)
        metadata.set("imatrix.chunk_size", ValueType.UINT32, self.chunk_size)
        if self.text_sha256:
            metadata.set(_DIGEST, ValueType.STRING, self.text_sha256)
            metadata.set(_FIRST_CHUNK, ValueType.UINT32, self.first_chunk)
        infos, arrays = [], []
        for name, entry in sorted(self.entries.items(), key=lambda item: _bytes(item[0])):
            n_matrices, n_per_row = entry.sums.shape
            infos.append(TensorInfo(name + SUMS, (n_per_row, n_matrices), GGMLType.F32))
            infos.append(TensorInfo(name + COUNTS, (1, n_matrices), GGMLType.F32))
            arrays += [np.ascontiguousarray(entry.sums, "<f4"), np.ascontiguousarray(entry.counts, "<f4")]
        with GGUFOutput(target, metadata, infos) as output:
            for array in arrays:
                output.write(array)

    def save_legacy(self, target: str | os.PathLike[str] | OutputFile) -> None:
        """Write the older .dat format, which leaves out tensors that saw no token. `target` is as for `save`."""
        size = max(1, self.chunk_size)
        parts = []
        for name, entry in sorted(self.entries.items(), key=lambda item: _bytes(item[0])):
            if not entry.counts.any():
                continue
            calls = (int(entry.counts.max()) + size - 1) // size
            values = entry.weights() * np.float32(calls)
            encoded = _bytes(name)
            parts.append(struct.pack(f"<i{len(encoded)}sii", len(encoded), encoded, calls, values.size))
            parts.append(values.astype("<f4").tobytes())
        dataset = _bytes(self.datasets[-1] if self.datasets else "")
        tail = struct.pack(f"<ii{len(dataset)}s", self.chunk_count, len(dataset), dataset)
        write_whole(target, struct.pack("<i", len(parts) // 2) + b"".join(parts) + tail)

    def select(self, include: list[str], exclude: list[str]) -> ImportanceMatrix:
        """The entries whose name holds one of `include` (all, if it is empty) and none of `exclude`."""
        kept = {
            name: entry
            for name, entry in self.entries.items()
            if not any(part in name for part in exclude) and (not include or any(part in name for part in include))
        }
        return ImportanceMatrix(kept, self.datasets, self.chunk_count, self.chunk_size)

    def counted_in_tokens(self, chunk_size: int) -> ImportanceMatrix:
        """This matrix, or one read from the older format, which counts chunks, with chunks of so many tokens."""
        if self.chunk_size:
            return self
        entries = {
            name: Importance(entry.sums * np.float32(chunk_size), entry.counts * chunk_size)
            for name, entry in self.entries.items()
        }
        return ImportanceMatrix(entries, self.datasets, self.chunk_count, chunk_size)

    def merge(self, other: ImportanceMatrix) -> None:
        """Add the sums and counts of `other`. Raises QuantkitError where a tensor has another shape there."""
        for name, entry in other.entries.items():
            mine = self.entries.get(name)
            if mine is None:
                self.entries[name] = Importance(entry.sums.copy(), entry.counts.copy())
                continue
            if mine.sums.size == entry.sums.size and len(mine.counts) != len(entry.counts):
                # The older format counts all experts of a tensor together.
                n_matrices = max(len(mine.counts), len(entry.counts))
                mine, entry = mine._spread(n_matrices), entry._spread(n_matrices)
                self.entries[name] = mine
            if mine.sums.shape != entry.sums.shape:
                raise QuantkitError(
                    f"importance matrices of different models: {name!r} has sums of {entry.sums.shape} "
                    f"and of {mine.sums.shape}"
                )
            mine.sums = mine.sums + entry.sums
            mine.counts = mine.counts + entry.counts
        self.datasets += [name for name in other.datasets if name not in self.datasets]
        self.text_sha256, self.first_chunk = "", 0
        self.chunk_count += other.chunk_count
        self.chunk_size = self.chunk_size or other.chunk_size

    def weights(self) -> dict[str, np.ndarray]:
        """Importance weights by tensor name, as llama-quantize computes them from the file."""
        return {name: entry.weights() for name, entry in self.entries.items()}


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _load_gguf(path: Path) -> ImportanceMatrix:
    file = GGUFFile(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in file.metadata:
            raise QuantkitError(f"{path}: not an importance matrix: its metadata lacks {key}")
    entries = {}
    for name, info in file.tensors.items():
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        counts = file.tensors.get(stem + COUNTS)
        if counts is None or info.type != GGMLType.F32 or counts.type != GGMLType.F32:
            raise QuantkitError(f"{path}: {stem!r} has no sums and counts in F32")
        n_matrices = counts.n_elements
        if info.n_elements % n_matrices:
            raise QuantkitError(f"{path}: {stem!r} has {info.n_elements} sums for {n_matrices} counts")
        sums = file.read(name).reshape(-1).view("<f4").reshape(n_matrices, -1)
        tokens = np.rint(file.read(counts.name).reshape(-1).view("<f4"))
        if not (np.abs(tokens) < 2**53).all():
            raise QuantkitError(f"{path}: {stem!r} has impossible counts")
        entries[stem] = Importance(sums, tokens.astype(np.int64))
    ordered = dict(sorted(entries.items(), key=lambda item: _bytes(item[0])))
    chunk_count, chunk_size = (file.metadata.integer(f"imatrix.chunk_{what}") for what in ("count", "size"))
    digest, first = file.metadata.string(_DIGEST, ""), file.metadata.integer(_FIRST_CHUNK, default=0)
    datasets = file.metadata.strings("imatrix.datasets")
    return ImportanceMatrix(ordered, datasets, chunk_count, chunk_size, digest, first)


def _load_legacy(path: Path) -> ImportanceMatrix:
    file, at = InputFile(path), 0
    data = file.read(0, file.nbytes)

    def take(length: int) -> bytes:
        nonlocal at
        if length < 0 or length > len(data) - at:
            raise QuantkitError(f"{path}: not an importance matrix, or cut short at byte {at}")
        at += length
        return data[at - length : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    matrix = ImportanceMatrix()
    for _ in range(number()):
        length = number()
        if length >= MAX_NAME:
            raise QuantkitError(f"{path}: not an importance matrix: a name of {length} bytes at byte {at - 4}")
        name = take(length).decode("utf-8", "surrogateescape")
        calls, n_values = number(), number()
        values = np.frombuffer(take(4 * n_values), "<f4").astype(np.float32)
        if n_values < 1:
            raise QuantkitError(f"{path}: {name!r} has no values")
        # The file holds mean squares times the number of chunks: as many sums over as many counts.
        matrix.entries[name] = Importance(values.reshape(1, -1), np.array([max(calls, 1)], np.int64))
    if at < len(data):
        matrix.chunk_count = number()
        if at < len(data):
            matrix.datasets.append(take(number()).decode("utf-8", "surrogateescape"))
    return matrix
