"""Standard streams that accept whatever is printed, be they closed, of an old encoding, or without a reader."""

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
    """Open standard streams that are closed; in those that are open, replace characters that their encoding lacks.

    If descriptor 2 were closed, the next file opened would get it, and libraries would print their errors into it.
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
            with suppress(AttributeError, ValueError):  # a replaced stream
                stream.reconfigure(errors=_ERRORS)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a character that an encoding lacks in ASCII, and undecodable bytes of a file name as they were."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return _PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode(), error.start + 1


def flush() -> None:
    """Flush stdout; exit with 1 when its reader has closed it. Raises OSError when it cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would try to write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
