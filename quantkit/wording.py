"""How messages say things: sizes, counts, and suggestions for mistyped names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters but tab and newline, marks that turn the direction of writing, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with characters that could control a terminal escaped (`\x1b`); tabs and newlines stay.

    Names in an untrusted file can hold such characters. A byte of a file's name that is not UTF-8 is shown as `\xe9`.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1].replace(r"\udc", r"\x"), text)


def size_text(nbytes: float) -> str:
    """Format a number of bytes in powers of 1000: `512 bytes`, `3.4 kB`, `6.9 MB`, `4.92 GB`."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"


def count_text(count: int, noun: str) -> str:
    """Format a number of things: `1 shard`, `1,024 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the names in `known` closest to `name`, at most three, as "did you mean A or B?"; "" when none is close.

    Case and punctuation do not count: q4km is close to Q4_K_M.
    """
    from difflib import SequenceMatcher

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    scores = {each: SequenceMatcher(None, letters(name), letters(each)).ratio() for each in known}
    best = max(scores.values(), default=0.0)
    close = [each for each, score in scores.items() if score == best][:3]
    return f"did you mean {' or '.join(close)}?" if best >= 0.6 else ""
