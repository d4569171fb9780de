"""RWKV's vocabulary: byte strings as its file and a GGUF write them, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.vocabulary import rwkv


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=20, unique=True))
def test_tokens_stand_for_the_bytes_of_the_file(tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("rwkv") / rwkv.NAME
    lines = []
    for i, token in enumerate(tokens, 1):
        try:
            text = repr(token.decode()) if i % 2 else repr(token)
        except UnicodeDecodeError:
            text = repr(token)
        lines.append(f"{i} {text} {len(token)}\n")
    path.write_bytes("".join(lines).encode())
    assert [rwkv.bytes_of(token) for token in rwkv.read_tokens(path)] == tokens


def test_the_longest_token_is_taken() -> None:
    encoder = rwkv.RwkvEncoder(["a", "ab", "abcd", "b", "c"])
    assert encoder.encode("abcabcd").tolist() == [1, 4, 2]
    assert encoder.encode("").tolist() == []
    with pytest.raises(QuantkitError, match="no token for the byte 0x64"):
        encoder.encode("abd")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"1 'a'\n", "line 1 is not a token's number"),
        (b"1 'a' 2\n", "line 1 is not a token's number"),
        (b"1 'a' 1\n2 print('b') 1\n", "line 2 is not a token's number"),
        (b"1 (1).__class__ 1\n", "line 1 is not a token's number"),
        (b"1 'a' + 'b' 2\n", "line 1 is not a token's number"),
        (b"1 '\\x' 1\n", "line 1 is not a token's number"),
        (b"1 b'\xc3\xa9' 2\n", "line 1 is not a token's number"),
        (b"1 " + b"(" * 10000 + b"'a' 1\n", "line 1 is not a token's number"),
        (b"1 'a' 1\n2 b'a' 1\n", "it has a token twice"),
        (b"1 '\xff' 1\n", "not readable as text"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / rwkv.NAME).write_bytes(content)
    with pytest.raises(QuantkitError, match=told):
        rwkv.read_tokens(tmp_path / rwkv.NAME)
    with pytest.raises(QuantkitError, match="not found"):
        rwkv.read_tokens(tmp_path / "another")
