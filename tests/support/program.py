"""The command line run within the test's process: much quicker than a process of its own for each command."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from quantkit.cli.main import main

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def call(*args: object, code: int = 0) -> Ended:
    """Run `quantkit` with `args` here, and check its exit code; everything that it sets in the process is put back."""
    argv, hook, root = sys.argv, sys.unraisablehook, logging.getLogger()
    handlers, signals = root.handlers[:], {number: signal.getsignal(number) for number in SIGNALS}
    levels = {
        logger: logger.level for logger in (root, *map(logging.getLogger, ("quantkit", "quantkit.compile.kernel")))
    }
    sys.argv = ["quantkit", *map(str, args)]
    out, err = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        status: object = 0
    except SystemExit as ending:
        status = ending.code
    finally:
        sys.argv, sys.unraisablehook = argv, hook
        root.handlers[:] = handlers
        for logger, level in levels.items():
            logger.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
    ended = Ended(status if isinstance(status, int) else int(status is not None), out.getvalue(), err.getvalue())
    assert ended.returncode == code, ended.stderr
    return ended


def refusal(*args: object) -> str:
    """Run a command that must fail with exit code 1 and one line; returns the line."""
    lines = call(*args, code=1).stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    return lines[-1]


def listing(directory: Path) -> dict[str, bytes]:
    """Every file and directory under `directory`, with a file's bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
    }
