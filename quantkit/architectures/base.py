"""What an architecture is: how a checkpoint of its family becomes GGUF metadata and GGUF tensors.

A family states what it does differently as class attributes; the roads that all families share are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantkit.architectures.config import Config
from quantkit.architectures.forward import ForwardSpec
from quantkit.architectures.rope import Rope
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, TensorInfo
from quantkit.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# A rearrangement: takes the family's config and a stored tensor, gives a view of the same memory (reshape, swapped
# axes, a slice), never a copy. It sees raw bits (bfloat16 as uint16), so it may move values and not change them.
# The view's last axis is a row. Axes that it adds in front are merged again: the GGUF tensor has as many as the stored.
Rearrange = Callable[[Config, np.ndarray], np.ndarray]
# Arithmetic on a tensor's values, row by row: float32, or float16 where the checkpoint is.
Arithmetic = Callable[[np.ndarray], np.ndarray]


# Parts of the names of tensors that a multimodal checkpoint holds beside its text model.
_NOT_TEXT = ("visual.", "vision_", "vision.", "audio_", "audio.", "projector.", "image_newline")

# Hyper-parameters that most families share: the method of gguf.GGUFWriter that adds one, and the names that
# config.json may have for it. In the reference converter's order.
Fields = tuple[tuple[str, tuple[str, ...]], ...]
_SIZES: Fields = (
    ("add_context_length", ("max_position_embeddings", "n_ctx", "n_positions", "max_length")),
    ("add_embedding_length", ("hidden_size", "n_embd", "dim")),
    ("add_feed_forward_length", ("intermediate_size", "n_inner", "hidden_dim")),
    ("add_head_count", ("num_attention_heads", "n_head", "n_heads")),
    ("add_head_count_kv", ("num_key_value_heads", "n_kv_heads")),
)
_NORMS: Fields = (
    ("add_layer_norm_rms_eps", ("rms_norm_eps", "norm_eps")),
    ("add_layer_norm_eps", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
)
_EXPERTS_AND_HEADS: Fields = (
    ("add_expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("add_expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("add_expert_group_count", ("n_group",)),
    ("add_expert_group_used_count", ("topk_group",)),
    ("add_key_length", ("head_dim",)),
    ("add_value_length", ("head_dim",)),
)


@dataclass(frozen=True)
class Transform:
    """What happens to a stored tensor on its way: first its values move, then they may change."""

    rearrange: Rearrange | None = None
    arithmetic: Arithmetic | None = None


@dataclass(frozen=True)
class Assembly:
    """How a GGUF tensor is made: from one stored tensor, from several stacked along a new first axis, or computed.

    `parts` are names of stored tensors. `values`, for a computed tensor, is float32 in checkpoint order (the row
    length comes last).
    """

    name: str
    parts: tuple[str, ...] = ()
    transform: Transform = Transform()
    stacked: bool = False
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Experts:
    """Experts that a checkpoint keeps one by one, and GGUF stacked.

    `marker` is in the names of their tensors, and `count` names the config field with their number. `part` is the
    name of one expert's tensor, `merged` the name that the stack of a projection is looked up under; `{layer}`,
    `{expert}` and `{projection}` are filled in. The stacks come in the order of `projections`.
    """

    marker: str
    count: tuple[str, ...]
    part: str
    merged: str
    projections: tuple[str, ...]


class Architecture:
    """One family of models. An instance is the family with a checkpoint's config.

    Class attributes that a family sets:
    - `gguf_name`: `general.architecture`, and the prefix of its keys.
    - `checkpoints`: the transformers classes that it covers, each with what its configuration class assumes where
      config.json is silent.
    - `transforms`: by the end of a stored tensor's name, what happens to it.
    - `experts`: how experts are stored, for a family that has them.
    - `vocabulary`: how the tokenizer is looked for (see `quantkit.vocabulary.write_vocabulary`).
    """

    gguf_name: ClassVar[str]
    checkpoints: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    transforms: ClassVar[Mapping[str, Transform]] = {}
    experts: ClassVar[Experts | None] = None
    vocabulary: ClassVar[str] = "bpe"

    # Buffers that old checkpoints carry and no runtime reads.
    unused: ClassVar[tuple[str, ...]] = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")

    def __init__(self, config: Config) -> None:
        """Take the family with the hyper-parameters of `config`."""
        self.config = self.complete(config.with_defaults(self.checkpoints.get(config.model_class, {})))

    def complete(self, config: Config) -> Config:
        """`config` with the fields that follow from others filled in, as its configuration class does."""
        return config

    # Metadata

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.config.require("num_hidden_layers", "n_layers", "n_layer", "num_layers")

    @cached_property
    def rope(self) -> Rope:
        """The rotary parameters."""
        return Rope(self.config)

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """Add the family's hyper-parameters, in the reference converter's order and types.

        These are what most families share, `general.file_type` among them; a family adds its own after them.
        """
        writer.add_block_count(self.n_layers)
        self._write_fields(writer, _SIZES, self.config.integer)
        if self.config.find("is_causal") is False:
            writer.add_causal_attention(False)
        self.rope.write(writer)
        self._write_fields(writer, _NORMS, self.config.number)
        self._write_fields(writer, _EXPERTS_AND_HEADS, self.config.integer)
        writer.add_file_type(file_type)

    def _write_fields(self, writer: GGUFWriter, fields: Fields, read: Callable[..., float | None]) -> None:
        for add, names in fields:
            if (value := read(*names)) is not None:
                getattr(writer, add)(value)

    # Tensors

    def computed_tensors(self) -> Iterator[Assembly]:
        """Tensors that the checkpoint does not hold and GGUF does. They come first in the file."""
        yield from ()

    def canonical_name(self, name: str) -> str | None:
        """The name of a stored tensor without what a multimodal wrapper adds, or None for one of its other parts."""
        if any(part in name for part in _NOT_TEXT):
            return None
        return name.replace("language_model.", "")

    def tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """The GGUF tensors of a checkpoint with the tensors `stored`, in the reference converter's order.

        Raises QuantkitError for a stored tensor that the family has no place for.
        """
        if self.n_layers > len(stored):
            raise QuantkitError(
                f"{self.config.path}: it announces {self.n_layers} layers, but there are only {len(stored)} tensors"
            )
        yield from self.computed_tensors()
        waiting: dict[str, dict[str, str]] = {}
        for stored_name in stored:
            name = self.canonical_name(stored_name)
            if name is None or name.endswith(self.unused):
                continue
            if self.experts is not None and self.experts.marker in name:
                yield from self._stack(self.experts, name, stored_name, waiting)
            else:
                yield from self.assemble(name, stored_name)
        for layer, parts in waiting.items():
            raise QuantkitError(
                f"{self.config.path.parent}: layer {layer} lacks experts: only {len(parts)} of their tensors are there"
            )

    def assemble(self, name: str, stored_name: str) -> Iterator[Assembly]:
        """What the stored tensor `stored_name`, called `name` without wrappers, becomes."""
        transform = next((t for ending, t in self.transforms.items() if name.endswith(ending)), Transform())
        yield Assembly(self.gguf_tensor_name(name), (stored_name,), transform)

    def _stack(
        self, experts: Experts, name: str, stored_name: str, waiting: dict[str, dict[str, str]]
    ) -> Iterator[Assembly]:
        layer = next((part for part in name.split(".") if part.isdecimal()), "0")
        count = self.config.require(*experts.count)
        parts = waiting.setdefault(layer, {})
        parts[name] = stored_name
        if len(parts) < count * len(experts.projections):
            return
        del waiting[layer]
        for projection in experts.projections:
            names = [experts.part.format(layer=layer, expert=i, projection=projection) for i in range(count)]
            if missing := [n for n in names if n not in parts]:
                raise QuantkitError(f"{self.config.path}: the checkpoint lacks {missing[0]}")
            merged = experts.merged.format(layer=layer, projection=projection)
            yield Assembly(self.gguf_tensor_name(merged), tuple(parts[n] for n in names), stacked=True)

    @cached_property
    def _name_map(self) -> Any:
        import gguf

        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf_name)
        return gguf.get_tensor_name_map(arch, self.n_layers)

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
