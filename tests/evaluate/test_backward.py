"""Gradients: numpy's against torch's automatic ones, and against differences of log-likelihoods."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires_torch
from make_checkpoints import make_checkpoint
from support.families import OTHER_MIXERS
from support.tiny import FAMILIES, N_VOCAB, tiny_metadata, tiny_weights, write_gguf
from support.variants import VARIANTS, variant

from quantkit.errors import QuantkitError
from quantkit.evaluate import model as models
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource

DENSE = [name for name, family in FAMILIES.items() if not family.n_expert]


def some_tokens(n_seq: int = 3, n_ctx: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(0, N_VOCAB, (n_seq, n_ctx)).astype(np.int32)


def places_of(model, tokens):
    """Where tokens are drawn that no rounding makes others of: in the middle of their share."""
    logits = model.logits(tokens).astype(np.float64)
    shares = np.exp(logits - logits.max(2, keepdims=True))
    reached = np.cumsum(shares / shares.sum(2, keepdims=True), 2)
    drawn = (reached <= np.random.default_rng(5).random((*tokens.shape, 1))).sum(2, keepdims=True)
    before = np.where(drawn > 0, np.take_along_axis(reached, np.maximum(drawn - 1, 0), 2), 0)
    return drawn[..., 0], ((before + np.take_along_axis(reached, drawn, 2)) / 2)[..., 0]


def all_gradients(model, tokens, places):
    """Gradients by each layer's input, from the last to the first, and the sums of those by products' outputs."""
    n_ctx = tokens.shape[1]
    read = [model.embedded(tokens)]
    for index in range(len(model.spec.layers)):
        after = read[-1].copy()
        model.layer_pass(index, n_ctx)(after)
        read.append(after)
    gradients = model.last_gradients(read[-1], places)
    found, sums = [gradients.copy()], model.input_sums(full=True)
    for index in reversed(range(len(model.spec.layers))):
        model.gradient_pass(index, n_ctx)(read[index], gradients)
        sums.settle()
        found.append(gradients.copy())
    model.observer = None
    return found, sums.take()


def assert_same_gradients(source):
    tokens = some_tokens()
    numpys = Transformer(source, Compute(threads=2))
    _, places = places_of(numpys, tokens)
    ours, our_sums = all_gradients(numpys, tokens, places)
    theirs, their_sums = all_gradients(load(source, Compute(backend="torch", threads=2)), tokens, places)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * np.abs(other).max())
    assert our_sums.keys() == their_sums.keys()
    for key, (total, n_rows) in our_sums.items():
        expected = their_sums[key].total
        assert n_rows == their_sums[key].n_rows == tokens.size
        np.testing.assert_allclose(total, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@requires_torch
@pytest.mark.parametrize("family", DENSE)
def test_families(tmp_path, family):
    of = FAMILIES[family]
    assert_same_gradients(GGUFSource(write_gguf(tmp_path / "tiny.gguf", of.metadata(), of.weights(1))))


@requires_torch
@pytest.mark.parametrize("name", [name for name in VARIANTS if "experts" not in name])
def test_what_else_a_description_holds(tmp_path, monkeypatch, name):
    source, _, spec = variant(tmp_path / "m.gguf", name)
    monkeypatch.setattr(models, "forward_spec", lambda *_: spec)
    assert_same_gradients(source)


def test_gradients_are_the_slopes_of_log_likelihoods(tmp_path):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(1)))
    numpys, tokens = Transformer(source, Compute(threads=2)), some_tokens(1, 20)
    n_layer = len(numpys.spec.layers)
    last = numpys.embedded(tokens)
    for index in range(n_layer):
        numpys.layer_pass(index, 20)(last)
    drawn, places = places_of(numpys, tokens)

    def likelihood(x):
        scores = numpys.normed(x)[0].astype(np.float64) @ numpys._output(0, N_VOCAB).matrix.T.astype(np.float64)
        most = scores.max(1)
        total = most + np.log(np.exp(scores - most[:, None]).sum(1))
        return float((scores[np.arange(20), drawn[0]] - total).sum())

    gradients = numpys.last_gradients(last, places)
    direction = np.random.default_rng(6).standard_normal(last.shape).astype(np.float32)
    slope = (likelihood(last + 1e-2 * direction) - likelihood(last - 1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(float((gradients * direction).sum()), rel=2e-3)


@requires_torch
@pytest.mark.parametrize("name", OTHER_MIXERS)
def test_gradients_through_other_mixers_are_slopes(tmp_path, monkeypatch, name):
    """Of what each layer makes, in a random direction, in float64: steps must be small where much is bent."""
    import torch

    source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    model = load(source, Compute(backend="torch", threads=2))
    tokens, step = some_tokens(2, 70) % 250, 1e-6
    x = torch.from_numpy(model.embedded(tokens)).double()
    weights = model._weights.tensors
    weights.update({tensor: values.double() for tensor, values in weights.items()})
    model._weights.dtype = model._parts.dtype = torch.float64
    monkeypatch.setattr(model._parts, "_through_numpy", False)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    random = torch.Generator().manual_seed(6)
    for layer in model._layers:
        of, direction = (torch.randn(x.shape, generator=random, dtype=torch.float64) for _ in range(2))
        read = x.clone().requires_grad_(True)
        layer.run(read, slice(0, 70)).backward(of)
        with torch.no_grad():
            ahead, back = (layer.run(x + sign * step * direction, slice(0, 70)) for sign in (1, -1))
            slope = float(((ahead - back) * of).sum()) / (2 * step)
            x = layer.run(x, slice(0, 70))
        assert slope == pytest.approx(float((read.grad * direction).sum()), abs=1e-6 * float(read.grad.norm()))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_kept_weights_do_not_matter(tmp_path, threads):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(1)))
    tokens = some_tokens()
    places = np.random.default_rng(5).random(tokens.shape)
    expected, expected_sums = all_gradients(Transformer(source, Compute(threads=2), keep=True), tokens, places)
    found, sums = all_gradients(Transformer(source, Compute(threads=threads), keep=False), tokens, places)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for key, entry in sums.items():
        np.testing.assert_array_equal(entry.total, expected_sums[key].total)


def test_a_vocabulary_in_parts(tmp_path, monkeypatch):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(1)))
    numpys, tokens = Transformer(source, Compute(threads=2)), some_tokens()
    x, (_, places) = numpys.embedded(tokens), places_of(numpys, tokens)
    expected = numpys.last_gradients(x, places)
    monkeypatch.setattr("quantkit.evaluate.transformer._DRAWN", 7)
    np.testing.assert_allclose(numpys.last_gradients(x, places), expected, rtol=1e-4, atol=1e-6)


def test_experts_are_refused(tmp_path):
    of = FAMILIES["mixtral"]
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", of.metadata(), of.weights(1)))
    numpys, tokens = Transformer(source, Compute(threads=2)), some_tokens()
    with pytest.raises(QuantkitError, match="takes no gradients through experts: use torch"):
        numpys.last_gradients(numpys.embedded(tokens), np.zeros(tokens.shape))
