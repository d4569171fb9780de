"""Vocabularies made to take endless time or memory, or to break the library that reads them."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINYLM
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_metadata

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.vocabulary import Vocabulary, pretokenizers
from quantkit.vocabulary.chat import Message, render
from quantkit.vocabulary.encoders import SentencePieceEncoder, _expand
from quantkit.vocabulary.merges import MergeTable
from quantkit.vocabulary.sentencepiece_model import read_normalizer
from quantkit.vocabulary.unicode_classes import code_points

KEY = "tokenizer.ggml."
MESSAGES: list[Message] = [{"role": "user", "content": "hi"}]


def test_tokens_that_can_be_cut_in_endless_ways() -> None:
    ids = {"a" * n: n - 1 for n in range(1, 1000)}
    with pytest.raises(QuantkitError, match="merged in more ways"):
        SentencePieceEncoder(ids, np.zeros(len(ids), np.float32))


def test_pairs_that_would_collide_do_not() -> None:
    """Under the multiplication that the table was once hashed with, all of these fell on one place."""
    n = 20_000
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    keys = [(i << 52) * inverse % 2**64 for i in range(1, 4096)]
    keys = [k for k in keys if k < 2**63 and k & 0x80000000 == 0]
    left = np.array([k >> 32 for k in keys] + list(range(n)), np.int64)
    right = np.array([k & 0xFFFFFFFF for k in keys] + [1] * n, np.int64)
    table = MergeTable(left, right, np.arange(len(left)), left)
    filled = np.flatnonzero(table._keys != -1)
    runs = np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1)
    assert max(map(len, runs)) < 200


def special_metadata(count: int) -> Metadata:
    metadata = tiny_metadata()
    tokens = metadata.strings(KEY + "tokens") + [f"<special {i}>" for i in range(count)]
    metadata.set(KEY + "tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    metadata.set(KEY + "token_type", ValueType.ARRAY, [1] * 256 + [3, 3] + [4] * count, ValueType.INT32)
    return metadata


def test_many_user_defined_tokens_are_still_found() -> None:
    text = "".join(f"<special {i}> and <special{i}" for i in range(0, 3000, 7)) + "<special 12" + "x" * 10_000
    few = Vocabulary.from_metadata(special_metadata(900)).encode(text, add_special=False)
    vocabulary = Vocabulary.from_metadata(special_metadata(3000))
    assert len(vocabulary._may_occur("no such thing here, and <none>")) == 0
    many = vocabulary.encode(text, add_special=False)
    assert len(many) < len(few)
    assert {258 + i for i in range(0, 3000, 7)} <= set(many.tolist())
    assert vocabulary.decode(many) == text


def test_superbpe_cuts_as_its_expression() -> None:
    """The expression itself takes quadratic time, so the cuts are computed."""
    expression, numbers = re.compile(r"(?=(\d{3})+(?!\d))", re.ASCII), re.compile("[0-9]+")
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choice("0123456789a \u0664") for _ in range(rng.randrange(1, 24)))
        ends = sorted({*rng.sample(range(1, len(text) + 1), rng.randrange(1, len(text) + 1)), len(text)})
        expected = pretokenizers._split(expression, text, ends)
        assert pretokenizers._split_digits(numbers, text, ends, before=True) == expected
    digits = "7" * 1_000_001
    ends = pretokenizers.splitter("superbpe").ends(digits, code_points(digits))
    assert ends[:2] == [2, 5] and len(ends) == 333_334


def test_bytes_take_memory_in_proportion() -> None:
    symbols = np.full(100_000, 5, np.int32)
    symbols[::3] = 1
    tracemalloc.start()
    result = _expand(symbols, 5, {5: [1, 2, 3]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = [t for s in symbols.tolist() for t in ([1, 2, 3] if s == 5 else [s])]
    assert result.tolist() == expected and result.dtype == np.int32
    assert peak < 100 * symbols.nbytes / 4


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 'a' * 120000000 }}", "more than|too much memory"),
        ("{% for i in range(100000) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "more than"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 2 s|too long|Overflow",
        ),
        ("{{ ''.__class__.__mro__ }}", "unsafe|SecurityError"),
        ("{{ 2 ** 99999999 }}", "Overflow|too long|Error"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    ],
)
def test_hostile_templates(template: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.vocabulary.chat._SECONDS", 2)
    metadata = tiny_metadata()
    metadata.set("tokenizer.chat_template", ValueType.STRING, "x")
    metadata["tokenizer.chat_template"].__dict__["value"] = template
    with pytest.raises(QuantkitError, match=told) as caught:
        render(metadata, MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_template_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_SECRET", "hunter2")
    metadata = tiny_metadata()
    # What CVE-2025-27516 allowed: format methods through the attr filter.
    spy = "{{ ('{0.__init__.__globals__}'|attr('format'))(raise_exception) }}{{ strftime_now('%Z') }}"
    metadata.set("tokenizer.chat_template", ValueType.STRING, spy)
    try:
        text = render(metadata, MESSAGES)
    except QuantkitError as problem:
        text = str(problem)
    assert "hunter2" not in text


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(TINYLM, directory)
        for name, change in changes.items():
            path = directory / f"{name}.json"
            data = json.loads(path.read_text(encoding="utf-8"))
            change(data)
            path.write_text(json.dumps(data), encoding="utf-8")
        return directory

    return make


def refused(directory: Path) -> str:
    with pytest.raises(QuantkitError) as caught:
        _ = CheckpointSource(directory).metadata
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config", "chat_template", [1, 2]),
        ("tokenizer_config", "chat_template", [{"name": 3, "template": 4}]),
        ("tokenizer_config", "additional_special_tokens", 7),
        ("tokenizer_config", "added_tokens_decoder", {"1": {"content": "\ud800"}}),
        ("tokenizer_config", "bos_token", ["a"]),
        ("tokenizer", "decoder", "ByteLevel"),
        ("tokenizer", "decoder", [1]),
        ("tokenizer", "added_tokens", 5),
        ("tokenizer", "added_tokens", [5]),
        ("tokenizer", "normalizer", [1]),
        ("tokenizer", "pre_tokenizer", {"type": "Sequence", "pretokenizers": 3}),
        ("tokenizer", "post_processor", 3),
        ("tokenizer", "model", []),
        ("config", "vocab_size", 16777215),
        ("config", "num_hidden_layers", 200_000),
        ("config", "head_dim", 400_000_000),
    ],
)
def test_fields_of_any_type(copy: Callable[..., Path], file: str, key: str, value: Any) -> None:
    directory = copy(**{file: lambda data: data.update({key: value})})
    try:
        metadata = CheckpointSource(directory).metadata
    except QuantkitError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 800
    else:
        assert key in ("chat_template", "bos_token", "post_processor")
        Vocabulary.from_metadata(metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"].update(continuing_subword_prefix="\u20ac" * 9),
        lambda data: data["model"].update(dropout=7.5),
        lambda data: data.update(added_tokens=[{"id": 2**31, "content": "x"}] * 2),
        lambda data: data["model"].update(merges=[["a"]]),
    ],
)
def test_what_the_tokenizers_library_panics_on(copy: Callable[..., Path], change: Callable[[Any], None]) -> None:
    assert refused(copy(tokenizer=change))


def test_a_normalizer_that_never_ends(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.vocabulary.checkpoint_files._SECONDS", 2)

    def change(data: Any) -> None:
        data["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a|aa|a?)+$"}, "content": ""}
        added = {"id": len(data["model"]["vocab"]), "content": "a" * 60 + "!", "special": False, "normalized": False}
        data["added_tokens"].append({**added, "single_word": False, "lstrip": False, "rstrip": False})

    try:
        _ = CheckpointSource(copy(tokenizer=change)).metadata
    except QuantkitError as problem:
        assert "\n" not in str(problem)


def test_json_and_yaml_that_nest_or_grow_without_end(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "generation_config.json").write_text("[" * 200_000 + "]" * 200_000)
    assert "malformed" in refused(directory)
    (directory / "generation_config.json").unlink()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (directory / "README.md").write_text("---\n" + "\n".join(lines) + "\ntags: *a9\n---\n")
    assert "aliases" in refused(directory)
    (directory / "README.md").write_text("---\ntags: " + "[" * 50_000 + "\n---\n")
    assert refused(directory)


def unigram_metadata(charsmap: bytes, **changes: Any) -> Metadata:
    """A Unigram vocabulary of letters, with a table of replacements."""
    metadata = Metadata()
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdef", "ab", "<own>"]
    types = [3, 3, 2, *[1] * 8, 4]
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "t5")
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, types, ValueType.INT32)
    metadata.set("tokenizer.ggml.scores", ValueType.ARRAY, [-float(i) for i in range(12)], ValueType.FLOAT32)
    if charsmap:
        metadata.set("tokenizer.ggml.precompiled_charsmap", ValueType.ARRAY, charsmap, ValueType.UINT8)
    for key, value in changes.items():
        metadata.set(f"tokenizer.ggml.{key}", ValueType.UINT32, value)
    return metadata


@settings(max_examples=200, deadline=None)
@given(units=st.lists(st.integers(0, 2**32 - 1), max_size=300), texts=st.binary(max_size=40), text=st.text(max_size=30))
def test_any_table_of_replacements(units: list[int], texts: bytes, text: str) -> None:
    """It is refused in one line, or gives ids of the vocabulary."""
    table = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts
    try:
        ids = Vocabulary.from_metadata(unigram_metadata(table)).encode(text)
    except QuantkitError as refused:
        assert "\n" not in str(refused)
    else:
        assert all(0 <= token < 12 for token in ids)


@pytest.mark.parametrize("table", [b"\1", b"\xff\xff\xff\xff123", struct.pack("<I", 4) + b"1234"])
def test_a_table_that_is_cut_off(table: bytes) -> None:
    with pytest.raises(QuantkitError, match="precompiled_charsmap is cut off"):
        Vocabulary.from_metadata(unigram_metadata(table))


def test_no_token_for_unknown_words() -> None:
    metadata = unigram_metadata(b"")
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "bert")
    with pytest.raises(QuantkitError, match="adds BOS to every text but names no BOS token"):
        Vocabulary.from_metadata(metadata)
    ids = {"bos_token_id": 0, "seperator_token_id": 1}
    metadata = unigram_metadata(b"", **ids)
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "bert")
    with pytest.raises(QuantkitError, match="names no token for unknown words"):
        Vocabulary.from_metadata(metadata)


@pytest.mark.parametrize(
    "data", [b"", b"\x12", b"\x1a\xff\xff\xff\xff\x0f", b"\x1a\x02\x12\x05", b"\x18\x80" * 40, b"\x0b"]
)
def test_damaged_sentencepiece_models(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    if data:
        with pytest.raises(QuantkitError, match="not a SentencePiece model"):
            read_normalizer(path)
    else:
        assert read_normalizer(path).adds_prefix
