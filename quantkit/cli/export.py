"""`quantkit export`: the files that engines need beside a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import Force, Quiet, Verbose, note, read_text, setup
from quantkit.errors import QuantkitError

ENGINES = ("ollama", "vllm")


def command(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="ollama or vllm.")],
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="GGUF file, or the directory that holds it.")],
    source: Annotated[
        str | None, typer.Option("--source", metavar="MODEL", help="Original checkpoint: vllm takes files from it.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message, for ollama.")] = None,
    template: Annotated[
        str | None, typer.Option("--template", metavar="FILE", help="Template in Go's syntax, for ollama.")
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="For ollama: params and system for pulls from the hub, no Modelfile.")
    ] = False,
    force: Force = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write the files that an engine needs beside a GGUF file.

    ollama: a Modelfile with parameters, stop tokens and license; Ollama renders the file's own chat template. vllm:
    config.json and the tokenizer of the original checkpoint.
    """
    setup(verbose, quiet)
    from quantkit.formats.atomic import OutputGroup, write_whole
    from quantkit.report import export
    from quantkit.sources.source import GGUFSource, open_model

    if engine not in ENGINES:
        raise QuantkitError(f"there is no engine {engine!r}: use {' or '.join(ENGINES)}")
    directory = path if path.is_dir() else path.parent
    inputs: list[Path] = []
    if engine == "vllm":
        if source is None:
            raise QuantkitError("vLLM needs the configuration of the original checkpoint: name it with --source")
        found = export.vllm_files(open_model(source))
        contents: dict[str, bytes] = {name: file.read_bytes() for name, file in found.items()}
        inputs = list(found.values())
    else:
        file = path if path.is_file() else export.only_file(directory)
        metadata = GGUFSource(file).metadata
        words = None if template is None else read_text(template)
        texts = (
            export.hub_files(metadata, system, words)
            if hub
            else {"Modelfile": export.modelfile(file.name, metadata, system, words)}
        )
        contents = {name: text.encode() for name, text in texts.items()}
    with OutputGroup(force=force, inputs=inputs) as group:
        for name, data in contents.items():
            write_whole(group.add(directory / name), data)
    for name in contents:
        note(f"wrote {directory / name}")
