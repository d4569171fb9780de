"""`quantkit quantize`: a checkpoint or a GGUF file, in one type or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import (
    Json,
    Pre,
    Quiet,
    Revision,
    SplitSize,
    SplitTensors,
    Threads,
    Verbose,
    byte_progress,
    emit,
    note,
    read_text,
    setup,
    split_list,
)
from quantkit.errors import QuantkitError

Names = list[str]


def command(
    source: Annotated[str, typer.Argument(help="GGUF file, checkpoint directory, or hub id ORG/NAME.")],
    types: Annotated[Names, typer.Option("--type", help="File type; repeat it, or use commas, for several.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; a directory for several types.")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix, GGUF or .dat.")] = None,
    include_weights: Annotated[Names, typer.Option(help="Use the importance matrix for these tensors.")] = [],  # noqa: B006
    exclude_weights: Annotated[Names, typer.Option(help="Do not use it for these tensors.")] = [],  # noqa: B006
    tensor_type: Annotated[Names, typer.Option(help="Type of tensors by name: REGEX=TYPE.")] = [],  # noqa: B006
    tensor_type_file: Annotated[Path | None, typer.Option(help="File of REGEX=TYPE, by spaces or lines.")] = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of the token embeddings.")] = None,
    leave_output_tensor: Annotated[bool, typer.Option("--leave-output-tensor", help="Keep output.weight.")] = False,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all tensors: no mixture.")] = False,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Quantize quantized tensors.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and infinity.")] = False,
    override_kv: Annotated[Names, typer.Option(help="Set metadata: KEY=TYPE:VALUE.")] = [],  # noqa: B006
    prune_layers: Annotated[str | None, typer.Option(help="Layers to leave out: L0,L1,…")] = None,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Write the same shards as the source.")] = False,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    max_buffer_size: Annotated[int | None, typer.Option(min=1, help="Memory for tensor rows, in MiB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    pre: Pre = None,
    revision: Revision = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint or a GGUF file; the bytes are those that llama-quantize writes.

    Several types are written in one reading of the source. Without -o, files are named after the model and the type
    and written beside a local source, or into the current directory for a checkpoint from the hub.
    """
    setup(verbose, quiet)
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.machine import default_threads
    from quantkit.pipeline.execute import execute, quantizing_kernels
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import output_paths
    from quantkit.pipeline.run import parse_layers, parse_size, parse_tensor_types, plan
    from quantkit.sources.source import open_source

    names = [file_type(name).name for name in split_list(types)]
    listed = read_text(str(tensor_type_file)).split() if tensor_type_file else []
    tensor_types = parse_tensor_types([*tensor_type, *listed])
    model = open_source(source, revision=revision, pre=pre, allow_nonfinite=allow_nonfinite)
    paths = output_paths(source, model, names, output)
    plans = [
        plan(
            model,
            name,
            imatrix=imatrix,
            include_weights=include_weights,
            exclude_weights=exclude_weights,
            tensor_types=tensor_types,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            leave_output_tensor=leave_output_tensor,
            pure=pure,
            allow_requantize=allow_requantize,
            override_kv=override_kv,
            prune_layers=parse_layers(prune_layers or ""),
            keep_split=keep_split,
            split_max_size=parse_size(split_max_size) if split_max_size else None,
            split_max_tensors=split_max_tensors,
        )
        for name in names
    ]
    if dry_run:
        for each in plans:
            try:
                each.check()
            except QuantkitError as problem:
                note(f"warning: {problem}")
        emit("\n\n".join(map(str, plans)), [each.as_dict() for each in plans], as_json)
        return
    outputs = list(zip(plans, paths, strict=True))
    total = sum(info.nbytes for info in model.tensors.values())
    ahead = compiled_ahead(quantizing_kernels(plans), threads or default_threads())
    with ahead, byte_progress(total, "quantize") as progress:
        execute(
            model,
            outputs,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            max_buffer_size=max_buffer_size * 2**20 if max_buffer_size else None,
            progress=progress,
        )
    for each, path in outputs:
        files = [file for file, _, _ in each.files(path)]
        shards = f" in {len(files)} shards" if len(files) > 1 else ""
        note(f"{files[0]}: {each.file_size / 1e6:.1f} MB{shards}, {each.bits_per_weight:.2f} bits per weight")
    if as_json:
        emit("", [{**each.as_dict(), "path": str(path)} for each, path in outputs], True)
