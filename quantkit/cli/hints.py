"""Which option of a command would help with an error: the library does not know the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.errors import QuantkitError

# QuantkitError.option -> what is added to the message if the command has an option of that name.
HINTS = {
    "allow_nonfinite": "{option} continues anyway",
    "allow_requantize": "{option} does it anyway",
    "force": "{option} replaces it",
    "threads": "use fewer {option}",
    "pre": "{option} NAME overrides it",
    "base": "name it with {option}",
    "lora": "{option} converts it",
    "resume": "{option} goes on with it",
    "calibration": "name one with {option}",
    "imatrix": "make one with `quantkit imatrix` and pass it with {option}",
}

_params: Sequence[Any] = ()


def running(params: Sequence[Any]) -> None:
    """Remember the parameters of the running command."""
    global _params
    _params = params


def hinted(problem: QuantkitError) -> str:
    """The message of `problem`, and the option of the running command that would help, if there is one."""
    params, hint = [param for param in _params if param.name == problem.option], HINTS.get(problem.option or "")
    return f"{problem}; {hint.format(option=params[0].opts[0])}" if hint and params else str(problem)
