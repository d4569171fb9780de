"""Limits of this process, lowered for a while."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """Let this process have no more of `what`, one of resource's RLIMIT_*, than `value`."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))
