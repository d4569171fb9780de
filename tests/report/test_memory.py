"""Memory that a model needs, against what llama.cpp prints when it loads the same file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import requires_reference
from make_checkpoints import make_checkpoint
from support.conversion import convert

from quantkit.errors import QuantkitError
from quantkit.report.memory import memory_needed, recommend
from quantkit.sources.source import GGUFSource

# Loads a file in several contexts and prints llama.cpp's buffers, in MiB: in a process of its own, for its log.
_PROGRAM = """
import ctypes, json, re, sys
import llama_cpp as ll
lines = []
log = ll.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
ll.llama_log_set(log, ctypes.c_void_p(0))
ll.llama_backend_init()
model = ll.llama_model_load_from_file(sys.argv[1].encode(), ll.llama_model_default_params())
found = []
for n_ctx, kind, flash in json.loads(sys.argv[2]):
    lines.clear()
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 2048, 512
    params.type_k = params.type_v = kind
    params.flash_attn_type, params.swa_full = flash, False
    ll.llama_free(ll.llama_init_from_model(model, params))
    text = "".join(lines)
    sizes = {what: sum(map(float, re.findall(rf"CPU {what} buffer size = +([0-9.]+) MiB", text)))
             for what in ("KV", "RS", "compute")}
    found.append([sizes["KV"] + sizes["RS"], sizes["compute"]])
print(json.dumps(found))
"""
_SETTINGS = [(512, "f16", True), (4096, "f16", True), (20000, "f16", True), (4096, "q8_0", True), (4096, "f16", False)]
_NUMBERS = {"f16": 1, "q8_0": 8}


def _reference(path: Path) -> list[list[float]]:
    wanted = [(n_ctx, _NUMBERS[kv], int(flash)) for n_ctx, kv, flash in _SETTINGS]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path), json.dumps(wanted)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _compare(path: Path, slack: float) -> None:
    """`slack` bounds the compute buffer's difference, which depends on how ggml's allocator packs it."""
    source = GGUFSource(path)
    for (n_ctx, kv, flash), (cache, compute) in zip(_SETTINGS, _reference(path), strict=True):
        need = memory_needed(source.metadata, source.tensors, n_ctx=n_ctx, kv=kv, flash_attention=flash)
        assert need.weights == sum(info.nbytes for info in source.tensors.values())
        assert need.cache / 2**20 == pytest.approx(cache, abs=0.011), (n_ctx, kv)  # printed with two decimals
        assert need.compute / 2**20 == pytest.approx(compute, rel=slack, abs=1.2), (n_ctx, kv, flash)


@requires_reference
def test_as_llama_cpp_prints(tinylm_f32):
    _compare(tinylm_f32, 0.05)


@requires_reference
def test_as_llama_cpp_prints_for_a_real_vocabulary(smollm_f16):
    _compare(smollm_f16.path, 0.05)


@requires_reference
@pytest.mark.parametrize(
    "name", ["tiny-gemma2", "tiny-gemma3", "tiny-olmo3", "tiny-qwen3", "tiny-qwen3-moe", "tiny-gpt2"]
)
def test_windows_and_head_sizes(name, tmp_path):
    path = convert(make_checkpoint(name, tmp_path / name), tmp_path / "model.gguf", "f16")
    _compare(path, 0.15)


def test_recommendation(tinylm_f32):
    source = GGUFSource(tinylm_f32)
    everything = recommend(source, 1 << 40, n_ctx=512)
    assert everything.best is not None and everything.best.name == "BF16" and everything.above is None
    needs = [choice.need.total for choice in everything.choices]
    assert needs == sorted(needs, reverse=True)
    middle = everything.choices[3].need.total
    some = recommend(source, middle, n_ctx=512)
    assert some.best == everything.choices[3]
    assert some.above is not None and some.above.name == everything.choices[2].name
    assert some.below is not None and some.below.name == everything.choices[4].name
    assert recommend(source, 1000, n_ctx=512).best is None


def test_bad_requests(tinylm_f32):
    source = GGUFSource(tinylm_f32)
    for options, problem in (({"kv": "q9"}, "q9"), ({"n_ctx": 0}, "context of 0"), ({"n_ctx": 1 << 40}, "context of")):
        with pytest.raises(QuantkitError, match=problem):
            memory_needed(source.metadata, source.tensors, **options)
