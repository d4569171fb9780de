"""Write quantkit/vocabulary/unicode_classes.json: the category of every code point in Unicode 15.1.

The tokenizers that quantkit reproduces use this version. Run it where `unicodedata` has it (Python 3.13), or after
`pip install unicodedata2==15.1.0`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

VERSION = "15.1.0"
CONTROLS = ("Cc", "Cf", "Co", "Cs")  # and not those that are not assigned
TARGET = Path(__file__).resolve().parent.parent / "quantkit" / "vocabulary" / "unicode_classes.json"


def main() -> None:
    """Write the tables as runs. `runs` has the first code point in hexadecimal, then the class of all until the next.

    `lower` and `base` have the first and last code point, and what the first is in lower case, or what all begin with
    when they are decomposed (NFD): those of lower case follow each other as the run does.
    """
    if unicodedata.unidata_version != VERSION:
        raise SystemExit(f"unicodedata is version {unicodedata.unidata_version}, not {VERSION}")
    runs: list[str] = []
    last = ""
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))[0]
        name = category if category in "LMNPS" else "C" if unicodedata.category(chr(code)) in CONTROLS else "-"
        if name != last:
            runs.append(f"{code:x}{name}")
            last = name
    tables = {"runs": " ".join(runs), "lower": ranges(lower, 1), "base": ranges(base, 0)}
    TARGET.write_text(json.dumps({"unicode": VERSION, **tables}) + "\n")


def lower(character: str) -> str:
    """The simple lower case, one character."""
    return "i" if character == "\u0130" else character.lower()


def base(character: str) -> str:
    """What the character begins with when it is decomposed."""
    return unicodedata.normalize("NFD", character)[0]


def ranges(mapped: Callable[[str], str], step: int) -> str:
    """Runs of code points that `mapped` changes, to code points that are `step` apart."""
    found: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or (target := mapped(chr(code))) == chr(code):
            continue
        if found and found[-1][1] == code - 1 and found[-1][2] + step * (code - found[-1][0]) == ord(target):
            found[-1][1] = code
        else:
            found.append([code, code, ord(target)])
    return " ".join(f"{first:x}-{last:x}:{target:x}" for first, last, target in found)


if __name__ == "__main__":
    main()
