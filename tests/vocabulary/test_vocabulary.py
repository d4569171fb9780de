"""A vocabulary from metadata alone: what it refuses, and what holds for any text."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabulary_reference import SAMPLE, TEXTS, byte_level_metadata, gemma4_metadata, sentencepiece_metadata

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, ValueType
from quantkit.vocabulary import Vocabulary
from quantkit.vocabulary.unicode_classes import N_CODE_POINTS, classes

KEY = "tokenizer.ggml."


@pytest.mark.parametrize("metadata", [byte_level_metadata("qwen2"), sentencepiece_metadata(), gemma4_metadata()])
def test_decoding_undoes_encoding(metadata: Metadata) -> None:
    vocabulary = Vocabulary.from_metadata(metadata)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        if vocabulary.model != "gpt2":
            # The stand-in for spaces, cleaning, and the space after the special token "  " do not keep every text.
            text = text.replace("\u2581", "").replace(" ", "")
        ids = vocabulary.encode(text, add_special=False)
        assert ids.dtype == np.int32
        assert not ids.size or 0 <= ids.min() <= ids.max() < vocabulary.n_tokens
        assert vocabulary.decode(ids) == text

    check()


def test_special_tokens_around_and_within() -> None:
    vocabulary = Vocabulary.from_metadata(byte_level_metadata("llama-bpe"))
    user = vocabulary.tokens.index("<|user|>")
    assert vocabulary.encode("<|user|>", parse_special=True).tolist() == [vocabulary.bos, user]
    ordinary = vocabulary.encode("<|user|>").tolist()
    assert user not in ordinary and len(ordinary) > 2
    tool = vocabulary.tokens.index("<tool>")
    assert tool in vocabulary.encode("a<tool>b").tolist()
    assert vocabulary.is_control(user) and not vocabulary.is_control(tool)
    assert vocabulary.decode([user, tool]) == "<|user|><tool>"
    assert vocabulary.decode([user, tool], special=False) == "<tool>"
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)
    assert vocabulary.encode("").tolist() == [vocabulary.bos]
    assert vocabulary.encode("\ud800x").tolist() == vocabulary.encode("\ufffdx").tolist()


def test_equality_is_that_of_what_encoding_depends_on() -> None:
    one, other = byte_level_metadata("qwen2"), byte_level_metadata("qwen2")
    other.set("general.author", ValueType.STRING, "somebody")
    assert Vocabulary(one) == Vocabulary(other)
    assert Vocabulary(one).fingerprint == Vocabulary(other).fingerprint
    assert hash(Vocabulary(one)) == hash(Vocabulary(other))
    different = Vocabulary(byte_level_metadata("gpt-2"))
    assert Vocabulary(one) != different
    assert Vocabulary(one).fingerprint != different.fingerprint


def metadata_of(kind: str) -> Metadata:
    return sentencepiece_metadata() if kind == "spm" else byte_level_metadata("qwen2")


STRING, ARRAY, UINT32, INT32, FLOAT32 = (
    ValueType.STRING, ValueType.ARRAY, ValueType.UINT32, ValueType.INT32, ValueType.FLOAT32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("bpe", "model", None, "lacks tokenizer.ggml.model"),
        ("bpe", "model", (STRING, "plamo2"), "'plamo2' is not supported"),
        ("bpe", "model", (UINT32, 3), "ggml.model is 3, not text"),
        ("bpe", "pre", (STRING, "nonsense"), "'nonsense' is not one of"),
        ("bpe", "tokens", None, "lacks tokenizer.ggml.tokens"),
        ("bpe", "tokens", (STRING, "a"), "not an array of texts"),
        ("bpe", "tokens", (ARRAY, [1, 2], INT32), "not an array of texts"),
        ("bpe", "tokens", (ARRAY, ["a", "b", "a"], STRING), "'a' twice"),
        ("bpe", "merges", None, "lacks tokenizer.ggml.merges"),
        ("bpe", "merges", (ARRAY, [1.0], FLOAT32), "an array of 1 FLOAT32, not an array of texts"),
        ("bpe", "token_type", (ARRAY, [1, 1], INT32), "an array of 2 INT32, not one number for each of the"),
        ("bpe", "token_type", (ARRAY, [1.0], FLOAT32), "not an array of INT32"),
        ("bpe", "bos_token_id", (UINT32, 1 << 30), "bos_token_id is 1073741824"),
        ("bpe", "bos_token_id", (STRING, "1"), "bos_token_id is '1', not a whole number"),
        ("bpe", "add_bos_token", (UINT32, 1), "add_bos_token is 1, not true or false"),
        ("spm", "scores", (ARRAY, [1.0], FLOAT32), "scores is an array of 1 FLOAT32, not one number"),
        ("spm", "scores", (ARRAY, ["a"], STRING), "scores is an array of 1 STRING, not an array of FLOAT32 or INT32"),
    ],
)
def test_bad_metadata_is_refused(kind: str, key: str, value: tuple[Any, ...] | None, message: str) -> None:
    metadata = metadata_of(kind)
    if value is None:
        del metadata[KEY + key]
    else:
        metadata.set(KEY + key, *value)
    with pytest.raises(QuantkitError, match=message) as raised:
        Vocabulary.from_metadata(metadata)
    assert "\n" not in str(raised.value)


def test_scores_must_be_numbers_and_tokens_bounded() -> None:
    metadata = sentencepiece_metadata()
    scores = metadata.array(KEY + "scores", (FLOAT32,)).tolist()
    metadata.set(KEY + "scores", ARRAY, [float("nan"), *scores[1:]], FLOAT32)
    with pytest.raises(QuantkitError, match="not a number"):
        Vocabulary.from_metadata(metadata)
    metadata = sentencepiece_metadata()
    tokens = metadata.strings(KEY + "tokens")
    metadata.set(KEY + "tokens", ARRAY, ["x" * 100_000, *tokens[1:]], STRING)
    with pytest.raises(QuantkitError, match="has 100000 characters"):
        Vocabulary.from_metadata(metadata)


def test_a_character_without_token_and_bytes_is_named() -> None:
    metadata = Metadata()
    metadata.set(KEY + "model", STRING, "llama")
    metadata.set(KEY + "tokens", ARRAY, ["<unk>", "<s>", "</s>", "a", "▁"], STRING)
    vocabulary = Vocabulary.from_metadata(metadata)
    assert vocabulary.encode("a").tolist() == [1, 4, 3]
    with pytest.raises(QuantkitError, match="no token for the character 'b'"):
        vocabulary.encode("ab")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=30), TEXTS)
def test_merges_of_any_kind_do_no_harm(merges: list[str], text: str) -> None:
    merges = [merge.encode("utf-8", "replace").decode() for merge in merges]
    metadata = byte_level_metadata("gpt-2")
    metadata.set(KEY + "merges", ARRAY, merges, STRING)
    vocabulary = Vocabulary.from_metadata(metadata)
    ids = vocabulary.encode(text, add_special=False)
    assert not ids.size or 0 <= ids.min() <= ids.max() < vocabulary.n_tokens


def test_long_words_take_no_quadratic_time() -> None:
    for metadata in (byte_level_metadata("gpt-2"), sentencepiece_metadata(), gemma4_metadata()):
        vocabulary = Vocabulary.from_metadata(metadata)
        assert vocabulary.encode("tokenize" * 100_000, add_special=False).size > 10_000


def test_decode_refuses_ids_beyond_the_vocabulary() -> None:
    vocabulary = Vocabulary.from_metadata(byte_level_metadata("gpt-2"))
    for token in (-1, vocabulary.n_tokens):
        with pytest.raises(IndexError):
            vocabulary.decode([token])


def test_classes_agree_with_the_categories_of_this_python() -> None:
    """Every character that this Python's older or newer Unicode has assigned; categories of few ever change."""
    stand_ins = classes(np.arange(N_CODE_POINTS, dtype=np.uint32))
    of_class = {"\xd1": "N", "\xd2": "L", "\xd3": "P", "\xd4": "M", "\xd5": "S"}
    changed = 0
    for code in range(128, sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category in ("Cn", "Cs"):
            continue
        expected = category[0] if category[0] in "NLPMS" else None
        changed += of_class.get(stand_ins[code]) != expected
    newer = tuple(map(int, unicodedata.unidata_version.split("."))) > (15, 1, 0)
    assert changed == 0 or (newer and changed < 20_000)
    assert classes(np.arange(128, dtype=np.uint32)) == "".join(map(chr, range(128)))


def test_sample_has_few_tokens() -> None:
    # Guards the fixtures: the vocabularies above do merge.
    for metadata in (byte_level_metadata("qwen2"), sentencepiece_metadata(), gemma4_metadata()):
        assert Vocabulary.from_metadata(metadata).encode(SAMPLE).size < 0.7 * len(SAMPLE.encode())
