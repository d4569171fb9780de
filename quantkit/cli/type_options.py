"""Types on the command line: options that take them, completed by the shell, and llama-quantize's positional ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from quantkit.cli.console import split_list
from quantkit.errors import QuantkitError


def complete_file_type(incomplete: str) -> list[str]:
    """The file types that begin like `incomplete`, or like what follows its last comma."""
    from quantkit.pipeline.mixtures import ALIASES, FILE_TYPES

    return _completions(incomplete, ",", [*FILE_TYPES, *ALIASES, "COPY"])


def complete_tensor_type(incomplete: str) -> list[str]:
    """The tensor types that begin like `incomplete`, or like what follows its last equals sign."""
    from quantkit.blocks.types import GGMLType

    return _completions(incomplete, "=", GGMLType.__members__)


def _completions(incomplete: str, separator: str, names: Iterable[str]) -> list[str]:
    before, found, last = incomplete.rpartition(separator)
    # A shell keeps only what begins exactly like what was typed.
    written = [name.lower() if last.islower() else name for name in names]
    return [f"{before}{found}{name}" for name in written if name.startswith(last)]


FileTypes = Annotated[
    list[str],
    typer.Option(
        "--type",
        "--types",
        metavar="TYPE",
        autocompletion=complete_file_type,
        help="File type; repeat it or use commas for several. `quantkit types` lists them.",
    ),
]


class Positional(NamedTuple):
    """What follows the model on a command line: an output, file types, and a number of threads."""

    output: str | None
    types: list[str]
    threads: int | None


def positional(words: Sequence[str], named_types: Sequence[str]) -> Positional:
    """Read `words` as llama-quantize's users write them: `[OUTPUT] TYPE… [THREADS]`; `named_types` come from --type.

    An output is a name with a `.gguf` ending or a slash, or a directory. Raises BadParameter where types come twice,
    and for a bad number of threads.
    """
    left = list(words)
    output = threads = None
    if left and _is_output(left[0]):
        output = left.pop(0)
    if len(left) > 1 and left[-1].isdecimal():
        threads = int(left.pop())
        if threads < 1:
            raise typer.BadParameter(f"{threads} threads: use 1 or more.")
    if left and named_types:
        raise typer.BadParameter(
            f"Unexpected argument {left[0]!r}: give types after the model or with --type, not both."
        )
    return Positional(output, split_list(left or named_types), threads)


def _is_output(word: str) -> bool:
    from quantkit.pipeline.mixtures import file_type

    try:
        return not [file_type(name) for name in split_list([word])]
    except QuantkitError:
        return word.endswith(".gguf") or "/" in word or os.sep in word or Path(word).is_dir()
