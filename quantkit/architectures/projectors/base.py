"""What a projector is: how the part of a multimodal checkpoint that sees or hears becomes a GGUF file (mmproj)."""

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
from quantkit.wording import count_text

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BLOCK = re.compile(r"([va])\.blk\.(\d+)\.(.+)")
_SECTIONS = {"vision_config": "v", "audio_config": "a"}
# What comes before these in the names of some versions of transformers is taken away.
_TOWERS = ("visual.", "vision_tower.", "audio_tower.", "multi_modal_projector.")
_MORE_NUMBERS = 4  # convolutions and layers of projectors are numbered too, the last of them 3


class Projector(Architecture):
    """One family of encoders, of images, sound or both, with what maps their outputs to a text model's embeddings.

    `root` is the whole config.json. `vision` and `audio` hold the fields of the encoders' sections in it, over those
    that the configuration class assumes, or are None; `config` is the first of them. Class attributes beside those of
    `Architecture`:
    - `checkpoints`: by class, its encoders: the sections `vision_config` and `audio_config`, each with the defaults of
      its fields. The first one must be there.
    - `kind`: `clip.projector_type`.
    - `towers`: the types (`model_type`) of the first encoder that it is for, where not all of its classes are.
    - `beginnings`: how the names of its stored tensors begin, once `renames` are done.
    - `required`: GGUF tensors that must be there, beside the same kinds in every block of an encoder. Those of an
      encoder that the checkpoint has not (`a.`, `mm.a.`) are not.
    - `forced`: by a pattern for a part of a weight's GGUF name, the type of tensors that do not follow the file's.
    """

    gguf_name = "clip"
    kind: ClassVar[str]
    towers: ClassVar[tuple[str, ...]] = ()
    beginnings: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]
    forced: ClassVar[Mapping[str, GGMLType]] = {}
    renames: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Config, checkpoint: str) -> None:
        """Take the hyper-parameters of `config`, a model of the class `checkpoint` of `checkpoints`.

        Raises QuantkitError where there is no encoder.
        """
        self.root = self.opened(config)
        encoders: dict[str, Config] = {}
        for section, defaults in self.checkpoints[checkpoint].items():
            if (own := self.root.table(section)) is not None:
                encoders[section] = self.complete(Config({**defaults, **own}, config.path))
            elif not encoders:
                raise QuantkitError(f"{config.path}: it has no {section}")
        self.vision, self.audio = encoders.get("vision_config"), encoders.get("audio_config")
        self.config = next(iter(encoders.values()))

    def opened(self, config: Config) -> Config:
        """The config with the sections of encoders at its root, where a family has them elsewhere."""
        return config

    # Metadata

    @cached_property
    def depths(self) -> dict[str, int]:
        """The number of blocks of each encoder, by the letter that its GGUF names begin with."""
        return {letter: self._depth(encoder) for letter, encoder in (("v", self.vision), ("a", self.audio)) if encoder}

    def _depth(self, encoder: Config) -> int:
        count = encoder.require("num_hidden_layers", "depth", "encoder_layers")
        if count > MAX_LAYERS:
            raise encoder.wrong(("num_hidden_layers",), count, f"at most {MAX_LAYERS}")
        return count

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks of the deeper encoder."""
        return max(self.depths.values())

    @property
    def n_numbers(self) -> int:
        """See Architecture."""
        return max(self.n_layers, _MORE_NUMBERS)

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

    def n_heads(self, encoder: Config) -> int:
        """The number of heads of an encoder."""
        return encoder.require("num_attention_heads", "num_heads", "encoder_attention_heads")

    def write_parameters(self, writer: GGUFWriter, file_type: int) -> None:
        """Add the hyper-parameters, in the reference converter's order and types."""
        writer.add_file_type(file_type)
        if self.vision is not None:
            self.write_vision(writer, self.vision)
        if self.audio is not None:
            self.write_audio(writer, self.audio)
        self.write_kind(writer)

    def write_vision(self, writer: GGUFWriter, vision: Config) -> None:
        """Add the sizes of the encoder of images, and what is done to them first."""
        writer.add_clip_has_vision_encoder(True)
        writer.add_vision_projection_dim(self.text.require("hidden_size"))
        writer.add_vision_image_size(self.image_size)
        writer.add_vision_patch_size(vision.require("patch_size"))
        width, wide = self.sizes
        writer.add_vision_embedding_length(width)
        writer.add_vision_feed_forward_length(wide)
        writer.add_vision_block_count(self.depths["v"])
        writer.add_vision_head_count(self.n_heads(vision))
        writer.add_vision_image_mean(self._channels("image_mean"))
        writer.add_vision_image_std(self._channels("image_std"))

    def write_audio(self, writer: GGUFWriter, audio: Config) -> None:
        """Add the sizes of the encoder of sound, in transformers' names or in Whisper's."""
        writer.add_clip_has_audio_encoder(True)
        writer.add_audio_projection_dim(self.text.require("hidden_size"))
        writer.add_audio_embedding_length(audio.require("hidden_size", "d_model"))
        writer.add_audio_feed_forward_length(audio.require("intermediate_size", "encoder_ffn_dim"))
        writer.add_audio_block_count(self.depths["a"])
        writer.add_audio_head_count(self.n_heads(audio))

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
        inner = name.removeprefix("model.")
        name = inner if inner.startswith(_TOWERS) else name
        for part, instead in self.renames.items():
            name = name.replace(part, instead)
        return name if name.startswith(self.beginnings) else None

    def tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[Assembly]:
        """See Architecture. Raises QuantkitError for a tensor that is missing, too."""
        seen: set[str] = set()
        for assembly in super().tensors(stored):
            seen.add(assembly.name)
            yield assembly
        blocks: dict[str, dict[int, set[str]]] = {
            letter: {i: set() for i in range(depth)} for letter, depth in self.depths.items()
        }
        for name in seen:
            self._refuse_unannounced(name)
            if match := _BLOCK.fullmatch(name):
                blocks[match[1]][int(match[2])].add(match[3])
        missing = [name for name in self.required if name not in seen and self._letter(name) in self.depths]
        for letter, own in blocks.items():
            kinds = set().union(*own.values()) or {"attn_out.weight"}
            missing += [f"{letter}.blk.{i}.{kind}" for i, found in own.items() for kind in sorted(kinds - found)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise QuantkitError(
                f"{self.root.path.parent}: the projector lacks {', '.join(missing[:3])}{more}; is the checkpoint whole?"
            )

    def _refuse_unannounced(self, name: str) -> None:
        """Refuse a tensor of an encoder, or of a block, that config.json does not have."""
        letter = self._letter(name)
        section = next(section for section, its in _SECTIONS.items() if its == letter)
        if letter not in self.depths:
            raise QuantkitError(f"{self.root.path}: it has no {section}, and there is {name}")
        if (match := _BLOCK.fullmatch(name)) and int(match[2]) >= self.depths[letter]:
            raise QuantkitError(
                f"{self.root.path}: {section} has {count_text(self.depths[letter], 'block')}, and there is {name}"
            )

    @staticmethod
    def _letter(name: str) -> str:
        """Which encoder the GGUF tensor `name` belongs to."""
        return "a" if name.startswith(("a.", "mm.a.")) else "v"

    def gguf_tensor_name(self, name: str) -> str:
        """See Architecture; a second tensor of one name, which ends in `.1`, is called after the first."""
        first = name.removesuffix(".1")
        return super().gguf_tensor_name(first) + name[len(first) :]

    def forced_type(self, name: str, file_type: GGMLType) -> GGMLType | None:
        """The type of the matrix `name` where it is not the file's; None where it is."""
        for pattern, kind in self.forced.items():
            if ".weight" in name and re.search(pattern, name):
                return kind
        if ".patch_embd.weight" in name or ".patch_merger.weight" in name:
            return GGMLType.F16 if file_type == GGMLType.F16 else GGMLType.F32
        return GGMLType.F32 if name in ("v.position_embd.weight", "a.position_embd.weight") else None
