"""The one exception that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterable


class QuantkitError(Exception):
    """A problem with the input or the machine, told in one line: what, where, and what to do.

    The command line prints the message and exits with 1; nothing else in the library is caught there.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The names in `known` closest to `name`, at most three, as "did you mean A or B?"; "" when none is close.

    Case and punctuation do not count: q4km is close to Q4_K_M.
    """
    from difflib import SequenceMatcher

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    scores = {each: SequenceMatcher(None, letters(name), letters(each)).ratio() for each in known}
    best = max(scores.values(), default=0.0)
    close = [each for each, score in scores.items() if score == best][:3]
    return f"did you mean {' or '.join(close)}?" if best >= 0.6 else ""
