"""Planning, converting and quantizing, each in a single call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.formats.atomic import OutputGroup
from quantkit.pipeline.execute import Progress, execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, plan_all, plan_copy
from quantkit.sources.source import TensorSource, open_checkpoint, open_model

if TYPE_CHECKING:
    from quantkit.sources.checkpoint import OutType


def plan(
    source: TensorSource | str | os.PathLike[str], type: str, options: QuantizeOptions | None = None, **changes: Any
) -> Plan:
    """What quantizing `source` to file type `type` would write: a Plan, to print, edit or `execute`.

    `changes` are fields of `QuantizeOptions` by name: `plan(source, "Q4_K_M", tensor_types=[("attn_v", "Q8_0")])`.
    Raises QuantkitError for a request that cannot be met.
    """
    return plan_all(open_model(source), [type], replace(options or QuantizeOptions(), **changes))[0]


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    outtype: OutType = "auto",
    pre: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    allow_nonfinite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint, a directory or a hub id, as a GGUF file: what convert_hf_to_gguf.py writes.

    `out` is the file, or a directory: one that exists, or a name that ends in a slash; left out, it is the
    checkpoint's, or the current one for a hub id, and the file is named by the GGUF naming convention. `outtype` is the
    type of its matrices (f32, f16, bf16, q8_0, or auto: 16-bit weights stay as they are stored), `pre` its
    pre-tokenizer where that is not recognised, `name` the model's name. `force` replaces a file. Returns the file
    written. Raises QuantkitError.
    """
    from quantkit.sources.checkpoint import output_name

    named = os.fspath(checkpoint)
    source = open_checkpoint(
        named, revision=revision, outtype=outtype, pre=pre, name=name, allow_nonfinite=allow_nonfinite
    )
    destination = Destination.of(out, home_of(named))
    path = destination.file(output_name(source.metadata, source.kind))
    with OutputGroup(force=force, directory=destination.directory) as group:
        execute(
            source,
            [(plan_copy(source), path)],
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            group=group,
        )
    return path


def convert_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    outtype: OutType = "f32",
    name: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Write a LoRA adapter of PEFT, a directory or a hub id, as a GGUF file: what convert_lora_to_gguf.py writes.

    `base` is the base model's checkpoint, a directory or a hub id, of which only the config is read; left out, it is
    the one that the adapter names. The others are as for `convert`. Returns the file written. Raises QuantkitError.
    """
    from quantkit.sources.adapter import open_adapter
    from quantkit.sources.checkpoint import output_name

    named = os.fspath(adapter)
    source = open_adapter(named, None if base is None else os.fspath(base), outtype, name)
    source.check_for_file()
    destination = Destination.of(out, home_of(named))
    path = destination.file(output_name(source.metadata, source.kind))
    with OutputGroup(force=force, directory=destination.directory) as group:
        execute(source, [(plan_copy(source), path)], threads=threads, progress=progress, group=group)
    return path


def quantize(
    source: TensorSource | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    type: str | Sequence[str],
    options: QuantizeOptions | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    max_buffer_size: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    **changes: Any,
) -> list[Path]:
    """Quantize a GGUF file, a checkpoint directory or a hub id to one file type or several, in one reading.

    `out` is the file, or a directory: one that exists, or a name that ends in a slash. Several types need a directory,
    in which files are named after the model and the type; left out, it is that of the model. `force` replaces files.
    `options` and `changes` are as for `plan`, the others as for `execute`. Returns the files written. Raises
    QuantkitError.
    """
    options = replace(options or QuantizeOptions(), **changes)
    model = open_model(source, allow_nonfinite=allow_nonfinite)
    names = [file_type(name).name for name in ([type] if isinstance(type, str) else type)]
    destination = Destination.of(out, home_of(source if isinstance(source, (str, os.PathLike)) else model.label))
    paths = output_paths(destination, model, names)
    outputs = list(zip(plan_all(model, names, options), paths, strict=True))
    inputs = [options.imatrix] if isinstance(options.imatrix, (str, os.PathLike)) else []
    with OutputGroup(force=force, inputs=inputs, directory=destination.directory) as group:
        return execute(
            model,
            outputs,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
            max_buffer_size=max_buffer_size,
            progress=progress,
            group=group,
        )
