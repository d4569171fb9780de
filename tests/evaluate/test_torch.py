"""The torch backend against numpy's float32, and what bfloat16 costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_torch
from make_checkpoints import make_checkpoint
from support.families import ENCODERS, EVALUATED, OTHER_MIXERS
from support.tiny import FAMILIES, N_VOCAB, relative_error, tiny_metadata, tiny_weights, write_gguf
from support.variants import NORM, VARIANTS, variant

from quantkit.architectures.feed_forward import Experts
from quantkit.architectures.mixers import Attention
from quantkit.architectures.products import Linear
from quantkit.blocks import decode
from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.divergence import divergence, divergences
from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.inputs import Balance
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource, open_model

pytest.importorskip("torch", reason="needs torch")

pytestmark = requires_torch

TORCH = Compute(backend="torch", threads=2)


@pytest.fixture(scope="module")
def tinylm():
    return open_model(TINYLM)


@pytest.fixture(scope="module")
def text():
    return (ROOT / "fixtures" / "tinylm-test.txt").read_text(encoding="utf-8")


def some_tokens(n_seq: int, n_ctx: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, N_VOCAB, (n_seq, n_ctx)).astype(np.int32)


def assert_same_logits(ours, numpys, tokens):
    expected = numpys.logits(tokens, 5, 33)
    np.testing.assert_allclose(ours.logits(tokens, 5, 33), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    expected = numpys.log_likelihoods(tokens, 20)
    np.testing.assert_allclose(ours.log_likelihoods(tokens, 20), expected, rtol=1e-5, atol=1e-5)


def test_float32_equals_numpy_and_bfloat16_nearly(tinylm, text):
    cut = Chunking(n_ctx=256, chunks=8)
    judge = perplexity(tinylm, text, chunking=cut, compute=Compute(threads=2))
    single = perplexity(tinylm, text, chunking=cut, compute=Compute(threads=2, backend="torch"))
    half = perplexity(
        tinylm,
        text,
        chunking=dataclasses.replace(cut, batch=3),
        compute=Compute(threads=2, backend="torch", precision="bf16"),
    )
    assert single.chunk_nll == pytest.approx(judge.chunk_nll, rel=1e-5)
    assert half.ppl.value == pytest.approx(judge.ppl.value, rel=2e-3)
    assert half.ppl.value != pytest.approx(judge.ppl.value, rel=1e-7)
    assert (single.backend, single.precision) == ("torch cpu", "f32")
    assert (half.backend, half.precision) == ("torch cpu", "bf16")


def test_divergence_equals_numpys(tmp_path):
    weights = tiny_weights()
    base = GGUFSource(write_gguf(tmp_path / "base.gguf", tiny_metadata(), weights))
    coarse = GGUFSource(write_gguf(tmp_path / "coarse.gguf", tiny_metadata(), weights, GGMLType.Q8_0))
    tokens = some_tokens(1, 400)[0]
    cut = Chunking(n_ctx=64)
    judge = divergence(coarse, base, tokens, chunking=cut, compute=Compute(threads=2))
    other = divergence(coarse, base, tokens, chunking=cut, compute=TORCH)
    assert other.backend == "torch cpu"
    assert other.kld.value == pytest.approx(judge.kld.value, rel=1e-3)
    assert other.same_top == judge.same_top
    mixed = divergence(load(coarse, TORCH), load(base), tokens, chunking=cut)
    assert mixed.kld.value == pytest.approx(judge.kld.value, rel=1e-3)
    both = divergences([coarse, base], base, tokens, chunking=cut, compute=TORCH)
    assert [one.kld.value for one in both] == pytest.approx([other.kld.value, 0.0], abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "tiny-gemma3n-deep", "tiny-rwkv7", "tiny-qwen3-next"])
def test_devices_share_the_layers(tmp_path, name):
    """As several GPUs do: here all are the processor."""
    if name == "llama":
        source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    else:
        source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    model = load(source, TORCH)
    n_layer, tokens = len(model.spec.layers), some_tokens(5, 40)
    whole, sums = model.logits(tokens), model.input_sums(full=False)
    model.pass_through(tokens)
    once, model.observer = sums.take(), None
    model._weights.devices *= 2
    assert [model._weights.place(index) for index in range(n_layer)] == [model._device] * n_layer
    np.testing.assert_allclose(model.logits(tokens), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    model.observer = sums.observe
    model.pass_through(tokens)
    for key, (total, n_rows) in sums.take().items():
        assert n_rows == once[key].n_rows
        np.testing.assert_allclose(total, once[key].total, rtol=1e-4)


def test_mean_divergences_equal_numpys(tmp_path):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    numpys, ours = Transformer(source), load(source, TORCH)
    base = numpys.hidden(some_tokens(3, 40), 0, 40)
    random = np.random.default_rng(4)
    near = base + 0.05 * random.standard_normal(base.shape, np.float32)
    info = source.tensors[numpys.spec.output.weight]
    output = random.standard_normal((info.n_rows, info.n_per_row), np.float32)
    others = [(near, None), (base, output), (base, None)]
    expected, found = numpys.mean_divergences(base, others), ours.mean_divergences(base, others)
    assert 0 < expected[0] < expected[1]
    # Logits are float32: what is nearly nothing is what their last bits say.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected[2] < 1e-7


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_layers_that_come_and_go_as_packed_weights(tmp_path, kind):
    """As on a GPU without room for the model."""
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(), kind))
    model = load(source, TORCH, keep=False)
    model._weights.packs = True
    tokens = some_tokens(2, 33)
    for _ in range(2):
        assert_same_logits(model, Transformer(source), tokens)
    layers = {name.split(".")[1] for name in model._weights.tensors if name.startswith("blk.")}
    assert len(layers) == 1
    kept = load(source, TORCH)
    np.testing.assert_array_equal(kept.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"biases": True}, {"factors": True}], ids=["plain", "tied", "biases", "factors"]
)
def test_llamas(tmp_path, options):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(1, **options)))
    assert_same_logits(load(source, TORCH), Transformer(source, Compute(threads=2)), some_tokens(3, 40))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_else_a_description_holds(tmp_path, monkeypatch, name):
    from quantkit.evaluate import model

    source, plain, spec = variant(tmp_path / "m.gguf", name)
    tokens = some_tokens(2, 40)
    monkeypatch.setattr(model, "forward_spec", lambda *_: plain)
    unchanged = Transformer(source, Compute(threads=2)).logits(tokens)
    monkeypatch.setattr(model, "forward_spec", lambda *_: spec)
    numpys = Transformer(source, Compute(threads=2))
    assert np.abs(numpys.logits(tokens) - unchanged).max() > 1e-2
    assert_same_logits(load(source, TORCH), numpys, tokens)


def test_a_description_that_grows_is_refused_by_name():
    from quantkit.evaluate.torch_layers import unknown_parts

    @dataclasses.dataclass(frozen=True)
    class Clip:
        limit: float
        shift: float = 0.0

    assert list(unknown_parts((Linear("a", "b"), NORM))) == []
    assert list(unknown_parts((NORM, (Clip(2.0),)))) == ["Clip.limit = 2.0"]


def test_what_torch_does_not_know(tmp_path, monkeypatch):
    from quantkit.evaluate import torch_layers

    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    for kind, message in ((Attention, "layers of Attention"), (Linear, "Linear.weight = 'blk.0.attn_output.weight'")):
        with monkeypatch.context() as patch:
            patch.delitem(torch_layers._KNOWN, kind)
            with pytest.raises(QuantkitError, match=f"does not know {message}: use the default backend"):
                load(source, TORCH)


# How far logarithms of probabilities are from numpy's. What delta nets keep is divided by its size head by head, which
# makes much of the last bits: on the tiny Qwen3-Next numpy's are 1.6e-5 from those in float64, and torch's as much.
FAR = dict.fromkeys(["tiny-qwen3-next", "tiny-qwen35", "tiny-qwen35-moe"], 4e-5)


@pytest.mark.parametrize("name", [*OTHER_MIXERS, *(name for name in ENCODERS if name in EVALUATED)])
def test_families_that_are_more_than_plain_attention(tmp_path, name):
    """Results, and all that an observer is told, are numpy's, whether layers are kept or come and go."""
    source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    numpys, ours, far = Transformer(source, Compute(threads=2)), load(source, TORCH), FAR.get(name, 1e-5)
    # Two chunks of a recurrence, the last of them short.
    tokens = np.random.default_rng(4).integers(5, 250, (3, 90)).astype(np.int32)
    if numpys.spec.causal:
        expected = numpys.log_likelihoods(tokens, 20)
        np.testing.assert_allclose(ours.log_likelihoods(tokens, 20), expected, rtol=far, atol=far)
    else:
        with pytest.raises(QuantkitError, match="an encoder"):
            ours.log_likelihoods(tokens, 20)
    expected = numpys.hidden(tokens, 30, 60)
    np.testing.assert_allclose(ours.hidden(tokens, 30, 60), expected, rtol=far, atol=far * np.abs(expected).max())
    half = load(source, dataclasses.replace(TORCH, precision="bf16"))
    # A bfloat16 has 8 bits, and where two experts are nearly as good it decides between them.
    experts = any(isinstance(layer.feed_forward, Experts) for layer in ours.spec.layers)
    assert relative_error(half.hidden(tokens, 30, 60), expected) < (0.5 if experts else 0.05)
    passing = load(source, TORCH, keep=False)
    passing._weights.packs = True
    found = []
    for model in (numpys, ours, passing):
        sums = model.input_sums(full=True, balance=Balance(tokens.shape[1]))
        x = model.embedded(tokens)
        assert x.shape == (*tokens.shape, model.spec.width)
        for index in range(len(model.spec.layers)):
            model.layer_pass(index, tokens.shape[1])(x)
            sums.settle()
        model.observer = None
        found.append((model.normed(x), sums.take()))
    (_, expected_sums), (kept_hidden, kept_sums), (hidden, passing_sums) = found
    np.testing.assert_array_equal(hidden, kept_hidden)
    assert kept_sums.keys() == expected_sums.keys() == passing_sums.keys()
    for key, (total, n_rows) in expected_sums.items():
        assert kept_sums[key].n_rows == passing_sums[key].n_rows == n_rows
        np.testing.assert_array_equal(passing_sums[key].total, kept_sums[key].total)
        np.testing.assert_allclose(kept_sums[key].total, total, rtol=1e-4, atol=far * np.abs(total).max())
    kept = passing._weights.tensors.keys() & ours.spec.matrices
    blocks = {name.removeprefix("enc.").split(".")[1] for name in kept if "blk." in name}
    assert len(blocks) == 1
    # Other values for a layer's matrices: all of these are used, as in numpy's pass.
    last = {tensor for group in numpys.spec.layers[-1].inputs for tensor in group}
    others = {each: 0.7 * decode(source.read(each), source.tensors[each].type) for each in last}
    found = []
    for model in (numpys, ours):
        with model.replaced(others):
            x = model.embedded(tokens)
            for index in range(len(model.spec.layers)):
                model.layer_pass(index, tokens.shape[1])(x)
            found.append(model.normed(x))
    np.testing.assert_allclose(found[1], found[0], rtol=far, atol=far * np.abs(found[0]).max())
    assert relative_error(found[0], hidden) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3", "gptneox"])
def test_importance_matrices_equal_numpys(tmp_path, family):
    metadata, weights = tiny_metadata(), tiny_weights(5)
    if family != "llama":
        metadata, weights = FAMILIES[family].metadata(), FAMILIES[family].weights(5)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", metadata, weights))
    tokens = some_tokens(1, 200)[0]
    judge = importance_matrix(source, tokens, chunking=Chunking(n_ctx=64), process_output=True)
    for precision, tolerance in (("f32", 1e-4), ("bf16", 0.05)):
        other = importance_matrix(
            source,
            tokens,
            chunking=Chunking(n_ctx=64),
            compute=Compute(backend="torch", precision=precision),
            process_output=True,
        )
        assert list(other.entries) == list(judge.entries)
        for name, entry in judge.entries.items():
            if precision == "f32":
                assert other.entries[name].counts.tolist() == entry.counts.tolist()
                np.testing.assert_allclose(other.entries[name].sums, entry.sums, rtol=tolerance)
            elif family != "mixtral":  # where rounding chooses other experts
                np.testing.assert_allclose(other.entries[name].sums.sum(), entry.sums.sum(), rtol=tolerance)


def test_nan_names_the_first_layer_that_made_it(tmp_path):
    weights = tiny_weights()
    weights["blk.1.ffn_down.weight"][5, 7] = np.nan
    model = load(GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), weights)), TORCH)
    for call in (model.logits, model.log_likelihoods):
        with pytest.raises(QuantkitError, match=r"blk\.1\b.*NaN"):
            call(some_tokens(2, 20))


def test_bad_input(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights())
    source = GGUFSource(path)
    for arguments, message in [
        ({"backend": "torch", "device": "tpu"}, "no device 'tpu'"),
        ({"backend": "torch", "precision": "f16"}, "no precision 'f16'"),
        ({"backend": "torch", "device": "cuda:0,cpu"}, "only GPUs compute together"),
        ({"backend": "torch", "device": "cuda:0,"}, "no device ''"),
        ({"backend": "jax"}, "no backend 'jax'"),
        ({"device": "cuda"}, "use torch"),
        ({"threads": 0}, "0 threads"),
        ({"memory": -1}, "-1 bytes"),
    ]:
        with pytest.raises(QuantkitError, match=message):
            Compute(**arguments)
    with pytest.raises(QuantkitError, match="token 258"):
        load(source, TORCH).logits(np.array([[1, 258]], np.int32))
    heads = tiny_metadata(attention__head_count=(ValueType.UINT32, 5))
    with pytest.raises(QuantkitError, match="5 heads for 2 of keys and values"):
        load(GGUFSource(write_gguf(tmp_path / "heads.gguf", heads, tiny_weights())), TORCH)


def test_a_device_that_is_not_there():
    import torch

    if not torch.backends.mps.is_available():
        with pytest.raises(QuantkitError, match="no mps device"):
            load(TINYLM, Compute(backend="torch", device="mps"))


def test_the_command_line_says_what_computed():
    words = (
        "perplexity fixtures/tinylm -f fixtures/tinylm-test.txt -c 64 --chunks 2 -t 1 --backend torch -q --precision"
    )
    for precision, said in (("f32", "(torch cpu, f32, "), ("bf16", "(torch cpu, bf16, ")):
        command = [sys.executable, "-c", "from quantkit.cli.main import main; main()", *words.split(), precision]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, said in done.stdout) == (0, True), done.stderr
