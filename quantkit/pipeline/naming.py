"""Names of the files to write."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.sources.source import GGUFSource, TensorSource

# The type at the end of a file name: model-F16.gguf, model.Q8_0-00001-of-00003.gguf
_TYPES = "|".join(sorted(map(re.escape, FILE_TYPES), key=len, reverse=True))
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_TYPE_SUFFIX = re.compile(rf"[-.]({_TYPES})$", re.IGNORECASE)


@dataclass(frozen=True)
class Destination:
    """Where outputs go: a file, or a directory in which they get default names."""

    path: Path
    is_directory: bool

    @classmethod
    def of(cls, output: str | os.PathLike[str] | None, default: Path = Path()) -> Destination:
        """Interpret `output`: an existing directory or a name ending in a slash is a directory, anything else a file.

        None is the directory `default`.
        """
        if output is None:
            return cls(default, True)
        name = os.fspath(output)
        if not name:
            raise QuantkitError("the name of the output is empty")
        path = Path(name)
        return cls(path, name.endswith(("/", os.sep)) or path.is_dir())

    @property
    def directory(self) -> Path | None:
        """The directory, which may be created; None for a file, whose directory must exist."""
        return self.path if self.is_directory else None

    def file(self, name: str) -> Path:
        """The path of a single output, called `name` by default."""
        return self.path / name if self.is_directory else self.path


def home_of(model: str | os.PathLike[str]) -> Path:
    """The default directory for outputs of `model`: its own, or the current one for a model on the hub."""
    path = Path(model)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def output_paths(
    destination: Destination, source: TensorSource, types: Sequence[str], marks: Sequence[str] = ()
) -> list[Path]:
    """The path of each type's file. Raises QuantkitError when several types would go to one file.

    Default names end with the type, where the hub and Ollama look for it; what `marks` has for a type, if not "",
    comes before it.
    """
    names = ["-".join(filter(None, each)) for each in zip(marks or [""] * len(types), types, strict=True)]
    if len(set(names)) != len(names):
        raise QuantkitError(f"a type is named twice: {', '.join(names)}")
    if not types:
        raise QuantkitError("no file type is named")
    if len(types) > 1 and not destination.is_directory:
        raise QuantkitError(
            f"{destination.path}: one file for {len(types)} types; name a directory: {destination.path}/"
        )
    return [destination.file(f"{stem(source)}-{name}.gguf") for name in names]


def stem(source: TensorSource) -> str:
    """The name of the model without its type: from the file's name, or by the GGUF naming convention."""
    if isinstance(source, GGUFSource):
        return _TYPE_SUFFIX.sub("", full_stem(source))
    from quantkit.sources.checkpoint import output_name

    return output_name(source.metadata, "F16").removesuffix("-F16.gguf")


def full_stem(source: GGUFSource) -> str:
    """The name of a GGUF model as its files have it, the type included, without the number of a shard."""
    return _SHARD_SUFFIX.sub("", source.path.stem)
