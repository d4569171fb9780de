"""The exception whose messages are written for users."""

from __future__ import annotations

from quantkit.wording import printable

LONGEST_MESSAGE = 2000  # characters


class QuantkitError(Exception):
    """A problem with the input or the machine, told in one line: what, where, and what to do.

    The command line prints the message and exits with 1; nothing else in the library is caught there. The message is
    one printable line of bounded length, whatever the file held that it quotes. `option` names the keyword argument
    that would help (`force`, `allow_requantize`, `imatrix`, ...), where one would; the command line adds its own option
    of that name to the message, if the command has it.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        self.option = option
        line = printable(" ".join(message.split("\n")))
        super().__init__(line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 1] + "…")
