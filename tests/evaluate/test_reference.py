"""The forward pass against llama.cpp itself, and the perplexity that llama-perplexity reports."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, requires_reference, requires_shared
from make_checkpoints import make_checkpoint
from record_logits import tokens
from support.conversion import convert
from support.families import EVALUATED, LLAMA_CPP_DIFFERS
from support.tiny import FAMILIES, N_VOCAB, relative_error, tiny_metadata, tiny_weights, write_gguf

from quantkit.architectures.feed_forward import Activation, Experts
from quantkit.architectures.mixers import Attention, LatentAttention
from quantkit.blocks.types import GGMLType
from quantkit.evaluate import layers
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource

YARN = {
    "rope__scaling__type": (ValueType.STRING, "yarn"),
    "rope__scaling__factor": (ValueType.FLOAT32, 4.0),
    "rope__scaling__original_context_length": (ValueType.UINT32, 64),
}
LINEAR = {"rope__scaling__type": (ValueType.STRING, "linear"), "rope__scaling__factor": (ValueType.FLOAT32, 2.0)}


def reference_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """llama.cpp's logits at every position of tokens [n_ctx], its attention in float32."""
    import llama_cpp as lib

    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = -(-len(tokens) // 256) * 256
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens.tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    assert lib.llama_decode(context, batch) == 0
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(pointer, (len(tokens), n_vocab)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return logits


@requires_reference
@pytest.mark.parametrize(
    ("kind", "extra", "options"),
    [
        (GGMLType.F16, {}, {}),
        (GGMLType.F32, {}, {"tied": True, "biases": True}),
        (GGMLType.F32, {}, {"factors": True}),
        (GGMLType.F32, LINEAR, {}),
        (GGMLType.F32, YARN, {}),
        (GGMLType.F32, {**YARN, "rope__scaling__yarn_log_multiplier": (ValueType.FLOAT32, 0.5)}, {}),
        (GGMLType.F32, {**YARN, "rope__scaling__attn_factor": (ValueType.FLOAT32, 0.8)}, {}),
    ],
)
def test_logits_equal_llama_cpps(tmp_path, kind, extra, options):
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(**extra), tiny_weights(4, **options), kind)
    ids = np.random.default_rng(5).integers(0, N_VOCAB, 200).astype(np.int32)
    ours = Transformer(GGUFSource(path), Compute(threads=2)).logits(ids[None])[0]
    # llama.cpp rounds the activations that it multiplies with F16 weights to F16; with F32 weights it does not.
    assert relative_error(ours, reference_logits(path, ids)) < (2e-3 if kind == GGMLType.F16 else 2e-5)


def bound(model: Transformer, kind: GGMLType) -> float:
    """What llama.cpp may differ by from the exact result.

    It rounds what it multiplies with F16 weights to F16, where a rounding may choose another expert. With F32 weights
    only its GELU is not exact: a table in F16.
    """
    blocks = [layer.feed_forward for layer in model.spec.layers]
    if kind is GGMLType.F16:
        return 5e-3 if any(isinstance(block, Experts) for block in blocks) else 2e-3
    return 1e-3 if any(block is not None and block.activation is Activation.GELU for block in blocks) else 2e-5


@requires_reference
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_logits_equal_llama_cpps(tmp_path, name, kind):
    """300 tokens: more than the windows (32), and than the contexts that rotary scaling starts from (64, 256)."""
    family = FAMILIES[name]
    path = write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(6), kind)
    ids = np.random.default_rng(7).integers(0, N_VOCAB, 300).astype(np.int32)
    model = Transformer(GGUFSource(path), Compute(threads=2))
    error = relative_error(model.logits(ids[None])[0], reference_logits(path, ids))
    assert error < bound(model, kind)


@requires_reference
@pytest.mark.parametrize(("name", "n_layer"), [("gemma2", 46), ("gemma3", 62)])
def test_the_models_that_are_told_by_their_layers(tmp_path, name, n_layer):
    """The largest of a family scales scores by another size than its heads'; there is no key for it."""
    family = replace(FAMILIES[name], n_layer=n_layer)
    path = write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(8))
    ids = np.random.default_rng(9).integers(0, N_VOCAB, 40).astype(np.int32)
    assert relative_error(Transformer(GGUFSource(path)).logits(ids[None])[0], reference_logits(path, ids)) < 2e-3


@requires_reference
@pytest.mark.parametrize("name", ["phi3-long", "llama-long", "olmo3", "gemma3"])
def test_short_texts_equal_llama_cpps(tmp_path, name):
    """Within the original context: LongRoPE's other frequency factors."""
    family = FAMILIES[name]
    path = write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(8))
    ids = np.random.default_rng(9).integers(0, N_VOCAB, 40).astype(np.int32)
    assert relative_error(Transformer(GGUFSource(path)).logits(ids[None])[0], reference_logits(path, ids)) < 1e-3


@requires_reference
@pytest.mark.parametrize("outtype", ["f32", "f16"])
@pytest.mark.parametrize("name", [name for name in EVALUATED if name not in LLAMA_CPP_DIFFERS])
def test_converted_checkpoints_give_llama_cpps_logits(tmp_path, name, outtype):
    """The tiny checkpoints that transformers' logits are recorded for, converted, in llama.cpp."""
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", outtype)
    ids = tokens(128 if name == "tiny-gpt2" else 200).astype(np.int32)
    model = Transformer(GGUFSource(path), Compute(threads=2))
    ours, theirs = model.logits(ids[None])[0], reference_logits(path, ids)
    if outtype == "f16" and forgets_nothing_of_a_choice(model):
        error = float(np.median([relative_error(*rows) for rows in zip(ours, theirs, strict=True)]))
    else:
        error = relative_error(ours, theirs)
    assert error < bound(model, GGMLType.parse(outtype))


@requires_reference
@pytest.mark.parametrize("name", ["tiny-gemma3n", "tiny-gemma3n-deep"])
def test_gemma3n_differs_by_a_deviation_alone(tmp_path, monkeypatch, name):
    """transformers divides by how many numbers there are, llama.cpp by one less."""
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f32")
    ids = tokens(200).astype(np.int32)
    monkeypatch.setattr(layers, "_deviation", partial(np.std, ddof=1))
    error = relative_error(Transformer(GGUFSource(path)).logits(ids[None])[0], reference_logits(path, ids))
    assert error < 1e-3


def forgets_nothing_of_a_choice(model: Transformer) -> bool:
    """Whether a rounding that chooses another expert for one token goes on in the states of all after it."""
    attention = (Attention, LatentAttention)
    return any(isinstance(layer.feed_forward, Experts) for layer in model.spec.layers) and any(
        not isinstance(mixer, attention) for layer in model.spec.layers for mixer in layer.mixers
    )


@requires_shared
def test_perplexity_of_the_development_checkpoint(docs_llama):
    """llama-perplexity's own numbers for its F16 conversion; the checkpoint's BF16 weights are exact in float32."""
    text = (SHARED / "data" / "docs-test.txt").read_text(encoding="utf-8")
    result = perplexity(CheckpointSource(docs_llama), text)
    assert result.n_chunks == 424
    assert result.running[79] == pytest.approx(6.1494, rel=1e-3)
    assert result.ppl.value == pytest.approx(8.3333, rel=1e-3)
    assert result.ppl.stderr == pytest.approx(0.0677, rel=1e-2)
