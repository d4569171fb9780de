"""Whether a GGUF file is sound: its structure, its tensors' bytes, its vocabulary, and the keys of its architecture."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.architectures import FAMILIES, forward_spec
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo, ValueType, padded
from quantkit.machine import default_threads
from quantkit.pipeline.execute import Progress
from quantkit.sources.source import GGUFSource
from quantkit.trust.content import searches
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.vocabulary import MODELS, Vocabulary
from quantkit.wording import count_text, size_text

READ = 1 << 22  # bytes looked through at a time: few enough for the cache, enough for threads to meet seldom
TASK = 1 << 25  # bytes handed to a thread at a time: handing over costs as much as looking through a megabyte
# Problems of one kind are listed up to this many.
LISTED = 20
_MODEL_KEYS = ("context_length", "embedding_length", "block_count")


@dataclass(frozen=True)
class Problem:
    """What is wrong: the part that was looked at (structure, content, vocabulary, architecture), and how."""

    part: str
    text: str


@dataclass
class Verdict:
    """What a verification found. A file is sound without problems; `notes` say what was not looked at, and why."""

    path: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_tensors: int = 0
    size: int = 0
    seconds: float = 0.0

    @property
    def readable(self) -> bool:
        """Whether it could be opened as a GGUF model at all."""
        return self.n_tensors > 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        """The problems and notes, and the verdict in the last line."""
        lines = [f"{p.part}: {p.text}" for p in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"and {count_text(len(self.problems) - LISTED, 'more problem')}")
        lines += [f"note: {text}" for text in self.notes]
        found = "sound" if self.sound else f"not sound: {count_text(len(self.problems), 'problem')}"
        lines.append(f"{self.path}: {found} ({count_text(self.n_tensors, 'tensor')}, {size_text(self.size)})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {**asdict(self), "sound": self.sound}


def verify(path: str | Path, threads: int | None = None, progress: Progress | None = None) -> Verdict:
    """Look through the GGUF model at `path`: all of it, at about the speed of reading. Progress counts bytes.

    What a damaged or hostile file holds is never an exception, but a problem of the verdict. Raises QuantkitError only
    when there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise QuantkitError(f"{path}: no such file")
    began, verdict = time.perf_counter(), Verdict(str(path))
    try:
        source = GGUFSource(path)
    except QuantkitError as problem:
        verdict.problems.append(Problem("structure", str(problem)))
        return verdict
    verdict.n_tensors, verdict.size = len(source.tensors), sum(shard.nbytes for shard in source.shards)
    for part, check in (("structure", _structure), ("architecture", _architecture), ("vocabulary", _vocabulary)):
        try:
            for text in check(source, verdict.notes):
                verdict.problems.append(Problem(part, text))
        except QuantkitError as problem:
            verdict.problems.append(Problem(part, str(problem)))
    try:
        for text in _content(source, threads or default_threads(), progress):
            verdict.problems.append(Problem("content", text))
    except QuantkitError as problem:
        verdict.problems.append(Problem("content", str(problem)))
    verdict.seconds = time.perf_counter() - began
    return verdict


def _structure(source: GGUFSource, notes: list[str]) -> Iterator[str]:
    """What the reader lets pass and llama.cpp does not."""
    for shard in source.shards:
        yield from _layout(shard, notes)
    for name in (*source.metadata, *source.tensors):
        try:
            name.encode()
        except UnicodeEncodeError:
            yield f"the name {name!r} is not UTF-8"
    if len(source.shards) > 1:
        for i, shard in enumerate(source.shards):
            if (number := shard.metadata.integer("split.no", default=0)) != i:
                yield f"{shard.path.name} says that it is shard {number}, counted from 0, and not {i}"
    source.metadata.integer("general.file_type", default=0)
    source.metadata.integer("general.quantization_version", 0, 2, default=2)


def _layout(shard: GGUFFile, notes: list[str]) -> Iterator[str]:
    alignment, expected = shard.metadata.alignment, None
    for name, info in shard.tensors.items():
        if expected is not None and shard.offset(name) != expected:
            yield f"{shard.path.name}: tensor {name!r} does not follow the one before it, so llama.cpp refuses the file"
            break
        expected = padded(shard.offset(name) + info.nbytes, alignment)
    if expected is not None and shard.nbytes > expected:
        notes.append(f"{shard.path.name}: {count_text(shard.nbytes - expected, 'byte')} follow the last tensor")


def _architecture(source: GGUFSource, notes: list[str]) -> Iterator[str]:
    metadata = source.metadata
    kind = metadata.string("general.type", "model")
    if kind != "model":
        notes.append(f"a file of the type {kind!r}: its keys and vocabulary were not looked at")
        return
    arch = metadata.architecture
    for key in _MODEL_KEYS:
        metadata.integer(f"{arch}.{key}", 1)
    if arch not in {family.gguf_name for family in FAMILIES if "forward_spec" in vars(family)}:
        notes.append(f"the architecture {arch!r} is not known here: only its sizes were looked at")
        return
    spec = forward_spec(metadata, source.tensors)
    for name in sorted(spec.tensors):
        if name not in source.tensors:
            yield f"the tensor {name} is missing"
    for name, expected in spec.shapes.items():
        info = source.tensors.get(name)
        n_rows, n_per_row = (1, *expected)[-2:]
        if info is not None and (info.n_per_row, info.n_rows) != (n_per_row, n_rows):
            shape = " x ".join(map(str, info.shape))
            yield f"tensor {name} is {shape}, where the metadata asks for rows of {n_per_row}, {n_rows} of them"


def _vocabulary(source: GGUFSource, notes: list[str]) -> Iterator[str]:
    metadata = source.metadata
    if metadata.string("general.type", "model") != "model":
        return
    model = metadata.string("tokenizer.ggml.model", "")
    if model not in MODELS:
        notes.append(f"the tokenizer {model!r} is not known here" if model else "there is no vocabulary")
        return
    vocabulary = Vocabulary.from_metadata(metadata)
    embedding = source.tensors.get("token_embd.weight")
    if embedding is not None and embedding.n_rows != vocabulary.n_tokens:
        yield f"{vocabulary.n_tokens} tokens, but token_embd.weight has {embedding.n_rows} rows"
    yield from _byte_tokens(metadata, vocabulary.tokens)


def _byte_tokens(metadata: Metadata, tokens: list[str]) -> Iterator[str]:
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return
    types = metadata.array(key, (ValueType.INT32,))
    for token in (types == TokenType.BYTE).nonzero()[0].tolist():
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[token]):
            yield f"token {token}, {tokens[token][:40]!r}, is said to be a byte and names none"


def _content(source: GGUFSource, threads: int, progress: Progress | None) -> Iterator[str]:
    """What is wrong in the bytes of the tensors, one line for each tensor that has something."""

    own = threading.local()

    def look(piece: tuple[TensorInfo, int, int]) -> str | None:
        info, first, last = piece
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(READ, np.uint8)
        shard, step = source.shards[source.shard_of[info.name]], rows_in(READ, info)
        per_row = info.type.row_nbytes(info.n_per_row) // info.type.type_size
        for start in range(first, last, step):
            data = shard.read(info.name, start, min(start + step, last), own.buffer).reshape(-1)
            for what, search in searches(info.type).items():
                if (at := search(data)) >= 0:
                    row, block = divmod(at, per_row)
                    place = f"block {block} of row" if info.type.is_quantized else f"column {block} of row"
                    return f"tensor {info.name} ({info.type.name}) holds {what}: {place} {start + row}"
        return None

    def rows_in(nbytes: int, info: TensorInfo) -> int:
        return max(1, nbytes // max(1, info.type.row_nbytes(info.n_per_row)))

    def pieces() -> Iterator[tuple[TensorInfo, int, int]]:
        for info in source.tensors.values():
            step = rows_in(TASK, info)
            for start in range(0, info.n_rows, step):
                yield info, start, min(start + step, info.n_rows)

    wrong: set[str] = set()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantkit-verify")
    try:
        todo = list(pieces())
        for (info, start, stop), problem in zip(todo, pool.map(look, todo), strict=True):
            if problem is not None and info.name not in wrong:
                wrong.add(info.name)
                yield problem
            if progress is not None:
                progress(info.name, (stop - start) * info.type.row_nbytes(info.n_per_row))
    finally:
        pool.shutdown(cancel_futures=True)
