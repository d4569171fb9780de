"""Token ids against llama.cpp itself: every pre-tokenizer, every kind of vocabulary, random Unicode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from conftest import REFERENCE_SOURCE, SHARED, requires_reference, requires_reference_source, requires_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.vocabulary_reference import (
    SAMPLE,
    TEXTS,
    LlamaCpp,
    byte_level_metadata,
    gemma4_metadata,
    sentencepiece_metadata,
    write_gguf,
)
from tokenizers import Tokenizer

from quantkit.formats.gguf import GGUFFile, Metadata, ValueType
from quantkit.vocabulary import Vocabulary, write_vocabulary
from quantkit.vocabulary.pretokenizers import PRETOKENIZERS

VOCABULARY_FILES = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt",
    "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
# These vocabulary files come without recorded cases.
FILES_WITHOUT_CASES = ("aquila", "baichuan", "gpt-neox")
SEPARATOR = "\n__ggml_vocab_test__\n"
UNHURRIED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

Pair = tuple[Vocabulary, LlamaCpp]


def vocabulary_file(name: str) -> Path:
    return REFERENCE_SOURCE / "models" / f"ggml-vocab-{name}.gguf"


def load(path: Path) -> Iterator[Pair]:
    reference = LlamaCpp(path)
    yield Vocabulary.from_metadata(GGUFFile(path).metadata), reference
    reference.close()


def assert_same(pair: Pair, text: str, add_special: bool, parse_special: bool) -> None:
    ours, theirs = pair
    expected = theirs.encode(text, add_special, parse_special)
    assert ours.encode(text, add_special, parse_special).tolist() == expected
    if expected:
        assert ours.decode(expected) == theirs.decode(expected)


@requires_reference_source
@pytest.mark.parametrize("name", VOCABULARY_FILES)
def test_recorded_cases_of_the_reference(name: str) -> None:
    path = vocabulary_file(name)
    vocabulary = Vocabulary.from_metadata(GGUFFile(path).metadata)
    texts = Path(f"{path}.inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    expected = Path(f"{path}.out").read_text().splitlines()
    assert len(texts) == len(expected) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert vocabulary.encode(text, add_special=False).tolist() == [int(token) for token in ids.split()]


@pytest.fixture(scope="module", params=VOCABULARY_FILES + FILES_WITHOUT_CASES)
def file_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One vocabulary file, loaded by us and by llama.cpp."""
    yield from load(vocabulary_file(request.param))


@requires_reference_source
@requires_reference
class TestVocabularyFiles:
    @UNHURRIED
    @given(text=TEXTS, add_special=st.booleans(), parse_special=st.booleans())
    def test_random_text(self, file_pair: Pair, text: str, add_special: bool, parse_special: bool) -> None:
        assert_same(file_pair, text, add_special, parse_special)

    @requires_shared
    def test_documentation(self, file_pair: Pair) -> None:
        text = (SHARED / "data" / "docs-test.txt").read_text()
        for start in range(0, len(text), len(text) // 5):
            assert_same(file_pair, text[start : start + 12_000], True, False)

    def test_facts_and_pieces(self, file_pair: Pair) -> None:
        ours, theirs = file_pair
        assert (ours.bos, ours.eos, ours.eot, ours.add_bos, ours.add_eos) == theirs.facts()
        for token in range(0, ours.n_tokens, 1 + ours.n_tokens // 3000):
            assert ours.is_control(token) == theirs.is_control(token)
            assert ours.decode([token]) == theirs.decode([token])
            assert ours.decode([token], special=False) == theirs.decode([token], special=False)


def compare(metadata: Metadata, path: Path, examples: int) -> None:
    for pair in load(write_gguf(path, metadata)):
        assert pair[0].add_bos == pair[1].facts()[3]
        assert_same(pair, SAMPLE, True, True)
        assert_same(pair, "a .  ? b 's  're ' x 'll ,  ! ''s", False, False)  # what cleaning spaces is about

        @settings(UNHURRIED, max_examples=examples)
        @given(text=TEXTS, add_special=st.booleans(), parse_special=st.booleans())
        def check(text: str, add_special: bool, parse_special: bool) -> None:
            assert_same(pair, text, add_special, parse_special)  # noqa: B023, called before the loop goes on

        check()


@requires_reference
@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pretokenizer(pre: str, tmp_path: Path) -> None:
    # Some tokens that merges lead to are missing, as in damaged or pruned vocabularies.
    compare(byte_level_metadata(pre, drop=["in", "Ġt", "Ġre", "q"]), tmp_path / "vocabulary.gguf", 60)


@requires_reference
@pytest.mark.parametrize("make", [sentencepiece_metadata, gemma4_metadata])
def test_vocabularies_of_characters(make: Callable[[], Metadata], tmp_path: Path) -> None:
    compare(make(), tmp_path / "vocabulary.gguf", 300)


@requires_reference
@requires_shared
def test_development_checkpoint(docs_llama: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    write_vocabulary(docs_llama, json.loads((docs_llama / "config.json").read_text()), writer)
    metadata = Metadata()
    for key, value in writer.kv_data[0].items():
        item = None
        if isinstance(value.value, list):
            item = ValueType.STRING if isinstance(value.value[0], str) else ValueType.INT32
        metadata.set(key, ValueType(int(value.type)), value.value, item)
    text = (SHARED / "data" / "docs-test.txt").read_text()
    # The library's tokenizer always looks for special tokens, so their texts are taken out.
    library = Tokenizer.from_file(str(docs_llama / "tokenizer.json"))
    part = text[:200_000].replace("<|endoftext|>", "").replace("<|begin_of_text|>", "")
    for pair in load(write_gguf(tmp_path / "vocabulary.gguf", metadata)):
        assert_same(pair, text, True, False)
        assert pair[0].encode(part).tolist() == library.encode(part).ids
