"""The ways of rounding."""

from __future__ import annotations

from typing import Literal, get_args

from quantkit.errors import QuantkitError

Rounding = Literal["nearest", "gptq", "yaqa"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


def check_rounding(rounding: str) -> None:
    """Raise QuantkitError for an unknown rounding."""
    if rounding not in ROUNDINGS:
        raise QuantkitError(f"there is no rounding {rounding!r}: use {', '.join(ROUNDINGS[:-1])} or {ROUNDINGS[-1]}")
