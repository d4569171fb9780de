"""Generated text: the key-value cache against whole passes, greedy text against llama.cpp, drawing, chat templates."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference
from make_checkpoints import make_checkpoint
from record_logits import tokens
from support.families import OTHER_MIXERS
from support.tiny import N_VOCAB, tiny_metadata, tiny_weights, write_gguf
from support.variants import VARIANTS, variant
from test_reference import reference_logits

from quantkit.errors import QuantkitError
from quantkit.evaluate import model as module
from quantkit.evaluate import transformer
from quantkit.evaluate.generate import continuations, generate, pick
from quantkit.evaluate.kv_cache import KVCache
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource, open_model
from quantkit.vocabulary import Vocabulary, chat
from quantkit.wording import printable


@pytest.mark.parametrize("name", [*VARIANTS, None])
def test_what_is_read_in_pieces_is_read_as_a_whole(tmp_path, monkeypatch, name):
    source, plain, spec = variant(tmp_path / "m.gguf", name or "window")
    monkeypatch.setattr(module, "forward_spec", lambda *_: spec if name else plain)
    monkeypatch.setattr(transformer, "ROWS", 16)
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, 40).astype(np.int32)
    expected = Transformer(source, Compute(threads=2)).logits(tokens[None])[0]
    model = Transformer(source, Compute(threads=2))
    cache = KVCache(model.spec, 40)
    cuts = [0, 23, 24, 25, 31, 40]
    for start, stop in itertools.pairwise(cuts):
        logits = model.next_logits([(tokens[start:stop].tolist(), cache)])[0]
        np.testing.assert_allclose(logits, expected[stop - 1], rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(QuantkitError, match="more than 40 tokens"):
        model.next_logits([([1], cache)])
    assert cache.tokens == tokens.tolist()


@pytest.mark.parametrize("name", [*VARIANTS, None])
def test_sequences_continue_together_as_each_alone(tmp_path, monkeypatch, name):
    source, plain, spec = variant(tmp_path / "m.gguf", name or "window")
    monkeypatch.setattr(module, "forward_spec", lambda *_: spec if name else plain)
    monkeypatch.setattr(transformer, "ROWS", 16)
    model = Transformer(source, Compute(threads=2))
    tokens = np.random.default_rng(4).integers(0, N_VOCAB, (3, 40)).astype(np.int32)
    expected = model.logits(tokens)
    caches = [KVCache(model.spec, 40) for _ in tokens]
    # Lengths that fill a batch of rows exactly, span several, and stand at different positions afterwards.
    for stops in ([11, 5, 40], [12, 6, 40], [13, 22, 40], [40, 40, 40]):
        going = [i for i, stop in enumerate(stops) if len(caches[i].tokens) < stop]
        logits = model.next_logits([(tokens[i, len(caches[i].tokens) : stops[i]].tolist(), caches[i]) for i in going])
        for i, row in zip(going, logits, strict=True):
            np.testing.assert_allclose(row, expected[i, stops[i] - 1], rtol=1e-4, atol=1e-5 * np.abs(expected[i]).max())
            assert caches[i].tokens == tokens[i, : stops[i]].tolist()


def test_prompts_are_continued_together_as_each_alone():
    model = Transformer(open_model(TINYLM), Compute(threads=2))
    prompts = ["The function returns", "import os\n\ndef ", "Lists", "The function returns"]
    together = continuations(model, prompts, n_tokens=20)
    alone = [generate(model, prompt, n_tokens=20) for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [(each.text, each.ended, each.n_prompt) for each in together] == [
        (each.text, each.ended, each.n_prompt) for each in alone
    ]
    assert continuations(model, []) == []
    with pytest.raises(QuantkitError, match="cannot generate 0 tokens"):
        continuations(model, prompts, n_tokens=0)


@pytest.mark.parametrize("name", OTHER_MIXERS)
def test_memories_of_other_mixers(tmp_path, monkeypatch, name):
    source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    monkeypatch.setattr(transformer, "ROWS", 16)
    ids = tokens(80).astype(np.int32).reshape(2, 40)
    model = Transformer(source, Compute(threads=2))
    expected = model.logits(ids)
    caches = [KVCache(model.spec, 40) for _ in ids]
    for stops in ([11, 23], [12, 24], [13, 26], [40, 40]):
        logits = model.next_logits(
            [
                (own[len(cache.tokens) : stop].tolist(), cache)
                for own, cache, stop in zip(ids, caches, stops, strict=True)
            ]
        )
        for row, of, stop in zip(logits, expected, stops, strict=True):
            np.testing.assert_allclose(row, of[stop - 1], rtol=1e-4, atol=1e-5 * np.abs(of).max())


@requires_reference
def test_greedy_text_is_llama_cpps(tinylm_f32):
    """Each of our 30 tokens is the likeliest by llama.cpp after the same tokens, so its greedy text is ours."""
    source = GGUFSource(tinylm_f32)
    for prompt in ("The function returns", "import os\n\ndef "):
        result = generate(source, prompt, n_tokens=30, compute=Compute(threads=2))
        assert len(result.tokens) == 30
        ids = Vocabulary.from_metadata(source.metadata).encode(prompt).tolist()
        assert result.n_prompt == len(ids)
        logits = reference_logits(tinylm_f32, np.array([*ids, *result.tokens], np.int32))
        assert logits[len(ids) - 1 : -1].argmax(1).tolist() == result.tokens


def test_drawing():
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3])).astype(np.float32) + 3
    assert pick(logits, 0.0, 0.1, np.random.default_rng(0)) == 1

    def shares(temperature, top_p):
        generator = np.random.default_rng(1)
        drawn = [pick(logits, temperature, top_p, generator) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, 1.0), [0.05, 0.5, 0.15, 0.3], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.7), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.4), [0, 1, 0, 0])
    squared = np.array([0.0025, 0.25, 0.0225, 0.09])
    np.testing.assert_allclose(shares(0.5, 1.0), squared / squared.sum(), atol=0.03)


def test_the_same_seed_draws_the_same_text():
    source = open_model(TINYLM)
    texts = [generate(source, "The", n_tokens=12, temperature=0.8, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_ending_token_ends_the_text(tmp_path):
    weights = tiny_weights()
    weights["output.weight"][:] = 0
    weights["output_norm.weight"][:] = 1
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), weights)
    assert generate(path, "abc", n_tokens=5).tokens == [0] * 5
    metadata = tiny_metadata()
    metadata.set("tokenizer.ggml.eos_token_id", ValueType.UINT32, 0)
    result = generate(write_gguf(path, metadata, weights), "abc", n_tokens=5)
    assert (result.tokens, result.text, result.ended) == ([], "", True)


def with_template(template: str):
    metadata = tiny_metadata()
    metadata.set(chat.KEY, ValueType.STRING, template)
    return metadata


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>!"}]


def test_chat_templates():
    assert chat.render(open_model(TINYLM).metadata, CONVERSATION) == "system: Be brief.\nuser: Hi <b>!\nassistant:"
    chatml = (
        "{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "<|im_start|>{{ m['role'] + '\\n' + m['content'] | tojson }}<|im_end|>\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
    )
    expected = '<|im_start|>user\n"Hi <b>!"<|im_end|>\n<|im_start|>assistant\n'
    assert chat.render(with_template(chatml), CONVERSATION) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only two turns') }}", "refuses: only two turns"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10000000000 }}", "too much memory"),
        ("{{ 'xy' * 3000000 }}", "more than 4194304 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long|more than 1 s"),
        (" " * 2000000, "2000000 characters"),
    ],
)
def test_templates_of_strangers(monkeypatch, template, message):
    monkeypatch.setattr(chat, "_SECONDS", 1)
    with pytest.raises(QuantkitError, match=message):
        chat.render(with_template(template), CONVERSATION)


def test_bad_input(tmp_path):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    for arguments, message in [
        ({"n_tokens": 0}, "0 tokens"),
        ({"temperature": -1}, "temperature of -1"),
        ({"temperature": float("nan")}, "temperature of nan"),
        ({"top_p": 0}, "top-p of 0"),
        ({"chat": True}, "no chat template"),
        ({"system": "x"}, "needs the chat template"),
        ({"n_tokens": 1 << 40}, "GB, more than there is"),
    ]:
        with pytest.raises(QuantkitError, match=message):
            generate(source, "x", **arguments)
    weights = tiny_weights()
    weights["blk.1.ffn_down.weight"][5, 7] = np.nan
    source = GGUFSource(write_gguf(tmp_path / "nan.gguf", tiny_metadata(), weights))
    with pytest.raises(QuantkitError, match=r"blk\.1\b.*NaN"):
        generate(source, "x", n_tokens=3)


def test_the_command_line():
    words = f"generate {TINYLM} -n 6 -t 1 --chat -p".split()
    command = [sys.executable, "-c", "from quantkit.cli.main import main; main()", *words, "What is a list?"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = generate(TINYLM, "What is a list?", n_tokens=6, chat=True, compute=Compute(threads=1))
    shown = json.loads(done.stdout)["results"][0]
    assert (shown["output"], shown["tokens"]) == (expected.text, expected.tokens)
    done = subprocess.run([*command, "--model2", str(TINYLM)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("The outputs are the same.")


@pytest.mark.parametrize(("pre", "cleans"), [("qwen2", False), ("llama-bpe", True)])
def test_streamed_pieces_are_the_text(tmp_path, monkeypatch, pre, cleans):
    """Whatever the tokens, and where a vocabulary drops spaces before punctuation: nothing that was shown changes."""
    metadata = tiny_metadata()
    metadata.set("tokenizer.ggml.pre", ValueType.STRING, pre)
    model = write_gguf(tmp_path / "m.gguf", metadata, tiny_weights())
    script = list("a . b 's é模型 ' 're, ok ! 😀".encode())
    monkeypatch.setattr("quantkit.evaluate.generate.pick", lambda *_: script.pop(0))
    pieces: list[str] = []
    result = generate(model, "x", n_tokens=len(script), stream=pieces.append)
    assert "".join(pieces) == result.text and len(pieces) > 10
    assert "é模型" in result.text and result.text.endswith("😀") and "\ufffd" not in "".join(pieces)
    assert ("a." in result.text) == cleans


def test_streaming_prints_the_text(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights())
    command = [sys.executable, "-m", "quantkit", "generate", model, "-p", "abc", "-n", "12"]
    shown = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert shown == printable(data["results"][0]["output"]) + "\n"
