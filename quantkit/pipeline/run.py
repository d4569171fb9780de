"""The jobs as single calls: what the command line and the Python API do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputGroup
from quantkit.formats.gguf import Value, ValueType
from quantkit.pipeline.execute import Progress, execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.plan import Plan, plan_quantize
from quantkit.pipeline.recipe import Options
from quantkit.sources.source import TensorSource, open_source

if TYPE_CHECKING:
    import numpy as np

    from quantkit.formats.imatrix import ImportanceMatrix

Override = tuple[str, ValueType, object]
MAX_TEXT = 127  # characters of a metadata string that llama-quantize can set


def plan(
    source: TensorSource | str | os.PathLike[str],
    type: str,
    *,
    imatrix: ImportanceMatrix | str | os.PathLike[str] | None = None,
    calibrated: bool = False,
    include_weights: Sequence[str] = (),
    exclude_weights: Sequence[str] = (),
    tensor_types: Iterable[tuple[str, GGMLType | str]] = (),
    output_tensor_type: GGMLType | str | None = None,
    token_embedding_type: GGMLType | str | None = None,
    leave_output_tensor: bool = False,
    pure: bool = False,
    allow_requantize: bool = False,
    override_kv: Sequence[str | Override] = (),
    prune_layers: Sequence[int] = (),
    keep_split: bool = False,
    split_max_size: int | None = None,
    split_max_tensors: int | None = None,
) -> Plan:
    """What quantizing `source` to file type `type` would write: a Plan, to print, edit or `execute`.

    The options are llama-quantize's. `imatrix` is an importance matrix or its file, `calibrated` says that a
    calibration text will take its place; `include_weights` and `exclude_weights` are parts of tensor names.
    `tensor_types` are (regular expression, type) pairs. `override_kv` are (key, type, value) or "KEY=TYPE:VALUE". Sizes
    are in bytes. Raises QuantkitError for a request that cannot be met.
    """
    if include_weights and exclude_weights:
        raise QuantkitError("--include-weights and --exclude-weights exclude each other")
    model = open_source(source) if isinstance(source, (str, os.PathLike)) else source
    overrides = [parse_override(each) if isinstance(each, str) else each for each in override_kv]
    weights: dict[str, np.ndarray] | None = {} if calibrated else None
    if imatrix is not None:
        from quantkit.formats.imatrix import ImportanceMatrix

        name = "" if isinstance(imatrix, ImportanceMatrix) else os.fspath(imatrix)
        matrix = imatrix if isinstance(imatrix, ImportanceMatrix) else ImportanceMatrix.load(imatrix)
        matrix = matrix.select(list(include_weights), list(exclude_weights))
        if matrix.entries:
            weights = matrix.weights()
            overrides += _imatrix_keys(matrix, name)
    result = plan_quantize(
        model,
        file_type(type),
        Options(
            pure=pure,
            output_tensor_type=_ggml_type(output_tensor_type),
            token_embedding_type=_ggml_type(token_embedding_type),
            leave_output_tensor=leave_output_tensor,
            tensor_types=[(_pattern(pattern), _type(kind)) for pattern, kind in tensor_types],
        ),
        weights,
        overrides,
        allow_requantize,
        prune_layers,
        keep_split,
    )
    if split_max_size or split_max_tensors:
        result.split_by(split_max_size, split_max_tensors)
    return result


def quantize(
    source: TensorSource | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    type: str | Sequence[str],
    threads: int | None = None,
    allow_nonfinite: bool = False,
    max_buffer_size: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    **options: Any,
) -> list[Path]:
    """Quantize a GGUF file, a checkpoint directory or a hub id to one file type or several, in one reading.

    `out` is the file, or a directory: one that exists, or a name that ends in a slash. Several types need a directory,
    in which files are named after the model and the type; left out, it is that of the model. `force` replaces files.
    `options` are those of `plan`, the others those of `execute`. Returns the files written. Raises QuantkitError.
    """
    model = source
    if isinstance(model, (str, os.PathLike)):
        model = open_source(model, allow_nonfinite=allow_nonfinite)
    names = [file_type(name).name for name in ([type] if isinstance(type, str) else type)]
    named = os.fspath(source) if isinstance(source, (str, os.PathLike)) else model.label
    destination = Destination.of(out, home_of(named))
    paths = output_paths(destination, model, names)
    outputs = [(plan(model, name, **options), path) for name, path in zip(names, paths, strict=True)]
    inputs = [imatrix] if isinstance(imatrix := options.get("imatrix"), (str, os.PathLike)) else []
    with OutputGroup(force=force, inputs=inputs, directory=destination.directory) as group:
        return execute(
            model,
            outputs,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            max_buffer_size=max_buffer_size,
            progress=progress,
            group=group,
        )


def parse_override(text: str) -> Override:
    """A metadata override "KEY=TYPE:VALUE", TYPE one of int, float, bool, str, as llama-quantize stores it."""
    key, _, value = text.partition("=")
    kind, colon, value = value.partition(":")
    if not key or not colon:
        raise QuantkitError(f"malformed override {text!r}: write KEY=TYPE:VALUE, TYPE one of int, float, bool, str")
    try:
        if kind == "int":
            return key, ValueType.UINT32, abs(int(value)) & 0xFFFFFFFF
        if kind == "float":
            number = float(value)
            Value.of(ValueType.FLOAT32, number)
            return key, ValueType.FLOAT32, number
        if kind == "bool":
            return key, ValueType.BOOL, {"true": True, "false": False}[value]
    except (ValueError, KeyError):
        raise QuantkitError(f"override {text!r}: {value!r} is no {kind}") from None
    if kind != "str":
        raise QuantkitError(f"override {text!r}: unknown type {kind!r}; use int, float, bool or str")
    if len(value.encode()) > MAX_TEXT:
        raise QuantkitError(f"override {key!r}: a string may have {MAX_TEXT} bytes at most")
    return key, ValueType.STRING, value


def parse_tensor_types(items: Iterable[str]) -> list[tuple[str, GGMLType]]:
    """Per-tensor types "REGEX=TYPE", as --tensor-type takes them; expressions are made lower case."""
    pairs = []
    for item in items:
        pattern, equals, kind = item.partition("=")
        if not pattern or not equals or not kind:
            raise QuantkitError(f"malformed tensor type {item!r}: write REGEX=TYPE, such as attn_v=q6_k")
        pairs.append((pattern.lower(), GGMLType.parse(kind)))
    return pairs


def parse_size(text: str) -> int:
    """A size such as 500M or 2G (powers of 1000, as gguf-split counts), or plain bytes."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise QuantkitError(f"not a size: {text!r}; write 500M or 2G")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def parse_layers(text: str) -> list[int]:
    """Layer numbers, as --prune-layers takes them: "3,4,7"."""
    try:
        layers = [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        layers = [-1]
    if any(layer < 0 for layer in layers):
        raise QuantkitError(f"not a list of layers: {text!r}; write numbers with commas")
    return layers


def _imatrix_keys(matrix: ImportanceMatrix, name: str) -> list[Override]:
    keys: list[Override] = []
    if name:
        keys.append(("quantize.imatrix.file", ValueType.STRING, _cut(name)))
    if matrix.datasets:
        keys.append(("quantize.imatrix.dataset", ValueType.STRING, _cut(matrix.datasets[0])))
    keys.append(("quantize.imatrix.entries_count", ValueType.UINT32, len(matrix.entries)))
    if matrix.chunk_count > 0:
        keys.append(("quantize.imatrix.chunks_count", ValueType.UINT32, matrix.chunk_count))
    return keys


def _cut(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:MAX_TEXT].decode("utf-8", "surrogateescape")


def _type(kind: GGMLType | str) -> GGMLType:
    return kind if isinstance(kind, GGMLType) else GGMLType.parse(kind)


def _ggml_type(kind: GGMLType | str | None) -> GGMLType | None:
    return None if kind is None else _type(kind)


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise QuantkitError(f"tensor type {pattern!r} is not a regular expression: {error}") from None
    return pattern
