"""Plans: what a run will write, tensor by tensor, decided before any weight is read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType, encode_header, padded
from quantkit.pipeline.mixtures import FILE_TYPES, FileType, ModelFacts, file_type
from quantkit.pipeline.options import Override, QuantizeOptions, encodable
from quantkit.pipeline.recipe import Recipe, needs_imatrix
from quantkit.sources.source import MAX_SHARDS, GGUFSource, TensorSource, split_name, stored_as

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
MAX_TEXT = 127  # bytes of a metadata string that llama-quantize can set


@dataclass
class PlannedTensor:
    """One line of a plan: tensor `source_name` of the source becomes `info`, and why, where it is not the default.

    `reason` begins with how a checkpoint stores it where that is quantized already.

    `weights` are its importance weights: float32 of n_per_row for each matrix, or None. `needs_weights` says that
    it would be unusable without them.
    """

    source_name: str
    source_type: GGMLType
    info: TensorInfo
    reason: str = ""
    weights: np.ndarray | None = None
    needs_weights: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.source_type == self.info.type


@dataclass(frozen=True)
class Split:
    """How a model is cut into files: the number of tensors in each, and the order of the keys that say so."""

    counts: Sequence[int]
    keys: Sequence[str] = ("split.no", "split.tensors.count", "split.count")  # as gguf-split writes them

    def metadata(self, index: int, whole: Metadata) -> Metadata:
        """The metadata of shard `index`: the model's in the first, and the split keys in all."""
        metadata = Metadata(whole if index == 0 else {})
        values = {
            "split.no": (ValueType.UINT16, index),
            "split.count": (ValueType.UINT16, len(self.counts)),
            "split.tensors.count": (ValueType.INT32, sum(self.counts)),
        }
        for key in self.keys:
            metadata.set(key, *values[key])
        return metadata


@dataclass
class Plan:
    """A file to write: its metadata, and what each tensor becomes, in file order.

    It can be printed, edited (`plan.set_type(name, type)`) and given to `execute`.
    """

    name: str
    metadata: Metadata
    tensors: list[PlannedTensor] = field(default_factory=list)
    split: Split | None = None

    def __iter__(self) -> Iterator[PlannedTensor]:
        """The lines, in file order."""
        return iter(self.tensors)

    def set_type(self, name: str, kind: GGMLType | str) -> None:
        """Change the type of tensor `name` to `kind`.

        Raises QuantkitError when there is no such tensor, or the blocks do not fit.
        """
        kind = kind if isinstance(kind, GGMLType) else GGMLType.parse(kind)
        for tensor in self.tensors:
            if tensor.info.name == name:
                _check_types(tensor.info, kind)
                tensor.info, tensor.reason = replace(tensor.info, type=kind), "edited"
                return
        raise QuantkitError(f"the plan has no tensor {name!r}")

    def check(self) -> None:
        """Raise QuantkitError, naming the tensor, when a type needs importance weights that it lacks."""
        for tensor in self.tensors:
            if tensor.needs_weights and tensor.weights is None:
                raise QuantkitError(
                    f"{self.name} needs an importance matrix: {tensor.info.name!r} as {tensor.info.type.name} would be "
                    "unusable without one",
                    option="imatrix",
                )

    @property
    def n_elements(self) -> int:
        """Weights in the file."""
        return sum(t.info.n_elements for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without padding and header."""
        return sum(t.info.nbytes for t in self.tensors)

    def files(self, path: str | os.PathLike[str]) -> list[tuple[Path, Metadata, list[TensorInfo]]]:
        """The files to write at `path`, as (path, metadata, tensors): that file, or shards named after it."""
        target, infos = Path(path), [t.info for t in self.tensors]
        if self.split is None:
            return [(target, self.metadata, infos)]
        files, at, n_files = [], 0, len(self.split.counts)
        for index, count in enumerate(self.split.counts):
            name = split_name(target.name.removesuffix(".gguf"), index, n_files)
            metadata = self.split.metadata(index, self.metadata)
            files.append((target.with_name(name), metadata, infos[at : at + count]))
            at += count
        return files

    @property
    def file_size(self) -> int:
        """Bytes of the whole file, or of all shards."""
        alignment, total = self.metadata.alignment, 0
        for _, metadata, infos in self.files("size.gguf"):
            total += len(encode_header(metadata, infos, alignment))
            total += sum(padded(info.nbytes, alignment) for info in infos)
        return total

    def split_by(self, max_size: int | None = None, max_tensors: int | None = None) -> None:
        """Split the file as gguf-split does, into shards of at most `max_tensors` tensors or `max_size` bytes of them.

        A single tensor that is larger gets a shard of its own.
        """
        counts, size = [0], 0
        for tensor in self.tensors:
            nbytes = padded(tensor.info.nbytes, self.metadata.alignment)
            full = counts[-1] >= max_tensors if max_tensors else False
            if counts[-1] and (full or (max_size is not None and size + nbytes > max_size)):
                counts.append(0)
                size = 0
            counts[-1] += 1
            size += nbytes
        if len(counts) > MAX_SHARDS:
            raise QuantkitError(f"{len(counts)} shards are more than GGUF can number ({MAX_SHARDS}); make them larger")
        self.split = Split(counts)

    @property
    def bits_per_weight(self) -> float:
        """Average bits of storage for a weight."""
        return self.nbytes * 8 / max(1, self.n_elements)

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "type": self.name,
            "size": self.file_size,
            "n_weights": self.n_elements,
            "bits_per_weight": self.bits_per_weight,
            "tensors": [
                {
                    "name": t.info.name,
                    "shape": list(t.info.shape),
                    "source_type": t.source_type.name,
                    "type": t.info.type.name,
                    "size": t.info.nbytes,
                    "note": t.reason,
                }
                for t in self.tensors
            ],
        }

    def __str__(self) -> str:
        """A table of every tensor, its shape, its types and sizes."""
        lines = [f"{'tensor':40} {'shape':>20} {'from':>7} {'to':>7} {'MiB':>9}  note"]
        for t in self.tensors:
            shape = " x ".join(map(str, t.info.shape))
            size = t.info.nbytes / 2**20
            types = f"{t.source_type.name:>7} {t.info.type.name:>7}"
            lines.append(f"{t.info.name:40} {shape:>20} {types} {size:9.2f}  {t.reason}".rstrip())
        lines.append(f"{self.name}: {self.nbytes / 2**20:.2f} MiB, {self.bits_per_weight:.2f} bits per weight")
        return "\n".join(lines)


def plan_copy(source: TensorSource, name: str = "COPY") -> Plan:
    """Every tensor as the source has it, in the source's order: what `convert` writes."""
    lines = [PlannedTensor(t.name, t.type, t, stored_as(source, t.name)) for t in source.tensors.values()]
    return Plan(name, Metadata(source.metadata), lines)


def plan_dequantize(source: TensorSource, kind: GGMLType) -> Plan:
    """Every tensor that is quantized or half precision becomes `kind`, F32, F16 or BF16; the order stays."""
    lines = []
    for t in source.tensors.values():
        widened = t.type.is_quantized or t.type in (GGMLType.F16, GGMLType.BF16)
        lines.append(PlannedTensor(t.name, t.type, replace(t, type=kind) if widened else t))
    metadata = Metadata(source.metadata)
    metadata.set("general.file_type", ValueType.UINT32, FILE_TYPES[kind.name].number)
    return Plan(kind.name, metadata, lines)


def plan_quantize(source: TensorSource, type: FileType | str, options: QuantizeOptions | None = None) -> Plan:
    """What llama-quantize would write from `source` as the file type `type`. See `plan_all`."""
    return plan_all(source, [type], options)[0]


def plan_all(
    source: TensorSource, types: Sequence[FileType | str], options: QuantizeOptions | None = None
) -> list[Plan]:
    """What llama-quantize would write from `source` as each of `types`, file types or their names.

    Raises QuantkitError for options that cannot be carried out or would have no effect: a tensor that is quantized
    already, importance weights that do not fit their tensor, a pattern that decides no tensor's type, a layer to leave
    out that does not exist. A type that needs an importance matrix is planned without one, but `execute` refuses it.
    """
    options = options or QuantizeOptions()
    files = [file_type(each) if isinstance(each, str) else each for each in types]
    importance = _Importance.of(options)
    decisive: set[str] = set()
    plans = [_plan(source, file, options, importance, decisive) for file in files]
    for pattern, _ in options.patterns:
        if pattern.pattern not in decisive:
            raise _idle(source, files, pattern)
    if options.split_max_size or options.split_max_tensors:
        for plan in plans:
            plan.split_by(options.split_max_size, options.split_max_tensors)
    return plans


@dataclass(frozen=True)
class _Importance:
    """Importance weights by tensor name (empty if a calibration will supply them), and the metadata about them."""

    weights: Mapping[str, np.ndarray]
    keys: Sequence[Override]

    @classmethod
    def of(cls, options: QuantizeOptions) -> _Importance | None:
        """The weights that `options` choose, read once for all types; None without an importance matrix."""
        if options.imatrix is None:
            return cls({}, ()) if options.calibrated else None
        from quantkit.formats.imatrix import ImportanceMatrix

        given, name = options.imatrix, ""
        if not isinstance(given, ImportanceMatrix):
            name = os.fspath(given)
            given = ImportanceMatrix.load(given)
        for part in (*options.include_weights, *options.exclude_weights):
            if not any(part in entry for entry in given.entries):
                raise QuantkitError(f"the importance matrix has no tensor with {part!r} in its name")
        matrix = given.select(list(options.include_weights), list(options.exclude_weights))
        if not matrix.entries:
            return None
        keys: list[Override] = []
        if name:
            keys.append(("quantize.imatrix.file", ValueType.STRING, _cut(name)))
        if matrix.datasets:
            keys.append(("quantize.imatrix.dataset", ValueType.STRING, _cut(matrix.datasets[0])))
        keys.append(("quantize.imatrix.entries_count", ValueType.UINT32, len(matrix.entries)))
        if matrix.chunk_count > 0:
            keys.append(("quantize.imatrix.chunks_count", ValueType.UINT32, matrix.chunk_count))
        return cls(matrix.weights(), keys)


def _cut(text: str) -> str:
    """`text`, cut to what llama-quantize can store."""
    return text.encode("utf-8", "surrogateescape")[:MAX_TEXT].decode("utf-8", "surrogateescape")


def _plan(
    source: TensorSource, file: FileType, options: QuantizeOptions, importance: _Importance | None, decisive: set[str]
) -> Plan:
    metadata = Metadata(source.metadata)
    metadata.set("general.quantization_version", ValueType.UINT32, QUANTIZATION_VERSION)
    metadata.set("general.file_type", ValueType.UINT32, _number(file, source.metadata))
    for key, kind, value in (*options.override_kv, *(importance.keys if importance is not None else ())):
        metadata.set(key, kind, value)
    _ = metadata.alignment  # an override may have made it invalid
    facts = ModelFacts.of(metadata)
    layers = sorted(set(options.prune_layers))
    tensors, names, n_layers = _prune(sorted(source.tensors.values(), key=_file_order), layers, source.label)
    if layers:
        metadata.set(f"{metadata.architecture}.block_count", ValueType.UINT32, n_layers)
    split = None
    if options.keep_split and isinstance(source, GGUFSource) and len(source.shards) > 1:
        shard = {info.name: source.shard_of[names[info.name]] for info in tensors}
        place = {name: at for at, name in enumerate(source.tensors)}
        tensors.sort(key=lambda info: (shard[info.name], place[names[info.name]]))
        counts = [sum(1 for s in shard.values() if s == index) for index in range(len(source.shards))]
        split = Split(counts, keys=("split.no", "split.count", "split.tensors.count"))
    recipe = Recipe(file, facts, options, has_imatrix=importance is not None)
    lines = []
    for info, choice in zip(tensors, recipe.choose(tensors), strict=True):
        changes = choice.type != info.type
        if changes:
            _check_types(info, choice.type)
            if info.type.is_quantized and not options.allow_requantize:
                raise QuantkitError(
                    f"{source.label}: tensor {info.name!r} is {info.type.name} already, and quantizing twice adds the "
                    "errors of both; start from the F16, BF16 or F32 model",
                    option="allow_requantize",
                )
        becomes = replace(info, type=choice.type, shape=_trimmed(info.shape))
        original, weights = names[info.name], None
        if importance is not None and importance.weights and changes:
            weights = weights_for(info, original, importance.weights, source.label)
        needs = changes and needs_imatrix(info.name, choice.type, file)
        reason = ", ".join(filter(None, (stored_as(source, original), choice.reason)))
        lines.append(PlannedTensor(original, info.type, becomes, reason, weights, needs))
    decisive |= recipe.decisive
    return Plan(file.name, metadata, lines, split)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without trailing ones, which llama.cpp does not distinguish from missing axes."""
    n_axes = max((i for i, n in enumerate(shape) if n > 1), default=0) + 1
    return shape[:n_axes]


def _idle(source: TensorSource, files: Sequence[FileType], pattern: re.Pattern[str]) -> QuantkitError:
    """The error that says why `pattern` has no effect."""
    what = f"{source.label}: the tensor type for {pattern.pattern!r} changes nothing: "
    matched = [name for name in source.tensors if pattern.search(name)]
    if not matched:
        return QuantkitError(f"{what}it matches no tensor's name")
    if not any(file.default.is_quantized for file in files):
        return QuantkitError(f"{what}{', '.join(file.name for file in files)} has one type for all tensors")
    return QuantkitError(
        f"{what}{matched[0]!r} and what else matches is never quantized, or is decided by another pattern or option"
    )


def _prune(
    tensors: Sequence[TensorInfo], layers: Sequence[int], label: str
) -> tuple[list[TensorInfo], dict[str, str], int]:
    """Leave out `layers`; returns the tensors, renumbered, their names in the source, and the number of layers left."""
    present = {int(match[1]) for info in tensors if (match := re.search(r"blk\.(\d+)\.", info.name))}
    if missing := sorted(set(layers) - present):
        raise QuantkitError(f"{label}: there is no layer {missing[0]} to leave out; it has {len(present)}, from 0")
    if layers and present == set(layers):
        raise QuantkitError(f"{label}: no layer would be left")
    kept: list[TensorInfo] = []
    names: dict[str, str] = {}
    numbers: dict[int, int] = {}
    for info in tensors:
        match = re.search(r"blk\.(\d+)\.", info.name) if layers else None
        if match is None:
            kept.append(info)
            names[info.name] = info.name
        elif int(match[1]) not in layers:
            number = numbers.setdefault(int(match[1]), len(numbers))
            name = f"{info.name[: match.start(1)]}{number}{info.name[match.end(1) :]}"
            kept.append(replace(info, name=name))
            names[name] = info.name
    return kept, names, len(numbers)


def _file_order(info: TensorInfo) -> tuple[int, bytes]:
    """llama.cpp keeps tensors sorted: those without a layer first, then layer by layer, each by name."""
    layer = re.match(r"blk\.(\d+)", info.name)
    return (int(layer[1]) if layer else -1, info.name.encode("utf-8", "surrogateescape"))


def _number(file: FileType, metadata: Metadata) -> int:
    if not file.copies:
        return file.number
    return metadata.integer("general.file_type", default=FILE_TYPES["F32"].number)


def _check_types(info: TensorInfo, kind: GGMLType) -> None:
    """Raise QuantkitError when the tensor `info` cannot become a `kind`."""
    encodable(kind)
    if not info.type.has_codec:
        raise QuantkitError(f"tensor {info.name!r} is {info.type.name}, which cannot be decoded to weights")
    if info.n_per_row % kind.block_size:
        raise QuantkitError(
            f"tensor {info.name!r} has rows of {info.n_per_row} weights, not a multiple of {kind.name}'s "
            f"{kind.block_size}; choose another type for it"
        )


def weights_for(info: TensorInfo, original: str, imatrix: Mapping[str, np.ndarray], label: str) -> np.ndarray | None:
    """The importance weights of tensor `info`, called `original` in the model: float32 (matrices, n_per_row), or None.

    Raises QuantkitError when `imatrix` has another number of them; `label` is the model's, for the message.
    """
    weights = imatrix.get(original)
    n_matrices = info.shape[2] if len(info.shape) > 2 else 1
    if weights is None:
        log.info("no importance weights for %s", info.name)
    elif weights.size == info.n_per_row * n_matrices:
        return weights.reshape(n_matrices, info.n_per_row)
    elif info.name not in ("token_embd.weight", "per_layer_token_embd.weight"):
        raise QuantkitError(
            f"the importance matrix has {weights.size} weights for {info.name!r}, which needs "
            f"{info.n_per_row * n_matrices}: it was made for a model other than {label}"
        )
    return None
