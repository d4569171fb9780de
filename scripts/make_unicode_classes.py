"""Write quantkit/vocabulary/unicode_classes.json: the category of every code point in Unicode 15.1.

The tokenizers that quantkit reproduces use this version. Run it where `unicodedata` has it (Python 3.13), or after
`pip install unicodedata2==15.1.0`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

VERSION = "15.1.0"
TARGET = Path(__file__).resolve().parent.parent / "quantkit" / "vocabulary" / "unicode_classes.json"


def main() -> None:
    """Write the table as runs: the first code point in hexadecimal, then the class of all until the next run."""
    if unicodedata.unidata_version != VERSION:
        raise SystemExit(f"unicodedata is version {unicodedata.unidata_version}, not {VERSION}")
    runs: list[str] = []
    last = ""
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))[0]
        name = category if category in "LMNPS" else "-"
        if name != last:
            runs.append(f"{code:x}{name}")
            last = name
    TARGET.write_text(json.dumps({"unicode": VERSION, "runs": " ".join(runs)}) + "\n")


if __name__ == "__main__":
    main()
