"""tiktoken's files of ranks, as some checkpoints bring them in place of a tokenizer.json: tokens and their merges.

Each line has a token's bytes in base64 and its rank, which is its id. Byte pairs are merged in the order of the ranks
of what they make, so a token's merge is the last of those that make it of bytes.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.vocabulary.encoders import byte_alphabet

_ALPHABET = byte_alphabet()
_MAX_BYTES = 1 << 26  # of the file
# Bounds the work of finding merges; real vocabularies come to a tenth.
_MAX_SQUARES = 1 << 27


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of the tokens in the file at `path`, in its order.

    Raises QuantkitError for a file that is none of ranks, or that has one twice.
    """
    if not path.is_file():
        raise QuantkitError(f"{path}: not found")
    if path.stat().st_size > _MAX_BYTES:
        raise QuantkitError(f"{path}: larger than {_MAX_BYTES} bytes, the limit for a file of ranks")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = b64decode(text, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise QuantkitError(f"{path}: line {number} is not a token in base64 and its rank") from None
    used = set(ranks.values())
    if len(used) != len(ranks) or not ranks or min(used) != 0 or max(used) != len(ranks) - 1:
        raise QuantkitError(f"{path}: the ranks of its {len(ranks)} tokens are not 0, 1, 2, ...")
    if b"" in ranks:
        raise QuantkitError(f"{path}: a token of no bytes")
    if sum(len(token) ** 2 for token in ranks) > _MAX_SQUARES:
        raise QuantkitError(f"{path}: the tokens are too long for a vocabulary")
    return ranks


def written(token: bytes) -> str:
    """A token as byte-level BPE writes it: a printable character for each byte."""
    return "".join(_ALPHABET[byte] for byte in token)


def merges(ranks: dict[bytes, int]) -> list[str]:
    """The pairs of tokens that are merged, in the order of the file; nothing for tokens that merging never makes."""
    found = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(
                (
                    (made, i)
                    for i, pair in enumerate(pairwise(parts))
                    if (made := ranks.get(b"".join(pair))) is not None
                ),
                default=None,
            )
            if best is None or best[0] >= rank:
                break
            at = best[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append(" ".join(map(written, parts)))
    return found
