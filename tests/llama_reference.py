"""llama.cpp itself, driven through llama-cpp-python: whole-file quantization and logits."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.pipeline.mixtures import COPY, file_type

_kept: list[Any] = []


def _llama() -> Any:
    import llama_cpp

    if not _kept:
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        _kept.append(silent)
    return llama_cpp


def llama_quantize(source: Path, target: Path, type_name: str, **options: Any) -> int:
    """Run llama_model_quantize; returns its code, 0 for success. `options` are fields of its parameters."""
    llama_cpp = _llama()
    params = llama_cpp.llama_model_quantize_default_params()
    file = file_type(type_name)
    params.ftype, params.only_copy, params.nthread = file.number, file is COPY, 2
    for name, value in options.items():
        setattr(params, name, int(value) if isinstance(value, GGMLType) else value)
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))


def llama_plan(source: Path, type_name: str, **options: Any) -> tuple[int, dict[str, str]]:
    """Run llama_model_quantize without writing; returns its code, and the type of each tensor it would write.

    The types are read off the log that `llama-quantize --dry-run` prints. A tensor that stays as it is has "".
    """
    llama_cpp = _llama()
    lines: list[str] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p())
    try:
        code = llama_quantize(source, Path(), type_name, dry_run=True, **options)
    finally:
        llama_cpp.llama_log_set(_kept[0], ctypes.c_void_p())
    text = "".join(lines)
    plan = {}
    for line in re.finditer(r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^\]]*\], type = +\S+ *, *size = (?P<rest>[^\n]*)", text):
        target = re.search(r"\((\w+)\)$", line["rest"])
        plan[line["name"]] = target[1].upper() if target else ""
    return code, plan


def llama_logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits of every position of `tokens`, float32 of shape (n_tokens, n_vocab)."""
    llama_cpp = _llama()
    llm = llama_cpp.Llama(str(model), n_ctx=max(64, len(tokens)), n_threads=2, logits_all=True, verbose=False)
    llm.eval(list(tokens))
    return np.array(llm.scores[: len(tokens)], np.float32)
