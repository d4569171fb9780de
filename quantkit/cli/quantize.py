"""`quantkit quantize`: a checkpoint or a GGUF file, in one type or several."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.calibration.roundings import Rounding
from quantkit.cli.console import (
    SPLITTING,
    Backend,
    Device,
    Force,
    Json,
    Memory,
    Model,
    Pre,
    Precision,
    Quiet,
    Remote,
    Revision,
    SplitSize,
    SplitTensors,
    Threads,
    Verbose,
    Workers,
    byte_progress,
    emit,
    joined,
    note,
    read_text,
    setup,
    split_list,
)
from quantkit.cli.hints import hinted
from quantkit.cli.type_options import FileTypes, complete_file_type, complete_tensor_type, positional
from quantkit.errors import QuantkitError
from quantkit.wording import count_text, size_text

if TYPE_CHECKING:
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.naming import Destination
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.pipeline.plan import Plan
    from quantkit.sources.source import TensorSource

Names = list[str]

# Sections of the help.
IMPORTANCE = "Importance matrix"
CALIBRATION = "Calibration"
CHOICE = "Choice of types"
TENSORS = "Types of tensors"


def command(
    source: Model,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUTPUT] [TYPE]...",
            show_default=False,
            autocompletion=complete_file_type,
            help="Output and file types, as for llama-quantize; or use -o and --type.",
        ),
    ] = None,
    types: FileTypes = [],  # noqa: B006
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|DIR", help="File to write, or directory; a directory for several types."
        ),
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantize tensors that are quantized already.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept weights that are NaN or infinite.")
    ] = False,
    override_kv: Annotated[
        Names, typer.Option(metavar="KEY=TYPE:VALUE", help="Set metadata; TYPE is int, float, bool or str.")
    ] = [],  # noqa: B006
    prune_layers: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Layers to leave out, such as 20,21,22.")
    ] = None,
    merge_lora: Annotated[
        Names,
        typer.Option(
            metavar="ADAPTER[:SCALE]", help="Merge a LoRA adapter first: GGUF file, PEFT directory, or hub id."
        ),
    ] = [],  # noqa: B006
    max_buffer_size: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Memory for tensor rows, in MiB.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=IMPORTANCE, help="Importance matrix, GGUF or .dat.")
    ] = None,
    include_weights: Annotated[
        Names,
        typer.Option(
            metavar="NAME", rich_help_panel=IMPORTANCE, help="Use it only for tensors whose names contain NAME."
        ),
    ] = [],  # noqa: B006
    exclude_weights: Annotated[
        Names,
        typer.Option(
            metavar="NAME", rich_help_panel=IMPORTANCE, help="Do not use it for tensors whose names contain NAME."
        ),
    ] = [],  # noqa: B006
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CALIBRATION,
            help="Calibration text (UTF-8), or wikitext-2[:SPLIT]: takes the place of an importance matrix.",
        ),
    ] = None,
    rounding: Annotated[
        Rounding | None,
        typer.Option(
            metavar="NAME",
            show_default="nearest",
            rich_help_panel=CALIBRATION,
            help="Rounding: nearest; gptq (error feedback from the calibration text); yaqa (and gradients).",
        ),
    ] = None,
    n_ctx: Annotated[
        int, typer.Option("--n-ctx", min=4, metavar="N", rich_help_panel=CALIBRATION, help="Tokens in a chunk.")
    ] = 512,
    chunks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default="128 for gptq, else all",
            rich_help_panel=CALIBRATION,
            help="Chunks of the text to use.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what is finished if the run is stopped; go on after it if repeated."),
    ] = False,
    target_size: Annotated[
        Names,
        typer.Option(
            metavar="SIZE|TYPE",
            rich_help_panel=CHOICE,
            help="Choose types for a file of this size, such as 5.2GB, or of that of a file type, such as Q4_K_M.",
        ),
    ] = [],  # noqa: B006
    target_bpw: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="BITS", rich_help_panel=CHOICE, help="The same, by bits per weight."),
    ] = None,
    min_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", rich_help_panel=CHOICE, autocompletion=complete_tensor_type, help="Smallest type to choose."
        ),
    ] = None,
    max_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", rich_help_panel=CHOICE, autocompletion=complete_tensor_type, help="Largest type to choose."
        ),
    ] = None,
    tie: Annotated[
        Names,
        typer.Option(
            metavar="REGEX",
            rich_help_panel=CHOICE,
            help=r"One type for all tensors for which REGEX captures the same, such as 'blk\.(\d+)\.attn_[qkv]'.",
        ),
    ] = [],  # noqa: B006
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            rich_help_panel=CHOICE,
            help="Only types that ENGINE (llama.cpp, ollama, vllm) loads.",
        ),
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=CHOICE, help="Write the chosen plan as JSON.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CHOICE,
            help="Use the types of a saved plan; with a size, choose anew by its costs.",
        ),
    ] = None,
    backend: Backend = "numpy",
    device: Device = "cpu",
    precision: Precision = "f32",
    memory: Memory = None,
    pure: Annotated[
        bool, typer.Option("--pure", rich_help_panel=TENSORS, help="The same type for all tensors: no mixture.")
    ] = False,
    tensor_type: Annotated[
        Names,
        typer.Option(
            metavar="REGEX=TYPE",
            rich_help_panel=TENSORS,
            autocompletion=complete_tensor_type,
            help="Type of the tensors whose names match.",
        ),
    ] = [],  # noqa: B006
    tensor_type_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=TENSORS, help="File of REGEX=TYPE, separated by spaces or lines."),
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", rich_help_panel=TENSORS, autocompletion=complete_tensor_type, help="Type of output.weight."
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            rich_help_panel=TENSORS,
            autocompletion=complete_tensor_type,
            help="Type of the token embeddings.",
        ),
    ] = None,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", rich_help_panel=TENSORS, help="Leave output.weight as it is.")
    ] = False,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", rich_help_panel=SPLITTING, help="Write the same shards as the source.")
    ] = False,
    pre: Pre = None,
    revision: Revision = None,
    remote: Remote = False,
    cluster: Workers = None,
    threads: Threads = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint or a GGUF file; the bytes are those that llama-quantize writes.

    With --rounding gptq, or yaqa, and a --calibration text, types and sizes stay the same, but less quality is lost;
    with --target-size the types, too, are chosen by the calibration, to lose the least in that many bytes.
    Types can follow the model, with or without an output, as llama-quantize takes them. Several types are written in
    one reading of the source. Without an output, files are named after the model and the type and written beside a
    local source, or into the current directory for a checkpoint from the hub.
    """
    setup(verbose, quiet)
    from quantkit.cli.calibrated import CalibrationOptions, summary, wishes_of
    from quantkit.cli.parsing import (
        parse_layers,
        parse_memory,
        parse_override,
        parse_scaled,
        parse_size,
        parse_tensor_types,
    )
    from quantkit.evaluate.settings import Chunking, Compute
    from quantkit.formats.atomic import OutputGroup
    from quantkit.pipeline.naming import Destination, home_of
    from quantkit.pipeline.options import QuantizeOptions
    from quantkit.sources.source import open_model

    given = positional(rest or [], types)
    sizes = [*split_list(target_size), *([] if target_bpw is None else [f"{target_bpw}bpw"])]
    if not given.types and not sizes and plan is None:
        raise typer.BadParameter("Name a file type after the model or with --type, such as Q4_K_M.")
    if given.types and (sizes or plan is not None):
        raise typer.BadParameter("Name file types, or have types chosen by --target-size or --plan, not both.")
    if given.output is not None and output is not None:
        raise typer.BadParameter("Give the output after the model or with --output, not both.")
    if plan is None and not sizes:
        for name, value in (("--min-type", min_type), ("--max-type", max_type), ("--tie", tie), ("--for", engine)):
            if value:
                raise typer.BadParameter(f"{name} needs a --target-size: it bounds what is chosen.")
    output, threads = given.output if output is None else output, threads or given.threads
    listed = read_text(str(tensor_type_file)).split() if tensor_type_file else []
    options = QuantizeOptions(
        imatrix=imatrix,
        include_weights=include_weights,
        exclude_weights=exclude_weights,
        calibrated=calibration is not None,
        tensor_types=parse_tensor_types([*tensor_type, *listed]),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        leave_output_tensor=leave_output_tensor,
        pure=pure,
        allow_requantize=allow_requantize,
        override_kv=[parse_override(each) for each in override_kv],
        prune_layers=[] if prune_layers is None else parse_layers(prune_layers),
        keep_split=keep_split,
        split_max_size=None if split_max_size is None else parse_size(split_max_size),
        split_max_tensors=split_max_tensors,
    )
    model = open_model(source, revision=revision, remote=remote, pre=pre, allow_nonfinite=allow_nonfinite)
    if merge_lora:
        from quantkit.sources import merged

        model = merged.merge_lora(model, [parse_scaled(each) for each in merge_lora])
    destination = Destination.of(output, home_of(source))
    settings = CalibrationOptions(
        calibration, rounding, Chunking(n_ctx=n_ctx, chunks=chunks),
        Compute(backend=backend, device=device, precision=precision, threads=threads, memory=parse_memory(memory)),
        resume, sizes, plan, save_plan, dry_run,
    )  # fmt: skip
    inputs = [path for path in (imatrix, tensor_type_file, plan) if path is not None]
    common = {
        "threads": threads,
        "allow_nonfinite": allow_nonfinite,
        "max_buffer_size": max_buffer_size * 2**20 if max_buffer_size else settings.compute.buffer_size,
    }
    with OutputGroup(force=force, inputs=inputs, directory=destination.directory) as group:
        if settings.wanted:
            wishes = wishes_of(min_type, max_type, tie, engine)
            outputs, reports = settings.run(model, given.types, options, wishes, destination, group, cluster, **common)
        else:
            outputs = _plain(model, given.types, options, destination, group, dry_run, resume, cluster, **common)
            reports = []
    plans = [each for each, _ in outputs]
    if dry_run:
        planned = [{"path": None, **each.as_dict()} for each in plans]
        emit("\n\n".join(map(str, plans)), {"model": model.label, "files": planned}, as_json)
        return
    for each, path in outputs:
        files = [file for file, _, _ in each.files(path)]
        shards = f" in {count_text(len(files), 'shard')}" if len(files) > 1 else ""
        note(f"{files[0]}: {size_text(each.file_size)}{shards}, {each.bits_per_weight:.2f} bits per weight")
    for (_, path), report in zip(outputs, reports, strict=False):
        for line in summary(report):
            note(f"{path}: {line}")
    if as_json:
        written = [{"path": path, **each.as_dict()} for each, path in outputs]
        emit("", {"model": model.label, "files": written}, True)


def _plain(
    model: TensorSource,
    types: list[str],
    options: QuantizeOptions,
    destination: Destination,
    group: OutputGroup,
    dry_run: bool,
    resume: bool,
    cluster: str | None,
    **common: Any,
) -> list[tuple[Plan, Path]]:
    """Quantize without a calibration: what llama-quantize writes."""
    from quantkit.compile.ahead import compiled_ahead
    from quantkit.formats.unfinished import WorkDirectory
    from quantkit.machine import default_threads
    from quantkit.pipeline.execute import execute, quantizing_kernels
    from quantkit.pipeline.mixtures import file_type
    from quantkit.pipeline.naming import output_paths
    from quantkit.pipeline.plan import plan_all

    names = [file_type(name).name for name in types]
    paths = output_paths(destination, model, names)
    plans = plan_all(model, names, options)
    outputs = list(zip(plans, paths, strict=True))
    if dry_run:
        for each in plans:
            try:
                each.check()
            except QuantkitError as problem:
                note(f"warning: {hinted(problem)}")
        return outputs
    for path in paths:
        group.check(path)
    work = WorkDirectory(paths[0], True) if resume else None
    total = sum(info.nbytes for info in model.tensors.values())
    threads = common["threads"] or default_threads()
    with ExitStack() as stack:
        workers = stack.enter_context(joined(cluster))
        if workers is None:
            stack.enter_context(compiled_ahead(quantizing_kernels(plans), threads))
        progress = stack.enter_context(byte_progress(total, "quantize"))
        execute(model, outputs, progress=progress, group=group, work=work, cluster=workers, **common)
    return outputs
