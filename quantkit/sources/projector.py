"""The projector of a multimodal checkpoint seen as GGUF: llama.cpp's mmproj file, without writing one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.architectures.projectors import Projector, load_projector
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata
from quantkit.formats.safetensors import Shards
from quantkit.sources.checkpoint import FILE_TYPES, CheckpointSource, OutType


class ProjectorSource(CheckpointSource):
    """The TensorSource of the projector of a checkpoint directory. See CheckpointSource."""

    def __init__(
        self,
        directory: Path,
        outtype: OutType = "auto",
        name: str | None = None,
        allow_nonfinite: bool = False,
        elsewhere: Shards | None = None,
    ) -> None:
        """Read the headers and lay out the tensors; no weight is read yet."""
        super().__init__(directory, outtype, None, name, allow_nonfinite, elsewhere)

    @staticmethod
    def _architecture_of(directory: Path) -> Projector:
        return load_projector(directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is opened again: by the absolute path, for another process."""
        outtype = self.type.name.lower()
        return ProjectorSource, (
            self.directory.absolute(), outtype, self._name, self._allow_nonfinite, self._elsewhere
        )  # fmt: skip

    def seen_as(self, outtype: OutType) -> ProjectorSource:
        """The same projector with matrices of another type."""
        return ProjectorSource(self.directory, outtype, self._name, self._allow_nonfinite, self._elsewhere)

    def _type_of(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        projector = self.architecture
        assert isinstance(projector, Projector)
        if len(shape) > 1 and not name.endswith("_norm.weight"):
            forced = projector.forced_type(name, self.type)
            if forced is not None:
                return forced
        return super()._type_of(name, shape)

    @cached_property
    def metadata(self) -> Metadata:
        """Everything that an mmproj file holds before its tensors, in the reference converter's order."""
        import gguf

        writer = self._new_writer()
        writer.add_type(gguf.GGUFType.MMPROJ)
        self._write_general(writer)
        self.architecture.write_parameters(writer, FILE_TYPES[self.type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        return self._metadata_of(writer)
