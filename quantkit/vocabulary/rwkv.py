"""RWKV's vocabulary: byte strings, of which the longest that fits is taken at each place of a text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError

NAME = "rwkv_vocab_v20230424.txt"
_MAX_BYTES = 1 << 26  # of the file
# A line: the token's number, the token as Python writes it, and its length in bytes.
_LINE = re.compile(r"""(\d{1,9}) (b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")) (\d{1,9})""", re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_WHITE_SPACE = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def read_tokens(path: Path) -> list[str]:
    r"""The tokens of the file at `path` in its order, each as GGUF has it: bytes beyond printable ASCII as `\xff`.

    Raises QuantkitError for a file that is none of tokens.
    """
    if not path.is_file():
        raise QuantkitError(f"{path}: not found")
    if path.stat().st_size > _MAX_BYTES:
        raise QuantkitError(f"{path}: larger than {_MAX_BYTES} bytes, the limit for a vocabulary")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise QuantkitError(f"{path}: not readable as text: {error}") from None
    tokens = []
    for number, line in enumerate(lines[: -1 if not lines[-1] else None], 1):
        found = _LINE.fullmatch(line)
        try:
            value = ast.literal_eval(found[2]) if found else None
        except (ValueError, SyntaxError):
            value = None
        token = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if found is None or not isinstance(token, bytes) or len(token) != int(found[3]):
            raise QuantkitError(f"{path}: line {number} is not a token's number, the token and its length")
        tokens.append(repr(token)[2:-1])
    if len(set(tokens)) < len(tokens):
        raise QuantkitError(f"{path}: it has a token twice")
    return tokens


def bytes_of(token: str) -> bytes:
    """What a token that GGUF holds stands for."""

    def plain(escape: re.Match[bytes]) -> bytes:
        return bytes([int(escape[1], 16)]) if escape[1] else _WHITE_SPACE.get(escape[2], escape[2])

    return _ESCAPE.sub(plain, token.encode("utf-8", "surrogateescape"))


class RwkvEncoder:
    """Encodes text by the longest token at each place; `tokens` are those of a GGUF."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Make the tree of the tokens' bytes."""
        self._tree: dict[int, Any] = {}
        for token, text in enumerate(tokens):
            node = self._tree
            for byte in bytes_of(text):
                node = node.setdefault(byte, {})
            node[-1] = token

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 of shape (n,). Raises QuantkitError where no token fits."""
        data, at, found = text.encode("utf-8", "surrogateescape"), 0, []
        while at < len(data):
            token, stop, end = None, at, at
            node: Mapping[int, Any] = self._tree
            while end < len(data) and data[end] in node:
                node = node[data[end]]
                end += 1
                if -1 in node:
                    token, stop = node[-1], end
            if token is None:
                raise QuantkitError(f"the vocabulary has no token for the byte {data[at]:#04x}")
            found.append(token)
            at = stop
        return np.array(found, dtype=np.int32)
