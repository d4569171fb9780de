"""Names of the files to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.sources.source import GGUFSource, TensorSource

# The type at the end of a file name: model-F16.gguf, model.Q8_0-00001-of-00003.gguf
_TYPES = "|".join(sorted(map(re.escape, FILE_TYPES), key=len, reverse=True))
_TYPE_SUFFIX = re.compile(rf"([-.]({_TYPES}))?(-\d{{5}}-of-\d{{5}})?$", re.IGNORECASE)


def output_paths(named: str, source: TensorSource, types: Sequence[str], output: Path | None) -> list[Path]:
    """Where the file of each type goes: `output`, if it is a file; else by the model's name, in `output` or beside it.

    `named` is the source as the user named it. Raises QuantkitError when several types would go to one file.
    """
    if len(set(types)) != len(types):
        raise QuantkitError(f"a type is asked for twice: {', '.join(types)}")
    if output is not None and not output.is_dir():
        if len(types) > 1 and output.suffix == ".gguf":
            raise QuantkitError(f"{output}: one file for {len(types)} types; name a directory")
        if len(types) == 1 and output.suffix:
            return [output]
        output.mkdir(parents=True, exist_ok=True)
    home = output
    if home is None:
        path = Path(named)
        home = path.parent if path.is_file() else path if path.is_dir() else Path()
    return [home / f"{stem(source)}-{name}.gguf" for name in types]


def stem(source: TensorSource) -> str:
    """The name of the model without type and shard: from the file's name, or by the GGUF naming convention."""
    if isinstance(source, GGUFSource):
        return _TYPE_SUFFIX.sub("", source.path.stem)
    from quantkit.sources.checkpoint import output_name

    return output_name(source.metadata, "F16").removesuffix("-F16.gguf")
