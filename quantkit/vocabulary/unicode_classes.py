"""Text reduced to classes of characters, which is what the pre-tokenizers' expressions look at.

llama.cpp matches its expressions not on the text but on a copy in which every character beyond ASCII is one byte
that stands for its Unicode category; so do we, with the same version of Unicode, and get the same words whatever
version of Unicode Python or the expression engine has. (`unicode_classes.json` is made by
`scripts/make_unicode_classes.py` from Unicode 15.1.)
"""

from __future__ import annotations

import json
import re
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

N_CODE_POINTS = 0x110000

# What stands for a character beyond ASCII. The values are free, but for the white space, which \s has to match.
_REPRESENTATIVE = {"N": "\xd1", "L": "\xd2", "P": "\xd3", "M": "\xd4", "S": "\xd5", "-": "\xd0", "C": "\xd0"}
_WHITE_SPACE = "\x0b"
_ASCII_WHITE_SPACE = tuple(b" \t\n\v\f\r")
_WHITE_SPACE_BEYOND_ASCII = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)

# The ASCII members of each category, as they are written inside a bracket expression.
_ASCII = {
    "N": "0-9",
    "L": "A-Za-z",
    "M": "",
    "P": r"!-#%-*,-/:;?@\[-\]_{}",
    "S": r"$+<->\^`|~",
}
# A property of cased letters means any letter here: the reference has no table of letter case.
_PROPERTY = re.compile(r"\\p\{(L|Lu|Ll|Lt|Lm|Lo|N|M|P|S)\}")


class Category(IntEnum):
    """What a character is: its Unicode category in brief, with white space apart."""

    OTHER = 0
    SPACE = 1
    CONTROL = 2  # and formats, and what is for private use
    MARK = 3
    PUNCTUATION = 4
    SYMBOL = 5


_CATEGORIES = {"C": Category.CONTROL, "M": Category.MARK, "P": Category.PUNCTUATION, "S": Category.SYMBOL}


@lru_cache(maxsize=1)
def _data() -> dict[str, str]:
    data: dict[str, str] = json.loads((Path(__file__).parent / "unicode_classes.json").read_text())
    return data


@lru_cache(maxsize=1)
def _category_table() -> np.ndarray:
    """The `Category` of each code point: uint8 of shape (0x110000,)."""
    table = np.empty(N_CODE_POINTS, dtype=np.uint8)
    for run in _data()["runs"].split():
        table[int(run[:-1], 16) :] = _CATEGORIES.get(run[-1], Category.OTHER)
    table[[*_ASCII_WHITE_SPACE, *_WHITE_SPACE_BEYOND_ASCII]] = Category.SPACE
    return table


@lru_cache(maxsize=2)
def _changes(which: str) -> np.ndarray:
    """What each code point becomes by the runs `lower` or `base`: uint32 of shape (0x110000,)."""
    table = np.arange(N_CODE_POINTS, dtype=np.uint32)
    for run in _data()[which].split():
        first, last, target = (int(part, 16) for part in re.split("[-:]", run))
        table[first : last + 1] = target + np.arange(last - first + 1) * (which == "lower")
    return table


def categories(codes: np.ndarray) -> np.ndarray:
    """The `Category` of each of `codes`, uint8 of their shape."""
    found: np.ndarray = _category_table()[codes]
    return found


def lower_case(codes: np.ndarray) -> np.ndarray:
    """`codes` in lower case, one for one, uint32 of their shape."""
    found: np.ndarray = _changes("lower")[codes]
    return found


def base_characters(codes: np.ndarray) -> np.ndarray:
    """What each of `codes` begins with when it is decomposed (NFD), uint32 of their shape."""
    found: np.ndarray = _changes("base")[codes]
    return found


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """The byte that stands for each code point: uint8 of shape (0x110000,)."""
    table = np.empty(N_CODE_POINTS, dtype=np.uint8)
    for run in _data()["runs"].split():
        table[int(run[:-1], 16) :] = ord(_REPRESENTATIVE[run[-1]])
    table[list(_WHITE_SPACE_BEYOND_ASCII)] = ord(_WHITE_SPACE)
    table[:128] = np.arange(128)
    return table


def code_points(text: str) -> np.ndarray:
    """The code points of `text`: uint32 of shape (len(text),). The text has no surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def classes(codes: np.ndarray) -> str:
    """A string as long as `codes`: ASCII characters as they are, others replaced by their class."""
    stand_ins: bytes = _table()[codes].tobytes()
    return stand_ins.decode("latin-1")


def plain(text: str) -> str:
    r"""`text` with all white space beyond ASCII replaced by a character that \s matches."""
    return text.translate(dict.fromkeys(_WHITE_SPACE_BEYOND_ASCII, _WHITE_SPACE))


def uses_classes(pattern: str) -> bool:
    """Whether the regular expression asks for Unicode categories, so that it is matched on classes."""
    return _PROPERTY.search(pattern) is not None


def compile_for_classes(pattern: str) -> re.Pattern[str]:
    r"""Compile a regular expression with \p{...} properties for matching on the output of `classes`.

    \s, \d and \b keep their ASCII meaning, in which other white space is already replaced.
    """
    parts: list[str] = []
    inside = False
    at = 0
    while at < len(pattern):
        found = _PROPERTY.match(pattern, at)
        if found:
            name = found[1][0]
            members = _REPRESENTATIVE[name] + _ASCII[name]
            parts.append(members if inside else f"[{members}]")
            at = found.end()
            continue
        length = 2 if pattern[at] == "\\" else 1
        if pattern[at] == "[":
            # A bracket inside brackets is a literal one; Python asks for it to be escaped.
            parts.append("\\[" if inside else "[")
            inside = True
        else:
            inside = inside and pattern[at] != "]"
            parts.append(pattern[at : at + length])
        at += length
    return re.compile("".join(parts), re.ASCII)
