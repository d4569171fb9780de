"""Log-probability files, as llama-perplexity's --save-all-logits writes and its --kl-divergence reads them.

The bytes, little-endian: `_logits_`, then int32 n_ctx, n_vocab and n_chunks, then the int32 ids of all tokens, chunk
by chunk (as they stand in the text, before BOS takes the first place of a chunk). After these, for each chunk and each
of its scored positions (n_ctx / 2 to n_ctx - 2), a row of 16-bit words: a float32 scale, a float32 minimum, and a code
for each token of the vocabulary, padded to an even number. A token's log-probability is scale * code + minimum.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputFile, SharedFile
from quantkit.formats.reading import InputFile

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
# Words of 16 bits before the codes of a row: the scale and the minimum.
_PREFIX = 4


def first_scored(n_ctx: int) -> int:
    """The first position of a chunk whose prediction is scored."""
    return n_ctx // 2


def row_words(n_vocab: int) -> int:
    """The 16-bit words of a row: the prefix, and a code for each token, padded to an even number."""
    return _PREFIX + n_vocab + n_vocab % 2


def empty_rows(n_rows: int, n_vocab: int) -> np.ndarray:
    """Rows to fill through `parts`: uint16 [n_rows, row_words], all zero."""
    return np.zeros((n_rows, row_words(n_vocab)), "<u2")


def parts(rows: np.ndarray, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of rows, uint16 [n, row_words]: float32 [n, 2] of scales and minima, and uint16 codes [n, n_vocab]."""
    return rows[:, :_PREFIX].view("<f4"), rows[:, _PREFIX : _PREFIX + n_vocab]


def is_logits_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file that begins as a log-probability file does."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class LogitsFile:
    """A log-probability file, opened for reading; chunks are read when they are asked for.

    `tokens` is int32 [n_chunks, n_ctx]. Raises QuantkitError for a file that is none, or that is cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = InputFile(path)
        size = self._file.nbytes
        header = self._file.read(0, min(_HEADER.size, size))
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise QuantkitError(f"{self.path}: not a file of log-probabilities, as llama-perplexity saves them")
        _, self.n_ctx, self.n_vocab, self.n_chunks = _HEADER.unpack(header)
        if self.n_ctx < 4 or self.n_vocab < 1 or self.n_chunks < 1:
            raise QuantkitError(
                f"{self.path}: damaged: {self.n_chunks} chunks of {self.n_ctx} tokens from a vocabulary of "
                f"{self.n_vocab}"
            )
        self.n_scored = self.n_ctx - 1 - first_scored(self.n_ctx)
        n_tokens = self.n_chunks * self.n_ctx
        at = _HEADER.size + 4 * n_tokens
        needed = at + 2 * self.n_chunks * self.n_scored * row_words(self.n_vocab)
        if size < needed:
            raise QuantkitError(
                f"{self.path}: cut short: {self.n_chunks} chunks need {needed} bytes, and it has {size}; make it again"
            )
        self.tokens = np.frombuffer(self._file.read(_HEADER.size, 4 * n_tokens), "<i4").astype(np.int32)
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise QuantkitError(f"{self.path}: damaged: it holds tokens outside its vocabulary of {self.n_vocab}")
        self.tokens = self.tokens.reshape(self.n_chunks, self.n_ctx)
        self._start = at

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is opened again: by the absolute path, for another process."""
        return LogitsFile, (self.path.absolute(),)

    def chunk(self, index: int, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scored positions of a chunk, all or from `first` to `stop`, which count from the first that is scored.

        They are float32 [positions, 2] of scales and minima, and uint16 [positions, n_vocab] of codes. Raises
        QuantkitError when they do not stand for probabilities.
        """
        if not 0 <= index < self.n_chunks:
            raise IndexError(f"chunk {index} of {self.n_chunks}")
        stop = self.n_scored if stop is None else stop
        rows = np.empty((stop - first, row_words(self.n_vocab)), "<u2")
        before = index * self.n_scored + first
        self._file.read_into(self._start + before * 2 * row_words(self.n_vocab), rows)
        affine, codes = parts(rows, self.n_vocab)
        # A hair above 0 is what rounding makes of a probability of 1.
        highest = affine[:, 0].astype(np.float64) * 65535 + affine[:, 1]
        if not (np.isfinite(affine).all() and (affine[:, 0] >= 0).all() and (highest < 1e-2).all()):
            raise QuantkitError(f"{self.path}: damaged: chunk {index} holds values that are no log-probabilities")
        return affine, codes


class LogitsRows(Protocol):
    """What takes the rows of a log-probability file."""

    def write(self, rows: np.ndarray, at: int) -> None:
        """Write rows, uint16 [n, row_words], as rows `at` and on of all chunks."""
        ...


@dataclass(frozen=True)
class SharedLogits:
    """The unfinished log-probability file of another process: its path, device and inode, and where rows begin."""

    path: Path
    identity: tuple[int, int]
    start: int
    n_vocab: int

    def write(self, rows: np.ndarray, at: int) -> None:
        """See `LogitsRows`. Raises QuantkitError as `SharedFile` does."""
        with SharedFile(self.path, self.identity) as file:
            file.write_at(self.start + at * 2 * row_words(self.n_vocab), np.ascontiguousarray(rows, "<u2"))


class LogitsWriter:
    """A log-probability file being written, chunk by chunk. A context manager.

    `target` is a path, or a file of an `OutputGroup`, which then decides when it appears. `tokens` is int32
    [n_chunks, n_ctx], as in `LogitsFile`. The file appears when the block ends well. Raises QuantkitError when it
    cannot be written.
    """

    def __init__(self, target: str | os.PathLike[str] | OutputFile, tokens: np.ndarray, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        n_chunks, n_ctx = tokens.shape
        self._header = _HEADER.pack(_MAGIC, n_ctx, n_vocab, n_chunks) + tokens.astype("<i4").tobytes()
        self._left = n_chunks * (n_ctx - 1 - first_scored(n_ctx))
        self._file = OutputFile.of(target)

    def __enter__(self) -> LogitsWriter:
        """Create the temporary file and write the header."""
        try:
            self._file.begin(len(self._header) + 2 * self._left * row_words(self.n_vocab))
            self._file.write(self._header)
        except BaseException:
            self._file.abandon()
            raise
        return self

    def write(self, rows: np.ndarray, at: int) -> None:
        """Write rows, uint16 [n, row_words], as rows `at` and on of all chunks: see `empty_rows` and `parts`."""
        self._left -= len(rows)
        if rows.shape[1] != row_words(self.n_vocab) or self._left < 0:
            raise ValueError(f"rows of shape {rows.shape} do not fit the header")
        rows = np.ascontiguousarray(rows, "<u2")
        self._file.write_at(len(self._header) + at * 2 * row_words(self.n_vocab), rows)

    def hand_out(self) -> SharedLogits:
        """The unfinished file, for other processes to write rows to, of which `written_elsewhere` must be told."""
        return SharedLogits(*self._file.hand_out(), len(self._header), self.n_vocab)

    def written_elsewhere(self, n_rows: int) -> None:
        """Take note that another process has written so many rows, and synced them."""
        self._left -= n_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the file its name, or remove it when the block failed."""
        if kind is not None or self._left:
            self._file.abandon()
            if kind is None:
                raise ValueError(f"{self._left} rows are missing")
            return
        self._file.finish()
