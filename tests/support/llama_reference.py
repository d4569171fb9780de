"""llama.cpp itself, driven through llama-cpp-python: whole-file quantization and logits."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Run llama_model_quantize; returns its code, 0 for success. `options` are fields of its parameters.

    `imatrix` is a dict of float32 weights by name, `tt_overrides` (pattern, type) pairs, `prune_layers` numbers, and
    `kv_overrides` (key, tag, value) with llama.cpp's tags: 0 int, 1 float, 2 bool, 3 string.
    """
    llama_cpp = _llama()
    params = llama_cpp.llama_model_quantize_default_params()
    file = file_type(type_name)
    params.ftype, params.only_copy, params.nthread = file.number, file is COPY, 2
    keep: list[Any] = []
    for name, value in options.items():
        if name in _MAKERS:
            value = _MAKERS[name](llama_cpp, value, keep)
            keep.append(value)
        setattr(params, name, int(value) if isinstance(value, GGMLType) else value)
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))


def _imatrix(llama_cpp: Any, weights: dict[str, np.ndarray], keep: list[Any]) -> Any:
    array = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for slot, (name, values) in zip(array, weights.items(), strict=False):
        data = np.ascontiguousarray(values, np.float32)
        keep.append(data)
        slot.name, slot.size = name.encode(), data.size
        slot.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array


def _patterns(llama_cpp: Any, pairs: Sequence[tuple[str, GGMLType]], keep: list[Any]) -> Any:
    array = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))()
    for slot, (pattern, kind) in zip(array, pairs, strict=False):
        slot.pattern, slot.type = pattern.encode(), int(kind)
    return array


def _values(llama_cpp: Any, values: Sequence[tuple[str, int, Any]], keep: list[Any]) -> Any:
    array = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for slot, (key, tag, value) in zip(array, values, strict=False):
        slot.key, slot.tag = key.encode(), tag
        setattr(slot.value, ("val_i64", "val_f64", "val_bool", "val_str")[tag], value)
    return array


def _layers(llama_cpp: Any, layers: Sequence[int], keep: list[Any]) -> Any:
    return (ctypes.c_int32 * (len(layers) + 1))(*layers, -1)


_MAKERS = {"imatrix": _imatrix, "tt_overrides": _patterns, "kv_overrides": _values, "prune_layers": _layers}


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
    each = re.compile(r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^\]]*\], type = +\S+ *, *size = (?P<rest>[^\n]*)")
    for line in each.finditer(text):
        target = re.search(r"\((\w+)\)$", line["rest"])
        plan[line["name"]] = target[1].upper() if target else ""
    return code, plan


@contextmanager
def _model(path: Path, n_tokens: int) -> Iterator[Any]:
    llm = _llama().Llama(str(path), n_ctx=max(64, n_tokens), n_threads=2, logits_all=True, verbose=False)
    try:
        yield llm
    finally:
        llm.close()


def llama_logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits of every position of `tokens`, float32 of shape (n_tokens, n_vocab)."""
    with _model(model, len(tokens)) as llm:
        llm.eval(list(tokens))
        return np.array(llm.scores[: len(tokens)], np.float32)


def llama_computes(model: Path, text: bytes) -> tuple[dict[str, str], list[int]]:
    """Load a file, and compute logits of a text that are not NaN and not all alike; returns metadata and token ids."""
    with _model(model, len(text)) as llm:
        ids = llm.tokenize(text, add_bos=True, special=True)
        llm.eval(ids)
        assert np.isfinite(np.array(llm.scores[: len(ids)])).all()
        assert np.ptp(llm.scores[len(ids) - 1]) > 0
        return llm.metadata, ids


def llama_logits_with(model: Path, adapter: Path, scale: float, tokens: Sequence[int]) -> np.ndarray:
    """Logits as `llama_logits` gives them, with a LoRA adapter at work."""
    llama_cpp = _llama()
    with _model(model, len(tokens)) as llm:
        lora = llama_cpp.llama_adapter_lora_init(llm.model, str(adapter).encode())
        assert lora, "llama.cpp does not load the adapter"
        pointers, scales = (type(lora) * 1)(lora), (ctypes.c_float * 1)(scale)
        assert llama_cpp.llama_set_adapters_lora(llm.ctx, pointers, 1, scales) == 0
        llm.eval(list(tokens))
        return np.array(llm.scores[: len(tokens)], np.float32)


def llama_vector(model: Path, tokens: Sequence[int], pooling: int, n_out: int | None = None) -> np.ndarray:
    """The pooled vector of `tokens`, not normalised: float32 [n_embd], or `n_out` scores.

    `pooling` is its number, -1 the file's.
    """
    llama_cpp = _llama()
    n = max(64, len(tokens))
    options = {"n_ctx": n, "n_batch": n, "n_ubatch": n, "n_threads": 2, "verbose": False}
    llm = llama_cpp.Llama(str(model), embedding=True, pooling_type=pooling, **options)
    try:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        run = llama_cpp.llama_encode if llama_cpp.llama_model_has_encoder(llm.model) else llama_cpp.llama_decode
        assert run(llm.ctx, batch) == 0
        vector = llama_cpp.llama_get_embeddings_seq(llm.ctx, 0)
        result = np.array(vector[: n_out or llama_cpp.llama_model_n_embd(llm.model)], np.float32)
        llama_cpp.llama_batch_free(batch)
        return result
    finally:
        llm.close()


def llama_senses(projector: Path) -> tuple[bool, bool]:
    """Whether the projector in a file lets a text model see, and hear, once libmtmd has loaded it and tried it out."""
    from llama_cpp import mtmd_cpp

    _llama()
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup = False, 2, True
    context = mtmd_cpp.mtmd_init_from_file(str(projector).encode(), None, params)
    if not context:
        raise ValueError(f"{projector}: llama.cpp does not load it")
    try:
        return bool(mtmd_cpp.mtmd_support_vision(context)), bool(mtmd_cpp.mtmd_support_audio(context))
    finally:
        mtmd_cpp.mtmd_free(context)


def llama_sees(text_model: Path, projector: Path, image: np.ndarray) -> np.ndarray:
    """The vectors [tokens, width] that a text model is given of an image [height, width, 3], uint8."""
    from llama_cpp import mtmd_cpp as mtmd

    llama_cpp = _llama()
    model = llama_cpp.llama_model_load_from_file(str(text_model).encode(), llama_cpp.llama_model_default_params())
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup = False, 2, False
    context = mtmd.mtmd_init_from_file(str(projector).encode(), model, params)
    if not context:
        raise ValueError(f"{projector}: llama.cpp does not load it")
    pixels = np.ascontiguousarray(image).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
    chunks, text = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_input_text()
    text.text = mtmd.mtmd_default_marker()
    text.text_len, text.parse_special = len(text.text), True
    try:
        code = mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
        if code or mtmd.mtmd_input_chunks_size(chunks) != 1:
            raise ValueError("an image alone is not one chunk")
        chunk = mtmd.mtmd_input_chunks_get(chunks, 0)
        if mtmd.mtmd_encode_chunk(context, chunk):
            raise ValueError("llama.cpp cannot encode the image")
        shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), llama_cpp.llama_model_n_embd(model)
        found = ctypes.cast(mtmd.mtmd_get_output_embd(context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(found, shape).copy()
    finally:
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_free(context)
        llama_cpp.llama_model_free(model)
