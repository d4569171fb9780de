"""The metadata that a checkpoint's vocabulary becomes, held against what the reference converter wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import ROOT, requires_shared

from quantkit.errors import QuantkitError
from quantkit.vocabulary import write_vocabulary

GOLDENS = ROOT / "tests" / "goldens" / "vocabulary"
EXPECTED: dict[str, Any] = json.loads((GOLDENS / "expected.json").read_text())

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def convert(directory: Path, **options: Any) -> list[list[Any]]:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    write_vocabulary(directory, json.loads((directory / "config.json").read_text()), writer, **options)
    return [[key, int(value.type), plain(value.value)] for key, value in writer.kv_data[0].items()]


def plain(value: Any) -> Any:
    """As the script that recorded the goldens does it."""
    if not isinstance(value, (list, tuple, bytes)):
        return value
    items = [item.decode() if isinstance(item, bytes) else item for item in value]
    return [len(items), hashlib.sha256(json.dumps(items).encode()).hexdigest()]


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A copy of one case, to damage."""
    return Path(shutil.copytree(GOLDENS / "llama3", tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_types_values_and_order_are_the_reference_converters(name: str) -> None:
    assert convert(GOLDENS / name, style=EXPECTED[name]["style"]) == EXPECTED[name]["values"]


@requires_shared
def test_development_checkpoint(docs_llama: Path) -> None:
    values = {key: value for key, _, value in convert(docs_llama)}
    assert list(values) == [
        "general.architecture",
        *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")),
        *(f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id", "add_bos_token")),
    ]
    assert values["tokenizer.ggml.pre"] == "llama-bpe"
    assert values["tokenizer.ggml.tokens"][0] == 8192


def test_styles_that_choose_by_the_files() -> None:
    spm, bpe = EXPECTED["spm"]["values"], EXPECTED["gemma_bpe"]["values"]
    assert convert(GOLDENS / "spm", style="spm-or-bpe") == spm
    assert convert(GOLDENS / "spm", style="gemma") == [*spm, ["tokenizer.ggml.add_space_prefix", 7, False]]
    for style in ("spm-or-bpe", "gemma"):
        assert convert(GOLDENS / "gemma_bpe", style=style) == bpe
    with pytest.raises(QuantkitError, match="'words' is not one of auto, bpe"):
        convert(GOLDENS / "spm", style="words")


def test_pre_overrides_recognition(case: Path) -> None:
    change(case / "tokenizer.json", lambda data: data.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(QuantkitError, match='"Whitespace"'):
        convert(case)
    assert ["tokenizer.ggml.pre", 8, "smaug-bpe"] in convert(case, pre="smaug-bpe")
    with pytest.raises(QuantkitError, match="'no-such' is not one of"):
        convert(case, pre="no-such")


def test_the_familys_name_is_taken_where_it_means_the_same(case: Path) -> None:
    assert ["tokenizer.ggml.pre", 8, "smaug-bpe"] in convert(case, usual_pre="smaug-bpe")
    # It would cut a text otherwise.
    assert ["tokenizer.ggml.pre", 8, "llama-bpe"] in convert(case, usual_pre="refact")
    assert ["tokenizer.ggml.pre", 8, "dbrx"] in convert(case, pre="dbrx", usual_pre="smaug-bpe")
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
    change(case / "tokenizer.json", lambda data: data.update(pre_tokenizer=digits, normalizer=None))
    assert ["tokenizer.ggml.pre", 8, "refact"] in convert(case, usual_pre="refact")


def change(path: Path, edit: Any) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("tokenizer.json", lambda data: data["model"].update(type="Unigram"), "Unigram tokenizer"),
        ("tokenizer.json", lambda data: data["model"].update(vocab=[]), "not a tokenizer"),
        ("tokenizer.json", lambda data: data.update(post_processor={"processors": 3}), "malformed"),
        ("tokenizer_config.json", lambda data: data.update(added_tokens_decoder={"x": 1}), "added_tokens_decoder"),
        ("config.json", lambda data: data.update(vocab_size=7), "more than vocab_size"),
        ("config.json", lambda data: data.update(vocab_size=-7), "vocab_size is -7"),
        ("config.json", lambda data: data.update(pad_token_id=-1), "pad token has the id -1"),
    ],
)
def test_malformed_files_are_named(case: Path, file: str, edit: Any, message: str) -> None:
    change(case / file, edit)
    with pytest.raises(QuantkitError, match=message):
        convert(case)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_json_and_no_vocabulary(case: Path, name: str) -> None:
    (case / name).write_bytes(b'{"a": \xff')
    with pytest.raises(QuantkitError, match=f"{name}: not readable"):
        convert(case)
    (case / "tokenizer.json").unlink()
    (case / "tokenizer_config.json").unlink()
    with pytest.raises(QuantkitError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        convert(case)


def test_a_broken_sentencepiece_model(tmp_path: Path) -> None:
    case = Path(shutil.copytree(GOLDENS / "spm", tmp_path / "checkpoint"))
    (case / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(QuantkitError, match=r"tokenizer\.model: not a SentencePiece model"):
        convert(case)
