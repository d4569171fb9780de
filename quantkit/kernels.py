"""Compiled functions: how every kernel of quantkit is compiled, kept, and told of."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

log = logging.getLogger(__name__)

# IEEE float32 as written: no reassociation, no fused multiply-add, no traps.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
_BLOCKS = Path(__file__).parent / "blocks"


@functools.cache
def source_digest(directory: Path) -> str:
    """A digest of the source files in `directory`."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` when it is first called, and keep the machine code on disk for the next run.

    Kernels hold no lock, so threads run them side by side.
    """
    try:
        compiled: Callable[..., Any] = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache directory can be written
        compiled = njit(**_OPTIONS)(function)
    else:
        # numba takes machine code for valid while the kernel's own file is unchanged; but pieces of other files are
        # inlined into it, of its own folder and of the blocks.
        file = compiled._cache._cache_file  # type: ignore[attr-defined]
        file._source_stamp = (
            file._source_stamp,
            source_digest(Path(function.__code__.co_filename).parent),
            source_digest(_BLOCKS),
        )
    return compiled


# A piece of a kernel: always inlined, so that the constants it is given are constants to the optimiser.
piece: Callable[..., Any] = njit(forceinline=True, **_OPTIONS)


class _Announcer(event.Listener):  # type: ignore[misc]
    """Says once that kernels are being compiled: the first run on a machine takes some seconds longer."""

    said = False

    def on_start(self, event: Any) -> None:
        if not _Announcer.said:
            _Announcer.said = True
            log.info("Compiling kernels for this machine; later runs skip this.")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Announcer())
