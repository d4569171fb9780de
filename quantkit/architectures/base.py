"""What an architecture is: how a checkpoint of its family becomes GGUF metadata and GGUF tensors.

A family states what it does differently as class attributes; what all families share is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantkit.architectures.config import Config
from quantkit.architectures.experts import Stack
from quantkit.architectures.forward import MAX_HEAD, MAX_LAYERS, ForwardSpec
from quantkit.architectures.gguf_gaps import more_names
from quantkit.architectures.parameters import SHARED, Parameter
from quantkit.architectures.rotary_config import RotaryConfig
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# A rearrangement: takes the family's config and a stored tensor, gives a view of the same memory (reshape, swapped
# axes, a slice), never a copy. It sees raw bits (bfloat16 as uint16), so it may move values and not change them.
# The view's last axis is a row. Axes that it adds in front are merged again, unless the transform says how many stay.
Rearrange = Callable[[Config, np.ndarray], np.ndarray]
# The order of the numbers of each row, from the family's config: where in the stored row each is.
Columns = Callable[[Config], np.ndarray]
# What rows are multiplied with, one after the other, from the family's config: a number for all, or one for each row.
Factors = Callable[[Config], list["float | np.ndarray"]]
# Arithmetic on a tensor's values, row by row: float32, or float16 where the checkpoint is.
Arithmetic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Transform:
    """How a stored tensor is converted: its values are rearranged, within a row last, then they may be changed.

    The rows of several rearrangements are concatenated. The GGUF tensor has as many axes as the stored one,
    or `n_axes`.
    """

    rearrange: Rearrange | tuple[Rearrange, ...] | None = None
    arithmetic: Arithmetic | None = None
    n_axes: int | None = None
    columns: Columns | None = None
    factors: Factors | None = None


@dataclass(frozen=True)
class Assembly:
    """How a GGUF tensor is made: from one stored tensor, from several stacked along a new first axis, or computed.

    `parts` are names of stored tensors. `values`, for a computed tensor, is float32 in checkpoint order (the row
    length comes last). `packed` says which rows of a matrix are taken of two parts that hold a quantized tensor: packed
    numbers and their scales.
    """

    name: str
    parts: tuple[str, ...] = ()
    transform: Transform = Transform()
    stacked: bool = False
    values: np.ndarray | None = None
    packed: slice | None = None


# What a stored tensor is cut into: by the end that takes the place of its name's, how it is converted.
Pieces = Mapping[str, Transform]


def natural_order(name: str) -> list[int | str]:
    """A key that sorts the numbers in names by their size."""
    return [int(part) if part.isdecimal() else part for part in name.split(".")]


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

# Parts and beginnings of the names of tensors that a multimodal checkpoint holds beside its text model.
_NOT_TEXT = (
    "visual.", "vision.", "vision_", "audio.", "audio_", "projector.", "pre_mm_projector_norm", "image_newline",
    "view_seperator", "patch_embed", "patch_merge", "model.connector.", "talker.", "token2wav.", "code2wav.",
)  # fmt: skip
_NOT_TEXT_BEGINNINGS = ("mlp", "vit.", "vpm.", "merger.", "resampler.", "siglip2.", "conformer.")


class Architecture:
    """One family of models. An instance is the family with a checkpoint's config.

    Class attributes that a family sets:
    - `gguf_name`: `general.architecture`, and the prefix of its keys.
    - `checkpoints`: the transformers classes that it covers, each with what its configuration class assumes where
      config.json is silent.
    - `wrappers`: the multimodal classes whose text model it covers, each with what is assumed of the text model by
      its `model_type`. Neither of these is inherited: a family that says nothing covers nothing.
    - `derived`: fields that the configuration class computes from others where they are missing or null.
    - `parameters`: its metadata, in the reference converter's order.
    - `rotary_part`: the part of a head that is rotated where the config is silent; None where all of it is, whatever
      the config says.
    - `transforms`: by the end of a stored tensor's name, how it is converted.
    - `pieces`: by the end of a stored tensor's name, the ends of the names of the tensors that are cut from it, and
      how each is converted. A piece that is the whole is a tensor of another name.
    - `packed`: by the end of the names of a quantized tensor's parts (before `_blocks` and `_scales`), the ends of the
      names of what it becomes, and which rows of its matrices these take.
    - `keeps_next_layers`: whether multi-token-prediction layers become layers after the others in GGUF, or are
      left out; None for families that have none.
    - `stacks`: which tensors are stored one by one and stacked in GGUF: experts, mostly.
    - `numbers`: by the end of a stored tensor's name, the method of gguf.GGUFWriter that takes its value of each layer:
      they become metadata.
    - `skipped`, `skipped_beginnings`: the ends and beginnings of names of stored tensors that are left out of GGUF.
    - `renames`: parts of names, and what takes their place before all else; what a wrapper adds goes.
    - `vocabulary`: how the tokenizer is looked for (see `quantkit.vocabulary.write_vocabulary`).
    - `special_tokens`: by role, the texts of special tokens that the family knows better than the tokenizer's files.
    - `usual_pre`: the pre-tokenizer that the reference names for this family, where several names mean the same.
    - `notes`: what is worth knowing in the list of families.
    """

    gguf_name: ClassVar[str]
    checkpoints: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    wrappers: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    derived: ClassVar[Mapping[str, Callable[[Config], Any]]] = {}
    parameters: ClassVar[tuple[Parameter, ...]] = SHARED
    rotary_part: ClassVar[float | None] = None
    transforms: ClassVar[Mapping[str, Transform]] = {}
    pieces: ClassVar[Mapping[str, Pieces]] = {}
    packed: ClassVar[Mapping[str, Mapping[str, slice]]] = {}
    keeps_next_layers: ClassVar[bool | None] = None
    stacks: ClassVar[tuple[Stack, ...]] = ()
    numbers: ClassVar[Mapping[str, str]] = {}
    # Buffers that old checkpoints carry and no runtime reads.
    skipped: ClassVar[tuple[str, ...]] = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
    skipped_beginnings: ClassVar[tuple[str, ...]] = ()
    renames: ClassVar[Mapping[str, str]] = {
        "language_model.": "",
        "e_score_correction_bias": "e_score_correction.bias",
    }
    vocabulary: ClassVar[str] = "bpe"
    special_tokens: ClassVar[Mapping[str, str]] = {}
    usual_pre: ClassVar[str | None] = None
    notes: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Take back what would be inherited: a family is not found in the place of the one that it is like."""
        for covered in ("checkpoints", "wrappers"):
            if covered not in vars(cls):
                setattr(cls, covered, {})

    def __init__(self, config: Config) -> None:
        """Take the family with the hyper-parameters of `config`. Raises QuantkitError for a wrapper of others."""
        name = config.model_class
        defaults = self.checkpoints.get(name, {})
        if (text_models := self.wrappers.get(name)) is not None:
            kind = config.text_type or next(iter(text_models))
            if kind not in text_models:
                raise QuantkitError(
                    f"{config.path}: {name} around a text model of type {kind[:80]!r} is not supported, "
                    f"only {', '.join(text_models)}"
                )
            defaults = text_models[kind]
        self.config = self.complete(config.with_defaults(defaults))

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """The family of a checkpoint of one of these classes: where its hyper-parameters say so, another one."""
        return cls(config)

    def complete(self, config: Config) -> Config:
        """`config` with the fields that follow from others filled in, as its configuration class does."""
        missing = {name: derive(config) for name, derive in self.derived.items() if config.find(name) is None}
        return config.changed(**missing)

    # Metadata

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks, including multi-token-prediction layers where GGUF holds them."""
        names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
        count = self.config.require(*names)
        if count > MAX_LAYERS:
            raise self.config.wrong(names, count, f"at most {MAX_LAYERS}")
        if self.keeps_next_layers:
            more = self.config.integer("num_nextn_predict_layers") or 0
            if more > MAX_LAYERS:
                raise self.config.wrong(("num_nextn_predict_layers",), more, f"at most {MAX_LAYERS}")
            count += more
        return count

    @property
    def n_numbers(self) -> int:
        """How many numbers names of tensors can have: those of the blocks."""
        return self.n_layers

    @cached_property
    def rope(self) -> RotaryConfig:
        """The rotary parameters."""
        return RotaryConfig(self.config)

    @cached_property
    def rope_dimensions(self) -> int:
        """The number of elements of a head that are rotated: all, or a part of them; some families count otherwise."""
        head = self.config.integer("head_dim")
        head = head or self.config.require("hidden_size") // self.config.require("num_attention_heads")
        if head > MAX_HEAD:
            raise self.config.wrong(("head_dim",), head, f"at most {MAX_HEAD}")
        if self.rotary_part is None:
            return head
        return int(head * (self.rope.number("partial_rotary_factor", default=self.rotary_part) or 0.0))

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """Add the family's hyper-parameters, in the reference converter's order and types."""
        for parameter in self.parameters:
            parameter(self, writer, file_type)

    def write_first(self, writer: GGUFWriter) -> None:
        """Add the keys that the reference converter adds while it converts tensors, before all others."""

    def write_numbers(self, writer: GGUFWriter, stored: Iterable[str], value: Callable[[str], float]) -> None:
        """Add the stored tensors that are metadata in GGUF; `value` gives the one number that is in a tensor."""
        names = sorted(stored, key=natural_order)
        for ending, add in self.numbers.items():
            if found := [value(name) for name in names if name.endswith(ending)]:
                getattr(writer, add)(found)

    # Tensors

    def computed_tensors(self) -> Iterator[Assembly]:
        """Tensors that the checkpoint does not hold and GGUF does. They come first in the file."""
        yield from ()

    def canonical_name(self, name: str) -> str | None:
        """The name of a stored tensor without what a multimodal wrapper adds, or None for one of its other parts."""
        for part, instead in self.renames.items():
            name = name.replace(part, instead)
        if any(part in name for part in _NOT_TEXT) or name.startswith(_NOT_TEXT_BEGINNINGS):
            return None
        return name

    def tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """The GGUF tensors of a checkpoint with the tensors `stored`, in the reference converter's order.

        Raises QuantkitError for a stored tensor that the family does not know.
        """
        if self.n_layers > len(stored):
            raise QuantkitError(
                f"{self.config.path}: it announces {self.n_layers} layers, but there are only {len(stored)} tensors"
            )
        yield from self.computed_tensors()
        yield from self.assemblies(stored)

    def assemblies(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """What the tensors `stored`, all or some of a checkpoint's, become. See `tensors`."""
        for stored_name in stored:
            name = self.canonical_name(stored_name)
            if name is not None and name.endswith("_scales"):
                yield from self._unpack(name.removesuffix("_scales"), stored_name.removesuffix("_scales"), stored)
        waiting: dict[tuple[Stack, str], dict[str, str]] = {}
        for stored_name in stored:
            name = self.canonical_name(stored_name)
            if name is None or name.endswith(self.skipped) or name.startswith(self.skipped_beginnings):
                continue
            if name.endswith(tuple(self.numbers)) or self._packs(name):
                continue
            if self.keeps_next_layers is False and (match := _LAYER.search(name)) and int(match[1]) >= self.n_layers:
                continue
            for stack in self.stacks:
                if match := stack.pattern.fullmatch(name):
                    yield from self._stack(stack, match.groupdict().get("layer", ""), name, stored_name, waiting)
                    break
            else:
                yield from self.assemble(name, stored_name)
        for (stack, layer), parts in waiting.items():
            raise QuantkitError(
                f"{self.config.path.parent}: layer {layer} lacks parts of {stack.merged_name(layer)}: "
                f"only {len(parts)} of their tensors are there"
            )

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """What the stored tensor `stored_name`, called `name` without wrappers, becomes."""
        for ending, pieces in self.pieces.items():
            if name.endswith(ending):
                for other, transform in pieces.items():
                    whole = self.gguf_tensor_name(name.removesuffix(ending) + other)
                    yield Assembly(whole, (stored_name,), transform)
                return
        transform = next((t for ending, t in self.transforms.items() if name.endswith(ending)), Transform())
        yield Assembly(self.gguf_tensor_name(name), (stored_name,), transform)

    def _packs(self, name: str) -> bool:
        return any(name.endswith((f"{ending}_blocks", f"{ending}_scales")) for ending in self.packed)

    def _unpack(self, name: str, stored_name: str, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """What the quantized tensor `stored_name`, in two parts, becomes."""
        for ending, pieces in self.packed.items():
            if name.endswith(ending):
                parts = f"{stored_name}_blocks", f"{stored_name}_scales"
                if parts[0] not in stored:
                    raise QuantkitError(f"{self.config.path.parent}: the checkpoint lacks {parts[0]}")
                for other, rows in pieces.items():
                    whole = self.gguf_tensor_name(name.removesuffix(ending) + other)
                    yield Assembly(whole, parts, packed=rows)

    def _stack(
        self, stack: Stack, layer: str, name: str, stored_name: str, waiting: dict[tuple[Stack, str], dict[str, str]]
    ) -> Iterator[Assembly]:
        items = stack.items or range(self.config.require(*stack.count))
        parts = waiting.setdefault((stack, layer), {})
        parts[name] = stored_name
        if len(parts) < len(items) * len(stack.projections):
            return
        del waiting[stack, layer]
        for projection in stack.projections:
            names = [stack.part.format(layer=layer, item=item, projection=projection) for item in items]
            if missing := [n for n in names if n not in parts]:
                raise QuantkitError(f"{self.config.path}: the checkpoint lacks {missing[0]}")
            merged = stack.merged_name(layer, projection)
            yield Assembly(self.gguf_tensor_name(merged), tuple(parts[n] for n in names), stacked=True)

    @cached_property
    def _name_map(self) -> Any:
        import gguf

        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf_name)
        names = gguf.get_tensor_name_map(arch, self.n_numbers)
        names.mapping.update(more_names(self.gguf_name, self.n_numbers))
        return names

    def gguf_tensor_name(self, name: str) -> str:
        """The GGUF name of the checkpoint's tensor `name`, from the gguf package's table."""
        found = self._name_map.get_name(key=name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise QuantkitError(
                f"{self.config.path.parent}: tensor {name!r} has no place in {self.gguf_name} with {self.n_layers} "
                "layers; is this another kind of model, or a quantized checkpoint?"
            )
        return str(found)

    # Forward pass

    @classmethod
    def forward_spec(cls, metadata: Metadata, tensors: Mapping[str, TensorInfo]) -> ForwardSpec:
        """The forward pass of a model of this family, from its GGUF metadata and tensors.

        Raises QuantkitError for metadata that lacks or contradicts what it needs.
        """
        raise QuantkitError(f"evaluating the architecture {cls.gguf_name!r} is not supported yet")
