"""Pre-tokenizers recognised by their definition in tokenizer.json."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import REFERENCE_SOURCE, requires_reference_source
from hypothesis import given, settings
from support.vocabulary_reference import TEXTS
from tokenizers import pre_tokenizers

from quantkit.errors import QuantkitError
from quantkit.vocabulary.pretokenizers import PRETOKENIZERS, splitter
from quantkit.vocabulary.recognition import DEFINITIONS, recognise
from quantkit.vocabulary.unicode_classes import code_points

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGIT = {"type": "Digits", "individual_digits": True}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def tokenizer(pre: dict[str, Any], ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    return {"normalizer": normalizer, "pre_tokenizer": pre, "model": {"ignore_merges": ignore_merges}}


NFC = {"type": "NFC"}
EMPTY = {"type": "Sequence", "normalizers": []}
QWEN2 = LLAMA3.replace("{1,3}", "")


@pytest.mark.parametrize(
    ("data", "adds_bos", "expected"),
    [
        (tokenizer(sequence(split(LLAMA3), BYTES), True), True, "llama-bpe"),
        (tokenizer(sequence(split(LLAMA3), BYTES), True), None, "glm4"),
        (tokenizer(sequence(split(LLAMA3), BYTES), False), False, "dbrx"),
        (tokenizer(sequence(split(LLAMA3, "Removed", True), BYTES), False), False, "dbrx"),
        (tokenizer(sequence(split(QWEN2), BYTES), normalizer=NFC), None, "qwen2"),
        (tokenizer(sequence(split(QWEN2.replace(r"\r\n", "\r\n")), BYTES), normalizer=NFC), None, "qwen2"),
        (tokenizer(GPT2), None, "gpt-2"),
        (tokenizer(GPT2, normalizer=NFC), None, "olmo"),
        (tokenizer(sequence(DIGIT, GPT2), normalizer=EMPTY), None, "starcoder"),
        (tokenizer(sequence(split(r"\p{N}"), GPT2)), None, "starcoder"),
        (tokenizer(sequence(DIGIT, GPT2), normalizer=NFC), None, "command-r"),
        (
            tokenizer(
                sequence(
                    {"type": "Punctuation", "behavior": "Contiguous"},
                    GPT2,
                    {"type": "Digits", "individual_digits": False},
                    split("[0-9][0-9][0-9]"),
                )
            ),
            None,
            "falcon",
        ),
    ],
)
def test_known_definitions(data: dict[str, Any], adds_bos: bool | None, expected: str) -> None:
    assert recognise(data, adds_bos=adds_bos) == expected


def test_a_token_tells_names_apart() -> None:
    data = tokenizer(sequence(split(QWEN2), BYTES), normalizer=NFC)
    data["added_tokens"] = [{"content": "<|im_start|>"}, {"content": "<\uff5cbegin\u2581of\u2581sentence\uff5c>"}]
    assert recognise(data, adds_bos=True) == "deepseek-r1-qwen"
    del data["added_tokens"][1]
    assert recognise(data, adds_bos=True) == "qwen2"


def test_habits_choose_between_names() -> None:
    digits = tokenizer(sequence(DIGIT, GPT2))
    assert recognise(digits, cleans_spaces=False) == "smollm"
    assert recognise(digits, cleans_spaces=True) == "starcoder"


@pytest.mark.parametrize(
    "data",
    [
        tokenizer({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        tokenizer(sequence(split(r"\w+"), BYTES)),
        tokenizer(sequence(split(LLAMA3, "MergedWithNext"), BYTES)),
        tokenizer(sequence(split(LLAMA3), GPT2)),
        tokenizer(sequence(split(LLAMA3), BYTES), normalizer={"type": "Lowercase"}),
        {},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 7}},
    ],
)
def test_an_unknown_definition_says_what_was_seen(data: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="is not known") as raised:
        recognise(data)
    seen = data.get("pre_tokenizer")
    assert json.dumps(seen, ensure_ascii=False) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_name_is_one_that_can_be_encoded() -> None:
    names = [name for definition in DEFINITIONS for name in definition.names]
    assert set(names) <= set(PRETOKENIZERS)
    assert len(names) == len(set(names))


@requires_reference_source
def test_names_are_those_of_the_reference() -> None:
    source = (REFERENCE_SOURCE / "src" / "llama-vocab.cpp").read_text()
    for name in PRETOKENIZERS:
        assert f'tokenizer_pre == "{name}"' in source


# What the definition does in the tokenizers library, and what llama.cpp's words are, must agree on text whose
# characters both know alike. Left out: \x1c to \x1f and \x85, space to one and not to the other, the letters that
# (?i) folds into ASCII, and characters that are newer than either table.
ODD = {*"\x1c\x1d\x1e\x1f\x85ſK\x00"}
BY_DEFINITION = {
    "llama-bpe": sequence(split(LLAMA3)),
    "qwen2": sequence(split(QWEN2)),
    "gpt-2": sequence(split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")),
    "starcoder": sequence(DIGIT, split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")),
}


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_words_are_those_of_the_tokenizers_library(name: str) -> None:
    steps = []
    from tokenizers import Regex

    for step in BY_DEFINITION[name]["pretokenizers"]:
        if step["type"] == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated"))
    library = pre_tokenizers.Sequence(steps)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        import unicodedata

        text = "".join(c for c in text if c not in ODD and unicodedata.category(c) != "Cn")
        ends = splitter(name).ends(text, code_points(text))
        assert ends == [end for _, (_, end) in library.pre_tokenize_str(text)]

    check()
