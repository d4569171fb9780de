"""Second moments of what matrices are multiplied with, and the layers one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import requires_torch
from make_checkpoints import make_checkpoint
from support.tiny import BOS, FAMILIES, N_VOCAB, plain_logits, tiny_metadata, tiny_weights, write_gguf

from quantkit.evaluate.backends import load
from quantkit.evaluate.inputs import ALIKE, Balance, mirror
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.sources.source import GGUFSource

N_CTX = 64


def some_tokens(n_chunks: int) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, (n_chunks, N_CTX)).astype(np.int32)
    tokens[:, 0] = BOS
    return tokens


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_metadata(), tiny_weights(5))


def layer_by_layer(model: Model, tokens: np.ndarray, step: int) -> np.ndarray:
    x = model.embedded(tokens)
    for index in range(len(model.spec.layers)):
        advance = model.layer_pass(index, tokens.shape[1])
        for at in range(0, len(x), step):
            advance(x[at : at + step])
    return model.normed(x)


@pytest.mark.parametrize("name", ["tiny-gemma3n", "tiny-gemma4", "tiny-gemma4-moe"])
def test_what_stands_between_layers_is_all_that_they_need(tmp_path: Path, name: str) -> None:
    """Streams, embeddings for each layer, and keys that several layers use, travel with the tokens."""
    model = load(make_checkpoint(name, tmp_path), Compute(threads=2))
    tokens = (np.arange(5 * 24).reshape(5, 24) * 7 % 300).astype(np.int32)
    assert model.embedded(tokens).shape == (5, 24, model.spec.width)
    np.testing.assert_allclose(layer_by_layer(model, tokens, 2), model.hidden(tokens, 0, 24), rtol=1e-4, atol=1e-5)


BACKENDS = ["numpy", pytest.param("torch", marks=requires_torch)]


def some_lengths(name: str) -> np.ndarray | None:
    """Squared lengths of gradients by what a tensor makes of five chunks of tokens; not of all tensors."""
    rng = np.random.default_rng(len(name))
    return None if "attn_output" in name else rng.gamma(0.5, 3, 5 * N_CTX).astype(np.float32)


@pytest.mark.parametrize("weighed", ["as they are", "alike", "by gradients"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_moments_of_what_the_plain_forward_pass_multiplies(model_path: Path, backend: str, weighed: str) -> None:
    tokens = some_tokens(5)
    model = load(model_path, Compute(backend=backend))
    gradients = some_lengths if weighed == "by gradients" else None
    sums = model.input_sums(full=True, balance=None if weighed == "as they are" else Balance(N_CTX, gradients))
    hidden = layer_by_layer(model, tokens, 8)
    sums.add(("output.weight",), hidden.reshape(-1, hidden.shape[2]))
    sums.settle()
    found = sums.take()
    expected: dict[str, np.ndarray] = {}
    shared = {name: names for names, _ in found for name in names}
    for number, chunk in enumerate(tokens):
        inputs: dict[str, np.ndarray] = {}
        plain_logits(model_path, chunk, seen=inputs)
        for name, x in inputs.items():
            known = [each for each in map(some_lengths, shared[name]) if each is not None]
            if weighed == "by gradients" and known:
                weights = sum(each / each.mean(dtype=np.float64) for each in known) / len(known)
                own = weights[number * N_CTX : (number + 1) * N_CTX, None]
                x = x * np.sqrt(ALIKE + (1 - ALIKE) * own)
            elif weighed != "as they are":
                x = x / np.linalg.norm(x, axis=1, keepdims=True)
                x[0] *= np.sqrt(N_CTX / 8)
            expected[name] = expected.get(name, 0) + x.T @ x
    assert {name for names, _ in found for name in names} == expected.keys()
    for (names, expert), (total, n_rows) in found.items():
        assert (expert, n_rows) == (None, tokens.size)
        for name in names:
            np.testing.assert_allclose(total, expected[name], rtol=1e-4, atol=1e-4 * np.abs(total).max())
        np.testing.assert_array_equal(total, total.T)
    assert not sums.take()


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_tokens_count_for_the_experts_that_see_them(tmp_path: Path, backend: str) -> None:
    family = FAMILIES["mixtral"]
    model = load(write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(3)), Compute(backend=backend))
    balance, n_chunks, n_layer = Balance(N_CTX), 5, len(model.spec.layers)
    sums = model.input_sums(full=True, balance=balance)
    layer_by_layer(model, some_tokens(n_chunks), 8)
    sums.settle()
    of_experts = {key: found for key, found in sums.take().items() if key[1] is not None}
    n_rows = sum(found.n_rows for found in of_experts.values())
    assert n_rows % (n_chunks * N_CTX * n_layer) == 0
    # Rows of length 1, the first of each chunk of its own: whatever experts they went to.
    size = sum(np.trace(found.total) for found in of_experts.values())
    np.testing.assert_allclose(size, n_rows * (1 + (balance.first - 1) / N_CTX), rtol=1e-4)


def test_a_row_of_zeros_has_no_direction() -> None:
    rows = np.array([[0, 0], [3e20, 4e20], [0, -1e-30]], np.float32)
    np.testing.assert_allclose(Balance(3).balanced(("a",), rows, 1), [[0, 0], [0.6, 0.8], [0, -1]], rtol=1e-6)
    np.testing.assert_allclose(
        Balance(80).balanced(("a",), rows[1:], np.array([7, 80])), [[0.6, 0.8], [0, -(10**0.5)]], rtol=1e-6
    )


def test_gradients_that_are_all_zero_say_nothing() -> None:
    lengths = {"a": np.zeros(4, np.float32), "b": np.array([0, 1, 2, 5], np.float32)}
    balance = Balance(4, lengths.get)
    assert balance.roots(("a",)) is None
    assert balance.roots(("c",)) is None
    expected = ALIKE + (1 - ALIKE) * lengths["b"] / 2
    np.testing.assert_allclose(balance.roots(("a", "b", "c")) ** 2, expected, rtol=1e-6)
    assert expected[0] == ALIKE  # a token whose gradient vanishes counts, too


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_one_by_one_are_the_whole_pass(tmp_path: Path, name: str, backend: str) -> None:
    family = FAMILIES[name]
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(3)))
    tokens = some_tokens(5)
    model = load(source, Compute(backend=backend))
    whole = model.hidden(tokens, 0, N_CTX)
    np.testing.assert_allclose(layer_by_layer(model, tokens, 2), whole, rtol=2e-4, atol=2e-4)
    if backend == "torch":
        from quantkit.evaluate.torch_backend import TorchTransformer

        model = TorchTransformer(source, Compute(backend="torch"), keep=False)
        np.testing.assert_allclose(model.hidden(tokens, 0, N_CTX), whole, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(layer_by_layer(model, tokens, 2), whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_sums_do_not_depend_on_threads_or_on_the_batch_of_a_thread(tmp_path: Path, name: str) -> None:
    if name == "llama":
        path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(5))
    else:
        path = write_gguf(tmp_path / "m.gguf", FAMILIES[name].metadata(), FAMILIES[name].weights(3))
    tokens = some_tokens(23)
    results = []
    for n_threads in (1, 2, 5):
        model = Transformer(GGUFSource(path), Compute(threads=n_threads), keep=False)
        sums = model.input_sums(full=True, wanted=set(model.source.tensors))
        hidden = layer_by_layer(model, tokens, 16)
        sums.settle()
        results.append((hidden, sums.take()))
    (hidden, base), *others = results
    for other_hidden, other in others:
        np.testing.assert_array_equal(other_hidden, hidden)
        assert other.keys() == base.keys()
        for key, (total, n_rows) in base.items():
            assert other[key].n_rows == n_rows
            np.testing.assert_array_equal(other[key].total, total)


def test_only_what_is_wanted_is_summed(model_path: Path) -> None:
    model = Transformer(GGUFSource(model_path), Compute(threads=2))
    sums = model.input_sums(full=True, wanted={"blk.1.attn_k.weight"})
    layer_by_layer(model, some_tokens(2), 2)
    sums.settle()
    assert [names for names, _ in sums.take()] == [
        ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight")
    ]


@pytest.mark.parametrize("n", [1, 255, 256, 700])
def test_mirror(n: int) -> None:
    whole = np.random.default_rng(n).standard_normal((n, n))
    expected = np.tril(whole) + np.tril(whole, -1).T
    mirror(whole)
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [True, False])
def test_other_values_for_some_tensors(tmp_path: Path, name: str, backend: str, keep: bool) -> None:
    """A model computes with replaced tensors what a file that holds them does."""
    family = FAMILIES[name]
    weights = family.weights(3)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), weights))
    changed = dict(weights)
    rng = np.random.default_rng(4)
    spec = load(source).spec
    for each in [*spec.layers[1].inputs[0][:1], *spec.layers[1].inputs[-1], spec.output.weight]:
        changed[each] = (changed[each] * (1 + 0.3 * rng.standard_normal(changed[each].shape))).astype(np.float32)
    other = GGUFSource(write_gguf(tmp_path / "o.gguf", family.metadata(), changed))
    tokens = some_tokens(2)
    expected = load(other).logits(tokens)
    model = load(source, Compute(backend=backend), keep)
    before = layer_by_layer(model, tokens, 2)
    replaced = {each: rows.reshape(-1, rows.shape[-1]) for each, rows in changed.items() if rows is not weights[each]}
    with model.replaced(replaced):
        opened = [model.scores(layer_by_layer(model, tokens, 2))]
    opened.append(model.scores(before))
    logits = np.empty((2, *expected.shape), np.float32)

    def keep_tiles(seq: int, rows: slice, at: int, tiles: list[np.ndarray]) -> None:
        for i, tile in enumerate(tiles):
            logits[i, seq, rows, at : at + tile.shape[1]] = tile

    model.visit_opened(opened, *tokens.shape, keep_tiles)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits[0], expected, atol=2e-4 * scale)
    np.testing.assert_allclose(logits[1], load(source).logits(tokens), atol=2e-4 * scale)
    np.testing.assert_allclose(layer_by_layer(model, tokens, 2), before, rtol=1e-5, atol=1e-5)
