"""A Hugging Face checkpoint seen as GGUF, without writing a file.

Metadata, tensor order, names and types are those that llama.cpp's convert_hf_to_gguf.py gives the same checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quantkit import blocks
from quantkit.architectures import Architecture, Assembly, load_architecture
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import MAX_DIMENSIONS, Metadata, TensorInfo, Value, ValueType
from quantkit.formats.safetensors import NUMPY_TYPES, SafetensorsCheckpoint, Shards, StoredTensor, take_rows
from quantkit.sources.front_matter import refuse_bombs
from quantkit.sources.gguf_gaps import complete_sampling
from quantkit.sources.hub import FILES, repo_id_of
from quantkit.sources.packed import UnpackedCheckpoint, quantization_of, unpacked
from quantkit.wording import count_text

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)
# Bytes of codes in a block.
MXFP4_CODES = 16
# Families overwrite values that all write; the order of keys stays that of the first time.
logging.getLogger("gguf.gguf_writer").addFilter(lambda record: "Duplicated key" not in record.getMessage())

OutType = Literal["f32", "f16", "bf16", "q8_0", "auto"]

SMALL = 1 << 16  # weights

_STORED = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
# general.file_type, as llama.cpp numbers it.
FILE_TYPES = {GGMLType.F32: 0, GGMLType.F16: 1, GGMLType.Q8_0: 7, GGMLType.BF16: 32}
_MXFP4_FILE = 38
# Matrices that runtimes expect in float32, by their GGUF name within a layer.
_ALWAYS_F32 = frozenset(
    (
        "ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv",
        "time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2",
        "time_mix_lerp_fused", "altup_correct_coef", "altup_predict_coef", "ssm_conv1d_q", "ssm_conv1d_k",
        "ssm_conv1d_v", "indexer.proj",
    )
)  # fmt: skip
# The fields of general.sampling.* and, where it differs, their name in generation_config.json.
_SAMPLING = (
    "sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "temp", "penalty_last_n",
    "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta",
)  # fmt: skip
_SAMPLING_NAMES = {"temp": "temperature"}


class CheckpointSource:
    """The TensorSource of a checkpoint directory.

    `outtype` is the type of its matrices; "auto" keeps 16-bit weights in the type that they have and makes F32 ones
    F16. `pre` names the pre-tokenizer where its definition is not recognised; `name` overrides `general.name`;
    `allow_nonfinite` lets NaN and infinity into blocks. `elsewhere` has the shards where `directory` has not.
    Raises QuantkitError for a checkpoint that is incomplete, malformed or of an unknown architecture.
    """

    def __init__(
        self,
        directory: Path,
        outtype: OutType = "auto",
        pre: str | None = None,
        name: str | None = None,
        allow_nonfinite: bool = False,
        elsewhere: Shards | None = None,
    ) -> None:
        """Read the headers and lay out the tensors; no weight is read yet."""
        self.directory, self._pre, self._name = Path(directory), pre, name
        self._allow_nonfinite, self._elsewhere = allow_nonfinite, elsewhere
        self.architecture: Architecture = self._architecture_of(self.directory)
        self._checkpoint = self._open()
        stored = self._checkpoint.tensors
        self.type = self._guess(stored) if outtype == "auto" else GGMLType.parse(outtype)
        self._lay_out(self.architecture.tensors(stored))

    @staticmethod
    def _architecture_of(directory: Path) -> Architecture:
        """Whose rules turn the checkpoint into GGUF."""
        return load_architecture(directory)

    def _lay_out(self, assemblies: Iterable[Assembly]) -> None:
        """Prepare the GGUF tensors that `assemblies` describe."""
        self._assemblies: dict[str, Assembly] = {}
        self._packed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._parts: dict[str, list[str]] = {}  # the stored tensor that each of these is a view of
        self._tensors: dict[str, TensorInfo] = {}
        for assembly in assemblies:
            if assembly.name in self._tensors:
                raise QuantkitError(f"{self.directory}: two tensors of the checkpoint become {assembly.name!r}")
            self._assemblies[assembly.name] = assembly
            shape = self._arrange(assembly)
            if len(shape) > MAX_DIMENSIONS or not math.prod(shape):
                raise QuantkitError(f"{self.directory}: {assembly.name} has the impossible shape {list(shape)}")
            kind = GGMLType.MXFP4 if assembly.packed is not None else self._type_of(assembly.name, shape)
            self._tensors[assembly.name] = TensorInfo(assembly.name, shape[::-1], kind)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is opened again: by the absolute path, for another process."""
        outtype = self.type.name.lower()
        return CheckpointSource, (
            self.directory.absolute(), outtype, self._pre, self._name, self._allow_nonfinite, self._elsewhere
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """The type in the name of a file of these tensors: that of its matrices, or of experts that stay quantized."""
        return "MXFP4_MOE" if self._is_packed and not self.type.is_quantized else self.type.name

    def seen_as(self, outtype: OutType) -> CheckpointSource:
        """The same checkpoint with matrices of another type."""
        return CheckpointSource(self.directory, outtype, self._pre, self._name, self._allow_nonfinite, self._elsewhere)

    def _open(self) -> SafetensorsCheckpoint | UnpackedCheckpoint:
        """The stored tensors, those that are quantized as plain ones unless GGUF can keep them as they are."""
        quantization = quantization_of(self.directory, self.architecture.config)
        method = quantization.find("quant_method") if quantization is not None else None
        self._is_packed = method == "mxfp4" and bool(self.architecture.packed)
        raw = SafetensorsCheckpoint(self.directory, self._elsewhere)
        return raw if quantization is None or self._is_packed else unpacked(raw, quantization)

    @property
    def dequantized(self) -> str:
        """What is quantized already and dequantized while it is read, in words; empty where nothing is."""
        if not isinstance(self._checkpoint, UnpackedCheckpoint):
            return ""
        if not (kinds := self._checkpoint.kinds):
            return ""
        whole = count_text(sum(kinds.values()), "tensor")
        return f"{whole} dequantized: " + ", ".join(f"{kind} ({n})" for kind, n in kinds.items())

    def stored_as(self, name: str) -> str:
        """How the checkpoint keeps tensor `name` where it is quantized already, in words."""
        parts = self._assemblies[name].parts
        if not parts or not isinstance(self._checkpoint, UnpackedCheckpoint):
            return ""
        return self._checkpoint.kind_of(parts[0])

    def _guess(self, stored: Mapping[str, StoredTensor]) -> GGMLType:
        """The type of the first 16-bit matrix, which is more reliable than config.json."""
        for name, tensor in stored.items():
            if self.architecture.canonical_name(name) is None or len(tensor.shape) < 2:
                continue
            if tensor.dtype in ("BF16", "F16"):
                return _STORED[tensor.dtype]
        return GGMLType.F16

    def _arrange(self, assembly: Assembly) -> tuple[int, ...]:
        """Prepare the rows of `assembly`, and return its shape in checkpoint order (row length last)."""
        if assembly.values is not None:
            self._rows[assembly.name] = [_as_rows(assembly.values)]
            return assembly.values.shape
        if assembly.packed is not None:
            return self._arrange_packed(assembly, assembly.packed)
        parts: list[list[np.ndarray]] = []
        for part in assembly.parts:
            views = self._rearranged(assembly, part)
            first = parts[0] if parts else views
            if [(view.shape, view.dtype) for view in views] != [(view.shape, view.dtype) for view in first]:
                raise QuantkitError(
                    f"{self.directory}: tensor {part!r} does not have the shape and type of {assembly.parts[0]!r}"
                )
            parts.append(views)
        self._rows[assembly.name] = [_as_rows(view) for views in parts for view in views]
        self._parts[assembly.name] = [part for part, views in zip(assembly.parts, parts, strict=True) for _ in views]
        # A rearrangement may split the rows' axis; in GGUF the tensor has as many axes as in the checkpoint.
        n_axes = assembly.transform.n_axes or len(self._checkpoint.tensors[assembly.parts[0]].shape)
        shapes = [_merged(view.shape, n_axes) for view in parts[0]]
        if len(shapes) > 1 and (n_axes != 2 or len({shape[1:] for shape in shapes}) > 1):
            raise QuantkitError(f"{self.directory}: the parts of {assembly.name} do not fit below each other")
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        columns = assembly.transform.columns
        if columns is not None and len(columns(self.architecture.config)) != shape[-1]:
            raise QuantkitError(
                f"{self.directory}: rows of {assembly.name}, of {shape[-1]} numbers, do not fit what config.json says"
            )
        return (len(parts), *shape) if assembly.stacked else shape

    def _arrange_packed(self, assembly: Assembly, rows: slice) -> tuple[int, ...]:
        """Prepare a tensor that is quantized already, in MXFP4: sixteen bytes of codes and a scale for each block."""
        codes, scales = (self._codes(part) for part in assembly.parts)
        if codes.ndim != 4 or codes.shape[3] != MXFP4_CODES or codes.shape[:3] != scales.shape:
            raise QuantkitError(
                f"{self.directory}: tensors {assembly.parts[0]!r} of shape {codes.shape} and {assembly.parts[1]!r} of "
                f"shape {scales.shape} are not matrices in MXFP4"
            )
        n_blocks = codes.shape[2]
        codes, scales = codes.reshape(*codes.shape[:2], -1)[:, rows], scales[:, rows]
        self._packed[assembly.name] = codes, scales
        return (*codes.shape[:2], n_blocks * GGMLType.MXFP4.block_size)

    def _codes(self, part: str) -> np.ndarray:
        """The stored tensor `part`, which must be of bytes."""
        tensor = self._checkpoint.tensors[part]
        if tensor.dtype != "U8":
            raise QuantkitError(f"{tensor.path}: tensor {part!r} is {tensor.dtype}, not packed into U8")
        return self._checkpoint.bits(part)

    def _rearranged(self, assembly: Assembly, part: str) -> list[np.ndarray]:
        """The views of the stored tensor `part` whose rows stand below each other in `assembly`."""
        data = self._checkpoint.data(part)
        rearrange = assembly.transform.rearrange
        if rearrange is None:
            return [data]
        if data.ndim == 1:
            data = self._checkpoint.read(part, data.reshape(1, -1), 0, 1)[0]
        try:
            views = [
                step(self.architecture.config, data)
                for step in (rearrange if isinstance(rearrange, tuple) else (rearrange,))
            ]
        except (ValueError, IndexError):
            raise QuantkitError(
                f"{self.directory}: tensor {part!r} of shape {data.shape} does not fit what config.json says"
            ) from None
        if data.ndim > 1:
            return views
        # One axis: all of it is one row unless a transform says otherwise, so the order must be made now; it is small.
        whole = np.concatenate([view.reshape(-1) for view in views])
        return [whole if assembly.transform.n_axes is None else whole.reshape(-1, *views[0].shape[1:])]

    def _type_of(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        """The type of a tensor: float32 for vectors, norms and all but weights, else the file's if its blocks fit."""
        stem = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
        if len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight") or stem in _ALWAYS_F32:
            return GGMLType.F32
        if shape[-1] % self.type.block_size:
            log.warning("%s: rows of %d weights do not fit %s, so it becomes F16", name, shape[-1], self.type.name)
            return GGMLType.F16
        return self.type

    @property
    def label(self) -> str:
        """The directory, as the user named it."""
        return str(self.directory)

    @property
    def files(self) -> list[Path]:
        """See TensorSource: the shards, and whatever else in the directory a conversion may read."""
        return sorted(self._checkpoint.paths | {path for pattern in FILES for path in self.directory.glob(pattern)})

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by GGUF name, in file order."""
        return self._tensors

    def _new_writer(self) -> gguf.GGUFWriter:
        """A writer of the gguf package that knows the tensors, which it counts the parameters by."""
        import gguf

        writer = gguf.GGUFWriter(path=None, arch=self.architecture.gguf_name)
        for info in self._tensors.values():
            writer.add_tensor_info(info.name, info.shape[::-1], np.dtype(np.float32), info.nbytes)
        return writer

    def _metadata_of(self, writer: gguf.GGUFWriter) -> Metadata:
        """What was added to `writer`, in that order."""
        return Metadata((key, self._encode(key, value)) for key, value in writer.kv_data[0].items())

    @cached_property
    def metadata(self) -> Metadata:
        """Everything that a GGUF file of this model holds before its tensors, in the reference converter's order.

        Raises QuantkitError for a config, model card or tokenizer that cannot be expressed.
        """
        import gguf

        from quantkit.vocabulary import write_vocabulary

        arch = self.architecture
        writer = self._new_writer()
        arch.write_numbers(writer, self._checkpoint.tensors, self._number)
        arch.write_first(writer)
        writer.add_type(gguf.GGUFType.MODEL)
        self._write_general(writer)
        arch.write_parameters(writer, _MXFP4_FILE if self.kind == "MXFP4_MOE" else FILE_TYPES[self.type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._check_vocabulary_size()
        write_vocabulary(
            self.directory, arch.config.values, writer,
            style=arch.vocabulary, pre=self._pre, usual_pre=arch.usual_pre, special=arch.special_tokens,
        )  # fmt: skip
        return self._metadata_of(writer)

    def _check_vocabulary_size(self) -> None:
        """Check config.json's vocab_size against the embedding, before a list of that length is made."""
        stated, embedding = self.architecture.config.integer("vocab_size"), self._tensors.get("token_embd.weight")
        if stated is not None and embedding is not None and stated != embedding.n_rows:
            raise QuantkitError(
                f"{self.architecture.config.path}: vocab_size is {stated}, but the embedding has {embedding.n_rows} "
                "rows"
            )

    def _number(self, name: str) -> float:
        """The only number in the stored tensor `name`."""
        data = self._checkpoint.data(name)
        if data.size != 1:
            raise QuantkitError(f"{self.directory}: tensor {name!r} has {data.size} numbers, not one")
        value = float(_float32(self._checkpoint.read(name, data.reshape(1, 1), 0, 1))[0, 0])
        if not math.isfinite(value):
            raise QuantkitError(f"{self.directory}: tensor {name!r} is {value}")
        return value

    def _write_general(self, writer: gguf.GGUFWriter) -> None:
        """Add general.*: from the model card, the configs, and the name of the model."""
        import gguf
        import yaml  # type: ignore[import-untyped]

        counts = writer.get_total_parameter_count()
        # The directory's name is informative too, but a snapshot in the hub's cache is named after its commit.
        directory = Path(os.path.abspath(self.directory))  # noqa: PTH100  (a symbolic link keeps its own name)
        repo_id = repo_id_of(directory)
        directory = Path(repo_id) if repo_id else directory
        load = gguf.Metadata
        refuse_bombs(self.directory / "README.md")
        try:
            card, generation = load.load_model_card(self.directory), load.load_generation_config(self.directory)
            parameters = load.load_hf_parameters(self.directory)
            if repo_id:
                parameters["_name_or_path"] = repo_id
            metadata = load.apply_metadata_heuristic(load(), card, parameters, directory, counts[0])
            for field in _SAMPLING:
                setattr(metadata, f"sampling_{field}", generation.get(_SAMPLING_NAMES.get(field, field)))
            complete_sampling(metadata, generation)
            metadata.name = self._name or metadata.name or directory.name
            if metadata.size_label is None and counts[0] > 0:
                metadata.size_label = gguf.size_label(*counts)
            metadata.set_gguf_meta_model(writer)
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise QuantkitError(f"{self.directory}: README.md or a config is malformed: {problem}") from None

    def _encode(self, key: str, value: gguf.GGUFValue) -> Value:
        kind = ValueType(value.type)
        try:
            if kind != ValueType.ARRAY:
                return Value.of(kind, _text(value.value))
            if isinstance(value.value, bytes):
                return Value.of(kind, value.value, ValueType.UINT8)
            items = [_text(item) for item in value.value]
            item = value.sub_type if value.sub_type is not None else _item_type(items[0])
            return Value.of(kind, items, ValueType(item))
        except (QuantkitError, AttributeError, TypeError, ValueError) as error:
            raise QuantkitError(f"{self.directory}: {key} cannot be written to GGUF: {error}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of tensor `name`, encoded in its type: uint8 of shape (rows, bytes of a row).

        A read-only view of the shard if the bytes are there as needed; otherwise only these rows are gathered and
        converted. Safe from several threads. Raises QuantkitError for NaN or infinity where blocks are made of it.
        """
        info, assembly = self._tensors[name], self._assemblies[name]
        stop = info.n_rows if stop is None else stop
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {info.n_rows}")
        if name in self._packed:
            codes, scales = (
                self._checkpoint.read(part, view, start, stop)
                for part, view in zip(assembly.parts, self._packed[name], strict=True)
            )
            return repacked_mxfp4(codes, scales)
        rows = self._gather(name, start, stop)
        if assembly.transform.columns is not None:
            rows = np.take(rows, assembly.transform.columns(self.architecture.config), axis=1)
        if assembly.transform.factors is not None:
            rows = _multiplied(rows, assembly.transform.factors(self.architecture.config), start)
        if assembly.transform.arithmetic is not None:
            # torch, and so the reference, has arithmetic for float16, which rounds each result to it.
            values = rows if rows.dtype == np.float16 else _float32(rows)
            rows = np.ascontiguousarray(assembly.transform.arithmetic(values))
        if info.type.is_quantized and not self._allow_nonfinite:
            self._refuse_nonfinite(name, _float32(rows), start)
        encoded = _encode(rows, info.type)
        if info.type == GGMLType.F16 and rows.dtype != np.float16 and not self._allow_nonfinite:
            self._refuse_overflow(name, encoded, rows, start)
        return encoded

    def _refuse_nonfinite(self, name: str, values: np.ndarray, first_row: int) -> None:
        """Refuse NaN and infinity, which nobody could find in blocks; in plain floats the reader can."""
        at = blocks.first_nonfinite(values)
        if at >= 0:
            row, column = divmod(at, values.shape[1])
            raise QuantkitError(
                f"{self.directory}: tensor {name!r} holds {values[row, column]} at row {first_row + row}, "
                f"column {column}; the checkpoint is damaged",
                option="allow_nonfinite",
            )

    def _refuse_overflow(self, name: str, encoded: np.ndarray, rows: np.ndarray, first_row: int) -> None:
        """Refuse weights beyond float16's range, which would become infinite; the reader finds NaN and infinity."""
        at = blocks.first_nonfinite_stored(encoded, GGMLType.F16)
        if at >= 0:
            row, column = divmod(at, rows.shape[1])
            value = _float32(rows[row : row + 1])[0, column]
            if math.isfinite(value):
                raise QuantkitError(
                    f"{self.directory}: tensor {name!r} holds {value:g} at row {first_row + row}, column {column}, "
                    "more than F16 can hold (65504); choose the type bf16 or f32"
                )

    def release(self, name: str) -> None:
        """Release the memory that reading tensor `name` has mapped. It can be read again."""
        for part in self._assemblies[name].parts:
            self._checkpoint.release(part)

    def _gather(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as they are stored: float32, float16, or bfloat16 as uint16, of shape (rows, row length)."""
        if start == stop:
            return take_rows(self._rows[name][0], 0, 0)
        pieces, at, parts = [], 0, self._parts.get(name)
        for i, view in enumerate(self._rows[name]):
            n = math.prod(view.shape[:-1])
            if start < at + n and at < stop:
                rows = max(start - at, 0), min(stop - at, n)
                pieces.append(self._checkpoint.read(parts[i], view, *rows) if parts else take_rows(view, *rows))
            at += n
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _multiplied(rows: np.ndarray, factors: list[float | np.ndarray], start: int) -> np.ndarray:
    """Stored `rows`, the first of which is row `start`, times each of `factors`, as torch multiplies.

    Each product is worked out in float32, and rounded to float16 where the rows are.
    """
    values, rounded = _float32(rows), rows.dtype == np.float16
    for factor in factors:
        one = np.float32(factor) if isinstance(factor, float) else factor[start : start + len(rows), None]
        values = values * one
        if rounded:
            values = values.astype(np.float16).astype(np.float32)
    return values.astype(np.float16) if rounded else values


def repacked_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of MXFP4 as GGUF has them: uint8 [rows, blocks * 17].

    `codes` [rows, blocks * 16] hold neighbours in the two halves of a byte, the first in the lower; GGUF has the first
    sixteen numbers of a block in the lower halves and the others in the upper ones, after the scale, one of `scales`
    [rows, blocks].
    """
    n_rows, n_blocks = scales.shape
    numbers = np.stack([codes & 15, codes >> 4], axis=2).reshape(n_rows, n_blocks, 2 * MXFP4_CODES)
    out = np.empty((n_rows, n_blocks, MXFP4_CODES + 1), np.uint8)
    out[:, :, 0] = scales
    out[:, :, 1:] = numbers[:, :, :MXFP4_CODES] | numbers[:, :, MXFP4_CODES:] << 4
    return out.reshape(n_rows, n_blocks * (MXFP4_CODES + 1))


def output_name(metadata: Metadata, kind: str) -> str:
    """The default file name of a model in type `kind` (F16, Q4_K_M, ...), by the GGUF naming convention."""
    import gguf

    def general(key: str) -> str | None:
        return metadata.string(f"general.{key}", "") or None

    is_projector = general("type") == "mmproj"
    name = gguf.naming_convention(
        general("name"), general("basename"), general("finetune"), general("version"),
        None if is_projector else general("size_label"), kind, "LoRA" if general("type") == "adapter" else None,
    )  # fmt: skip
    if is_projector:
        name = f"mmproj-{name}"
    # The convention replaces slashes in a name only; any other part could lead out of the directory.
    return re.sub(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", "-", name).lstrip(".-")[:200] + ".gguf"


def _text(value: Any) -> Any:
    """Bytes as the text that encodes to them."""
    return bytes(value).decode("utf-8", "surrogateescape") if isinstance(value, (bytes, bytearray)) else value


def _item_type(item: Any) -> ValueType:
    """The type that the reference gives an array from its first item."""
    kinds = {str: ValueType.STRING, bool: ValueType.BOOL, int: ValueType.INT32, float: ValueType.FLOAT32}
    for python, kind in kinds.items():
        if isinstance(item, python):
            return kind
    raise TypeError(f"no GGUF type for {type(item).__name__}")


def _merged(shape: tuple[int, ...], n_axes: int) -> tuple[int, ...]:
    """`shape` with its first axes merged, so that there are `n_axes`."""
    n = len(shape) - n_axes + 1
    return (math.prod(shape[:n]), *shape[n:]) if n > 1 else shape


def _as_rows(view: np.ndarray) -> np.ndarray:
    """`view` with its last axis as the row; merged to two axes where that takes no copy."""
    if view.ndim < 2:
        return view.reshape(1, -1)
    return view.reshape(-1, view.shape[-1]) if view.flags.c_contiguous and view.size else view


def _float32(rows: np.ndarray) -> np.ndarray:
    """float32 of rows as they are stored."""
    if rows.dtype == np.float32:
        return rows
    if rows.dtype == np.uint16 and rows.size <= SMALL:
        # These are mostly norms: a conversion that only widens them should not wait for kernels to compile.
        shifted: np.ndarray = np.left_shift(rows, 16, dtype=np.uint32)
        return shifted.view(np.float32)
    return blocks.decode(rows.view(np.uint8), _stored_type(rows))


def _stored_type(rows: np.ndarray) -> GGMLType:
    return next(_STORED[name] for name, dtype in NUMPY_TYPES.items() if dtype == rows.dtype)


def _encode(rows: np.ndarray, kind: GGMLType) -> np.ndarray:
    """Contiguous rows of float32, float16 or bfloat16 (uint16) as uint8 rows of `kind`."""
    if _stored_type(rows) == kind:
        return rows.view(np.uint8)
    values = _float32(rows)
    return values.view(np.uint8) if kind == GGMLType.F32 else blocks.encode(values, kind)
