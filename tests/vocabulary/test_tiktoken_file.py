"""tiktoken's files of ranks: the merges that follow from them, and files that are none."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest
from support.vocabulary_reference import SAMPLE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from quantkit.errors import QuantkitError
from quantkit.vocabulary import tiktoken_file
from quantkit.vocabulary.encoders import byte_alphabet


def test_merges_are_those_that_the_ranks_were_learned_by() -> None:
    """Of byte-level BPE trained by the tokenizers library, whose tokens come in the order of its merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [SAMPLE], trainers.BpeTrainer(vocab_size=600, show_progress=False, min_frequency=1, initial_alphabet=alphabet)
    )
    byte = {character: i for i, character in enumerate(byte_alphabet())}
    ranks = {bytes(byte[c] for c in text): rank for text, rank in trained.get_vocab().items()}
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    words = [pair.split(" ") for pair in tiktoken_file.merges(ranks)]
    assert len(words) == len(ranks) - 256 > 200

    again = Tokenizer(models.BPE(trained.get_vocab(), [(a, b) for a, b in words]))
    again.pre_tokenizer = trained.pre_tokenizer
    assert again.encode(SAMPLE).ids == trained.encode(SAMPLE).ids


def line(token: bytes, rank: object) -> bytes:
    return b64encode(token) + f" {rank}\n".encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the ranks of its 0 tokens are not 0, 1, 2"),
        (line(b"a", 0) + line(b"b", 2), "the ranks of its 2 tokens are not 0, 1, 2"),
        (line(b"a", 0) + line(b"b", 0), "the ranks of its 2 tokens are not 0, 1, 2"),
        (line(b"a", -1) + line(b"b", 0), "the ranks of its 2 tokens are not 0, 1, 2"),
        (line(b"a", "x"), "line 1 is not a token in base64 and its rank"),
        (line(b"a", 0) + b"?? 1\n", "line 2 is not a token in base64 and its rank"),
        (b"YQ==\n", "line 1 is not a token in base64 and its rank"),
        (line(b"a" * 12000, 0), "the tokens are too long"),
        (line(b"a", "9" * 5000), "line 1 is not a token in base64 and its rank"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "hy.tiktoken").write_bytes(content)
    with pytest.raises(QuantkitError, match=told):
        tiktoken_file.read_ranks(tmp_path / "hy.tiktoken")
    with pytest.raises(QuantkitError, match="not found"):
        tiktoken_file.read_ranks(tmp_path / "another")
