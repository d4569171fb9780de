"""Standard streams that take whatever is printed: closed ones, old encodings, readers that leave early."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress

# What messages and tables use beyond ASCII, for terminals and pipes that lack it.
_PLAIN = {
    "±": "+/-",
    "Δ": "delta ",
    "→": "->",
    "…": "...",
    "×": "x",
    "Σ": "sum",
    "μ": "mean ",
    "σ": "std",
    "²": "^2",
    "–": "-",
    "—": "-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_ERRORS = "quantkit.plain"


def prepare() -> None:
    """Open standard streams that are closed, and let those that are open degrade what their encoding lacks.

    With a closed descriptor 2, the next file opened would be what libraries print their errors to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_ERRORS, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        else:
            with suppress(AttributeError, ValueError):  # a stream that somebody put in place
                stream.reconfigure(errors=_ERRORS)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """The first character that an encoding lacks, in ASCII; undecodable bytes of file names as they were."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return _PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode(), error.start + 1


def flush() -> None:
    """Write out what was printed; exit with 1 when its reader has left. Raises OSError when it cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left would be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
