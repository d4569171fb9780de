"""Whether a GGUF file is exactly the quantization of a source: it is derived again, and compared byte for byte.

Quantization here is deterministic and writes llama-quantize's bytes, so a file made by either from the same source can
be told from any other. The types are the file's own; its metadata says whether an importance matrix took part. Builds
whose compilers contract multiplication and addition into one rounding (as on ARM) write a few other bytes: a fifth of a
per cent was seen, in most tensors, where another source or another importance matrix changes a large part of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from quantkit import blocks
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.machine import default_threads
from quantkit.pipeline.execute import Piece, Progress, encode_pieces, pieces
from quantkit.pipeline.plan import Plan, PlannedTensor, weights_for
from quantkit.sources.checkpoint import CheckpointSource, OutType
from quantkit.sources.source import GGUFSource, TensorSource
from quantkit.wording import count_text

# Rows, and runs of them, that a quick check looks at in each tensor.
_SAMPLED_ROWS, _SAMPLES = 16, 4
# The share of bytes up to which another compiler can be the reason, and the blocks that damage rather explains.
ROUNDING_SHARE = 0.005
_FEW_BLOCKS = 4
_LISTED = 20
_IMATRIX = "quantize.imatrix.file"


@dataclass(frozen=True)
class TensorMatch:
    """How a tensor compares with what the source gives: bytes and blocks that were compared, and that differ.

    `row` is the first row that differs, None where none does.
    """

    name: str
    type: str
    n_bytes: int
    different_bytes: int
    n_blocks: int
    different_blocks: int
    row: int | None

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return self.row is None


@dataclass
class Derivation:
    """How a file compares with a source.

    `tensors` are those that were compared, in the file's order: all, unless a difference ended the comparison
    (`complete` is false then). `problems` are tensors that only one of the two has, or in another shape; `metadata` the
    keys whose values differ, but for those that describe the file. `seen_as` is the type that a checkpoint was seen in.
    """

    file: str
    source: str
    seen_as: str | None = None
    imatrix: str | None = None
    tensors: list[TensorMatch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    complete: bool = True
    quick: bool = False

    @property
    def differing(self) -> list[TensorMatch]:
        """The tensors that differ."""
        return [match for match in self.tensors if not match.exact]

    @property
    def exact(self) -> bool:
        """Whether the file is exactly what the source gives, as far as was compared."""
        return not (self.problems or self.metadata or self.differing)

    @property
    def share(self) -> float:
        """The share of the compared bytes that differ."""
        return sum(m.different_bytes for m in self.tensors) / max(1, sum(m.n_bytes for m in self.tensors))

    @property
    def explanation(self) -> str:
        """What the differences look like."""
        if self.exact:
            return "exact"
        if self.problems:
            return "another model"
        if not self.differing:
            return "the same weights with other metadata"
        if len(self.differing) == 1 and self.differing[0].different_blocks <= _FEW_BLOCKS:
            return "damage or a change to single blocks"
        if self.share <= ROUNDING_SHARE:
            return "a build that rounds otherwise, as on ARM, or small changes"
        return "another source, importance matrix or quantizer"

    def __str__(self) -> str:
        """What differs, and the verdict in the last line."""
        lines = self.problems[:_LISTED] + [f"metadata: {key} differs" for key in self.metadata[:_LISTED]]
        for match in self.differing[:_LISTED]:
            lines.append(
                f"tensor {match.name} ({match.type}): {match.different_bytes} of {match.n_bytes} bytes differ, in "
                f"{count_text(match.different_blocks, 'block')}, first in row {match.row}"
            )
        if len(self.differing) > _LISTED:
            lines.append(f"and {count_text(len(self.differing) - _LISTED, 'more tensor')}")
        if not self.complete:
            lines.append("the comparison stopped at the first difference")
        what = f"{self.source} as {self.seen_as}" if self.seen_as else self.source
        with_matrix = f" with {self.imatrix}" if self.imatrix else ""
        if self.exact:
            looked = "samples of " if self.quick else ""
            found = f"exactly the quantization of {what}{with_matrix} ({looked}{len(self.tensors)} tensors compared)"
        else:
            found = f"not the quantization of {what}{with_matrix}: {self.explanation}, {self.share:.4%} of bytes differ"
        return "\n".join([*lines, f"{self.file}: {found}"])

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            **asdict(self),
            "exact": self.exact,
            "different_share": self.share,
            "explanation": self.explanation,
        }


def derive(
    file: GGUFSource,
    source: TensorSource,
    imatrix: ImportanceMatrix | None = None,
    *,
    imatrix_name: str | None = None,
    everything: bool = False,
    quick: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Derivation:
    """Quantize `source` again as `file` is, and compare.

    Stops at the first tensor that differs, unless `everything`; `quick` compares rows drawn at random from each tensor.
    A checkpoint is seen in each type that a converter may have given it. Progress counts bytes of the source.
    Raises QuantkitError when the file was made with an importance matrix and none is given.
    """
    made_with = file.metadata.string(_IMATRIX, "")
    if made_with and imatrix is None:
        raise QuantkitError(
            f"{file.label}: it was quantized with the importance matrix {made_with}, which is needed to derive it again"
        )
    weights = None if imatrix is None else imatrix.weights()

    def compare(candidate: TensorSource, quick: bool, everything: bool) -> Derivation:
        seen_as = candidate.type.name if isinstance(candidate, CheckpointSource) else None
        result = Derivation(file.label, candidate.label, seen_as, imatrix_name, quick=quick)
        result.metadata = different_keys(file.metadata, candidate.metadata)
        plan = derived_plan(file, candidate, weights, result.problems)
        if result.problems and not everything:
            result.complete = False
            return result
        _compare(file, candidate, plan, result, everything, threads or default_threads(), progress)
        return result

    candidates = list(_candidates(source))
    if len(candidates) > 1:
        tried = [(compare(candidate, True, True), candidate) for candidate in candidates]
        best, source = min(tried, key=lambda each: (len(each[0].problems), each[0].share))
        if quick:
            return best
    return compare(source, quick, everything)


def _candidates(source: TensorSource) -> Iterator[TensorSource]:
    """`source`, and for a checkpoint the other types that it may have been converted to before it was quantized."""
    yield source
    if isinstance(source, CheckpointSource):
        outtypes: tuple[OutType, ...] = ("f16", "bf16", "f32")
        for outtype in outtypes:
            if outtype != source.type.name.lower():
                yield source.seen_as(outtype)


def different_keys(metadata: Metadata, source: Metadata) -> list[str]:
    """The keys whose values differ, but for those that describe the file: general.*, quantize.* and split.*."""
    return [
        key
        for key in dict.fromkeys([*source, *metadata])
        if metadata.get(key) != source.get(key)
        and (key == "general.architecture" or not key.startswith(("general.", "quantize.", "split.")))
    ]


def derived_plan(
    file: GGUFSource, source: TensorSource, weights: Mapping[str, np.ndarray] | None, problems: list[str]
) -> Plan:
    """The plan that makes `file` of `source`: the tensors of both, each in its type. What does not fit is a problem."""
    lines = []
    problems += [f"tensor {name} is missing" for name in source.tensors if name not in file.tensors]
    for name, info in file.tensors.items():
        origin = source.tensors.get(name)
        if origin is None:
            problems.append(f"tensor {name} is not in {source.label}")
        elif origin.shape != info.shape:
            problems.append(
                f"tensor {name} has the shape {list(info.shape)}, and in {source.label} {list(origin.shape)}"
            )
        elif origin.type != info.type and not {origin.type, info.type} <= set(blocks.encodable()):
            problems.append(f"tensor {name} is {info.type.name}, which cannot be made of {origin.type.name}")
        else:
            own = None
            if weights is not None and origin.type != info.type:
                own = weights_for(info, name, weights, source.label)
            lines.append(PlannedTensor(name, origin.type, info, weights=own))
    return Plan("derived", Metadata(file.metadata), lines)


def _sampled(plan: Plan) -> Iterator[Piece]:
    """A few runs of rows of each tensor, drawn anew each time so that nobody can know which."""
    draw = random.SystemRandom()
    for index, tensor in enumerate(plan):
        info = tensor.info
        per_matrix = info.shape[1] if len(info.shape) > 2 else info.n_rows
        for _ in range(min(_SAMPLES, info.n_rows)):
            start = draw.randrange(info.n_rows)
            stop = min(start + _SAMPLED_ROWS, (start // per_matrix + 1) * per_matrix)
            yield Piece(index, start, stop, last=False)


def _compare(
    file: GGUFSource,
    source: TensorSource,
    plan: Plan,
    result: Derivation,
    everything: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    wanted: Iterable[Piece] = _sampled(plan) if result.quick else pieces(plan)
    current: TensorMatch | None = None
    with closing(encode_pieces(source, [plan], wanted, threads, allow_nonfinite=True)) as derived:
        for piece, (expected,) in derived:
            tensor = plan.tensors[piece.index]
            info = tensor.info
            if current is None or current.name != info.name:
                if current is not None:
                    source.release(current.name)
                    if not current.exact and not everything:
                        result.complete = False
                        return
                current = TensorMatch(info.name, info.type.name, 0, 0, 0, 0, None)
                result.tensors.append(current)
            actual = file.read(info.name, piece.start, piece.stop)
            current = result.tensors[-1] = _add(current, piece, expected, actual, info.type.type_size)
            if progress is not None:
                rows = piece.stop - piece.start
                progress(info.name, rows * tensor.source_type.row_nbytes(info.n_per_row))


def _add(match: TensorMatch, piece: Piece, expected: np.ndarray, actual: np.ndarray, block: int) -> TensorMatch:
    """`match` with one more piece compared."""
    n_bytes, n_blocks = match.n_bytes + actual.nbytes, match.n_blocks + actual.nbytes // block
    if np.array_equal(expected, actual):
        return replace(match, n_bytes=n_bytes, n_blocks=n_blocks)
    differ = expected != actual
    return replace(
        match,
        n_bytes=n_bytes,
        n_blocks=n_blocks,
        different_bytes=match.different_bytes + int(differ.sum()),
        different_blocks=match.different_blocks + int(differ.reshape(-1, block).any(axis=1).sum()),
        row=piece.start + int(differ.any(axis=1).argmax()) if match.row is None else match.row,
    )
