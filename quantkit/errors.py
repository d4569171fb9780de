"""The one exception that a user is meant to read."""

from __future__ import annotations


class QuantkitError(Exception):
    """A problem with the input or the machine, told in one line: what, where, and what to do.

    The command line prints the message and exits with 1; nothing else in the library is caught there.
    """
