"""Quantizing in a single call, from a model as the user names it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.formats.atomic import OutputGroup
from quantkit.pipeline.execute import Progress, execute
from quantkit.pipeline.mixtures import file_type
from quantkit.pipeline.naming import Destination, home_of, output_paths
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, plan_all
from quantkit.sources.source import TensorSource, open_source


def plan(
    source: TensorSource | str | os.PathLike[str], type: str, options: QuantizeOptions | None = None, **changes: Any
) -> Plan:
    """What quantizing `source` to file type `type` would write: a Plan, to print, edit or `execute`.

    `changes` are fields of `QuantizeOptions` by name: `plan(source, "Q4_K_M", tensor_types=[("attn_v", "Q8_0")])`.
    Raises QuantkitError for a request that cannot be met.
    """
    model = open_source(source) if isinstance(source, (str, os.PathLike)) else source
    return plan_all(model, [type], replace(options or QuantizeOptions(), **changes))[0]


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
    model = source
    if isinstance(model, (str, os.PathLike)):
        model = open_source(model, allow_nonfinite=allow_nonfinite)
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
