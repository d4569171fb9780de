"""What a projector is: how the part of a multimodal checkpoint that sees becomes a GGUF file of its own (mmproj)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.architectures.base import Architecture, Assembly
from quantkit.architectures.config import Config
from quantkit.architectures.forward import MAX_LAYERS
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import StoredTensor, read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BLOCK = re.compile(r"v\.blk\.(\d+)\.(.+)")


class Projector(Architecture):
    """One family of vision towers with what maps their outputs to a text model's embeddings.

    `config` holds the fields of `vision_config`, over those that the configuration class assumes; `root` is the whole
    config.json. Class attributes beside those of `Architecture` (`checkpoints` has the defaults of `vision_config`):
    - `kind`: `clip.projector_type`.
    - `beginnings`: how the names of its stored tensors begin, once `renames` are done.
    - `required`: GGUF tensors that must be there, beside the same kinds in every block.
    - `forced`: by a part of a GGUF name, the type of tensors that do not follow the file's.
    """

    gguf_name = "clip"
    kind: ClassVar[str]
    beginnings: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]
    forced: ClassVar[Mapping[str, GGMLType]] = {}
    renames: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Config, checkpoint: str) -> None:
        """Take the hyper-parameters of `config`, a model of the class `checkpoint` of `checkpoints`.

        Raises QuantkitError where there is no tower.
        """
        vision = config.table("vision_config")
        if vision is None:
            raise QuantkitError(f"{config.path}: it has no vision_config")
        self.root = config
        self.config = self.complete(Config({**self.checkpoints[checkpoint], **vision}, config.path))

    # Metadata

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks of the tower."""
        count = self.config.require("num_hidden_layers", "depth")
        if count > MAX_LAYERS:
            raise self.config.wrong(("num_hidden_layers",), count, f"at most {MAX_LAYERS}")
        return count

    @cached_property
    def text(self) -> Config:
        """The text model's hyper-parameters, which older files have at the root."""
        return Config({**self.root.values, **(self.root.table("text_config") or {})}, self.root.path)

    @cached_property
    def preprocessor(self) -> Config:
        """What is done to an image first: preprocessor_config.json, and over it processor_config.json."""
        values: dict[str, Any] = {}
        directory = self.root.path.parent
        for name, inner in (
            ("preprocessor_config.json", "media_proc_cfg"),
            ("processor_config.json", "image_processor"),
        ):
            if (directory / name).is_file():
                found = Config(read_json(directory / name), directory / name)
                values |= {**found.values, **(found.table(inner) or {})}
        if not values:
            raise QuantkitError(f"{directory}: it has no preprocessor_config.json, which a projector needs")
        return Config(values, directory / "preprocessor_config.json")

    @property
    def image_size(self) -> int:
        """The side of an image in pixels."""
        return self.config.require("image_size")

    @property
    def sizes(self) -> tuple[int, int]:
        """The width of the tower, and that of its feed-forward blocks."""
        return self.config.require("hidden_size"), self.config.require("intermediate_size")

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """Add the hyper-parameters, in the reference converter's order and types."""
        config = self.config
        writer.add_file_type(file_type)
        writer.add_clip_has_vision_encoder(True)
        writer.add_vision_projection_dim(self.text.require("hidden_size"))
        writer.add_vision_image_size(self.image_size)
        writer.add_vision_patch_size(config.require("patch_size"))
        width, wide = self.sizes
        writer.add_vision_embedding_length(width)
        writer.add_vision_feed_forward_length(wide)
        writer.add_vision_block_count(self.n_layers)
        writer.add_vision_head_count(config.require("num_attention_heads", "num_heads"))
        writer.add_vision_image_mean(self._channels("image_mean"))
        writer.add_vision_image_std(self._channels("image_std"))
        self.write_kind(writer)

    def write_kind(self, writer: GGUFWriter) -> None:
        """Add what is this family's own: its projector's type first."""
        writer.add_clip_projector_type(self.kind)

    def write_activation(self, writer: GGUFWriter) -> None:
        """Add which activation the tower has. Raises QuantkitError for others than SiLU and GELU."""
        activation = self.config.find("hidden_act")
        if activation == "silu":
            writer.add_vision_use_silu(True)
        elif activation == "gelu":
            writer.add_vision_use_gelu(True)
        else:
            raise self.config.wrong(("hidden_act",), activation, "silu or gelu")

    def _channels(self, name: str) -> list[float]:
        values = self.preprocessor.listed(name, 3)
        return [self.preprocessor.finite(value, (name,)) for value in values]

    # Tensors

    def canonical_name(self, name: str) -> str | None:
        """See Architecture: here it is the text model that is another part."""
        if "language_model." in name:
            return None
        name = name.removeprefix("model.") if name.startswith(("model.visual.", "model.vision_tower.")) else name
        for part, instead in self.renames.items():
            name = name.replace(part, instead)
        return name if name.startswith(self.beginnings) else None

    def tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """See Architecture. Raises QuantkitError for a tensor that is missing, too."""
        seen: set[str] = set()
        for assembly in super().tensors(stored):
            seen.add(assembly.name)
            yield assembly
        blocks: dict[int, set[str]] = {i: set() for i in range(self.n_layers)}
        for name in seen:
            if match := _BLOCK.fullmatch(name):
                blocks.setdefault(int(match[1]), set()).add(match[2])
        kinds = set().union(*blocks.values()) or {"attn_out.weight"}
        missing = [name for name in self.required if name not in seen]
        missing += [f"v.blk.{i}.{kind}" for i, own in sorted(blocks.items()) for kind in sorted(kinds - own)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise QuantkitError(
                f"{self.root.path.parent}: the projector lacks {', '.join(missing[:3])}{more}; is the checkpoint whole?"
            )

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture; a second tensor of one name, which ends in `.1`, is called after the first."""
        first = name.removesuffix(".1")
        return super().gguf_tensor_name(first) + name[len(first) :]

    def forced_type(self, name: str, file_type: GGMLType) -> GGMLType | None:
        """The type of the matrix `name` where it is not the file's; None where it is."""
        for part, kind in self.forced.items():
            if part in name:
                return kind
        if ".patch_embd.weight" in name or ".patch_merger.weight" in name:
            return GGMLType.F16 if file_type == GGMLType.F16 else GGMLType.F32
        return GGMLType.F32 if name == "v.position_embd.weight" else None
