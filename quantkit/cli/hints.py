"""Which option of a command would help with an error: the library does not know the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.errors import QuantkitError

# QuantkitError.option -> how the message goes on where the command has an option of that name.
HINTS = {
    "allow_nonfinite": "{option} goes on regardless",
    "allow_requantize": "{option} does it all the same",
    "force": "{option} replaces it",
    "imatrix": "make one with `quantkit imatrix` and pass it with {option}",
}

_params: Sequence[Any] = ()


def running(params: Sequence[Any]) -> None:
    """Note the parameters of the command that runs."""
    global _params
    _params = params


def hinted(problem: QuantkitError) -> str:
    """The message of `problem`, and the option of the command that runs that would help, if it has one."""
    params, hint = [param for param in _params if param.name == problem.option], HINTS.get(problem.option or "")
    return f"{problem}; {hint.format(option=params[0].opts[0])}" if hint and params else str(problem)
