"""Token ids against llama.cpp itself: every pre-tokenizer, every kind of vocabulary, random Unicode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unicodedata import ucd_3_2_0

import gguf
import pytest
from conftest import REFERENCE_SOURCE, ROOT, SHARED, requires_reference, requires_reference_source, requires_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_checkpoints import make_checkpoint
from sentencepiece import SentencePieceProcessor
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
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
# These vocabulary files come without recorded cases.
FILES_WITHOUT_CASES = ("aquila", "baichuan", "gpt-neox", "nomic-bert-moe")
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


def metadata_of(directory: Path, style: str) -> Metadata:
    """The vocabulary of a checkpoint as GGUF has it."""
    writer = gguf.GGUFWriter(path=None, arch="llama")
    write_vocabulary(directory, json.loads((directory / "config.json").read_text()), writer, style=style)
    metadata = Metadata()
    for key, value in writer.kv_data[0].items():
        item = None
        if isinstance(value.value, bytes):
            item = ValueType.UINT8
        elif isinstance(value.value, list):
            kinds = {str: ValueType.STRING, bytes: ValueType.STRING, float: ValueType.FLOAT32}
            item = kinds.get(type(value.value[0]), ValueType.INT32)
        items = [i.decode() if isinstance(i, bytes) else i for i in value.value] if item else value.value
        metadata.set(key, ValueType(int(value.type)), items, item)
    return metadata


@requires_reference
def test_rwkv(tmp_path: Path) -> None:
    compare(metadata_of(make_checkpoint("tiny-rwkv7", tmp_path), "rwkv"), tmp_path / "vocabulary.gguf", 200)


ENCODERS = {"bert": "wordpiece", "xlmr": "xlm-roberta", "xlmr_json": "xlm-roberta", "t5": "t5"}
GOLDENS = ROOT / "tests" / "goldens" / "vocabulary"


@requires_reference
@pytest.mark.parametrize("name", ENCODERS)
def test_wordpiece_and_unigram(name: str, tmp_path: Path) -> None:
    compare(metadata_of(GOLDENS / name, ENCODERS[name]), tmp_path / "vocabulary.gguf", 300)


# Where llama.cpp and the libraries agree: not on controls and characters that are not assigned, or were not when the
# libraries' tables were made (or, as \u166d, \u1885 and \u1886, were of another kind), nor on the lower case of \u0130
# and marks that take room, nor on words of more than a hundred characters, nor on the stand-in for a space.
AGREED = st.lists(
    st.one_of(
        st.sampled_from([*"abeinorst ABEINORST .,!?-()'\t\n12390"]),
        st.sampled_from(["tokenize", "expect", " the ", "##", "\ufb01", "A\u030a", "\u3000", "\u00e9", "\u00c5"]),
        st.characters(
            exclude_categories=["C", "Mc", "Me", "Zl", "Zp"],
            max_codepoint=0x2FFF,
            exclude_characters="\u0130\u2581\u166d\u1885\u1886",
        ).filter(lambda character: ucd_3_2_0.category(character) != "Cn"),
        st.characters(min_codepoint=0x3041, max_codepoint=0x9FFF, categories=["Lo"]),
    ),
    max_size=90,
).map("".join)


@settings(UNHURRIED, max_examples=300)
@given(text=AGREED)
@pytest.mark.parametrize("name", ["bert", "xlmr_json"])
def test_ids_of_the_tokenizers_library(name: str, text: str) -> None:
    library = Tokenizer.from_file(str(GOLDENS / name / "tokenizer.json"))
    assert vocabulary_of(name).encode(text).tolist() == library.encode(text).ids


@settings(UNHURRIED, max_examples=300)
@given(text=AGREED)
def test_ids_of_the_sentencepiece_library(text: str) -> None:
    model = SentencePieceProcessor(model_file=str(GOLDENS / "t5" / "spiece.model"))
    assert vocabulary_of("t5").encode(text, add_special=False).tolist() == model.encode(text)


@cache
def vocabulary_of(name: str) -> Vocabulary:
    return Vocabulary.from_metadata(metadata_of(GOLDENS / name, ENCODERS[name]))


@requires_reference
@requires_shared
def test_development_checkpoint(docs_llama: Path, tmp_path: Path) -> None:
    metadata = metadata_of(docs_llama, "auto")
    text = (SHARED / "data" / "docs-test.txt").read_text()
    # The library's tokenizer always looks for special tokens, so their texts are taken out.
    library = Tokenizer.from_file(str(docs_llama / "tokenizer.json"))
    part = text[:200_000].replace("<|endoftext|>", "").replace("<|begin_of_text|>", "")
    for pair in load(write_gguf(tmp_path / "vocabulary.gguf", metadata)):
        assert_same(pair, text, True, False)
        assert pair[0].encode(part).tolist() == library.encode(part).ids
