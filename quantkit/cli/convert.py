"""`quantkit convert`: a checkpoint as a GGUF file."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from quantkit.cli.console import (
    Force,
    Pre,
    Quiet,
    Remote,
    Revision,
    Threads,
    Verbose,
    byte_progress,
    note,
    setup,
)
from quantkit.wording import count_text, size_text


class OutTypeName(str, Enum):
    """The type of the matrices in the file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    auto = "auto"


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory, or hub id ORG/NAME.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", "--outfile", metavar="FILE|DIR", help="File to write, or directory."),
    ] = None,
    force: Force = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="MODEL is a LoRA adapter, as PEFT saves it: write a GGUF adapter.")
    ] = False,
    mmproj: Annotated[
        bool, typer.Option("--mmproj", help="Write the projector of a multimodal MODEL: what lets it see or hear.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="the one that the adapter names",
            help="Base model of the adapter: checkpoint directory, or hub id. Only its config is read.",
        ),
    ] = None,
    outtype: Annotated[
        OutTypeName | None,
        typer.Option(
            "--outtype",
            "--type",
            "--types",
            metavar="TYPE",
            case_sensitive=False,
            show_default="auto, or f32 for adapters",
            help="f32, f16, bf16, q8_0, or auto: 16-bit weights stay as they are stored.",
        ),
    ] = None,
    model_name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the model, for general.name.")] = None,
    pre: Pre = None,
    revision: Revision = None,
    remote: Remote = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept weights that are NaN or infinite.")
    ] = False,
    threads: Threads = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Convert a Hugging Face checkpoint to a GGUF file, like llama.cpp's convert_hf_to_gguf.py.

    With --lora, a LoRA adapter as PEFT saves it, like llama.cpp's convert_lora_to_gguf.py. With --mmproj, the
    encoders of images and sound and the projector of a multimodal checkpoint, to be given to llama.cpp beside the text
    model.

    Without --output, the file is named by the GGUF naming convention and written to the checkpoint's directory, or to
    the current directory for a checkpoint from the hub.
    """
    setup(verbose, quiet)
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.execute import execute
    from quantkit.pipeline.naming import Destination, home_of
    from quantkit.pipeline.plan import plan_copy
    from quantkit.sources.adapter import open_adapter
    from quantkit.sources.checkpoint import CheckpointSource, output_name
    from quantkit.sources.source import open_checkpoint

    source: CheckpointSource
    if lora and mmproj:
        raise typer.BadParameter("--lora and --mmproj are different files: convert one after the other.")
    if mmproj and pre:
        raise typer.BadParameter("--pre is of no use for a projector.")
    if lora:
        for option, value in (("--pre", pre), ("--revision", revision), ("--remote", remote)):
            if value:
                raise typer.BadParameter(f"{option} is of no use for an adapter.")
        adapter = open_adapter(checkpoint, base, "f32" if outtype is None else outtype.value, model_name)
        adapter.check_for_file()
        source = adapter
    elif base is not None:
        raise typer.BadParameter("--base is the base model of an adapter: give --lora, too.")
    else:
        source = open_checkpoint(
            checkpoint, revision=revision, remote=remote, outtype="auto" if outtype is None else outtype.value,
            name=model_name, allow_nonfinite=allow_nonfinite,
            **({"projector": True} if mmproj else {"pre": pre}),
        )  # fmt: skip
    destination = Destination.of(output, home_of(checkpoint))
    path = destination.file(output_name(source.metadata, source.kind))
    plan = plan_copy(source)
    with (
        OutputGroup(force=force, directory=destination.directory) as group,
        byte_progress(plan.nbytes, "convert") as progress,
    ):
        execute(
            source, [(plan, path)], threads=threads, allow_nonfinite=allow_nonfinite, progress=progress, group=group
        )
    note(
        f"{path}: {size_text(plan.file_size)}, {count_text(len(plan.tensors), 'tensor')}, {source.type.name}"
        + (f", {source.dequantized}" if source.dequantized else "")
    )
