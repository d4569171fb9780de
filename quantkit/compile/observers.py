"""Observers of compilation, such as progress bars."""

from __future__ import annotations

from collections.abc import Callable

# Called with a kernel's name when its compilation begins, and with "" when it ends, in the thread that compiles.
observers: list[Callable[[str], None]] = []


def kernel_name(function: Callable[..., object]) -> str:
    """A kernel's readable name: its class and function, such as Q6_K.encode, or its module and function."""
    name = function.__qualname__
    return name if "." in name else f"{function.__module__.rpartition('.')[2]}.{name.lstrip('_')}"


def tell(name: str) -> None:
    """Tell all observers."""
    for observer in list(observers):
        observer(name)
