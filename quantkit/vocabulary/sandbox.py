"""Work on an untrusted file in a separate process, with bounded time and memory and no environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.vocabulary import _sandbox

# What an interpreter may need to start; the process forgets them before it does anything.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def run(task: str, arguments: dict[str, Any], seconds: int, memory: int, what: str) -> Any:
    """Run `task` of `_sandbox` on `arguments`, within `seconds` and `memory` bytes, and return its result.

    Raises QuantkitError, which begins with `what`, when it fails, and when the process ends by itself.
    """
    request = {"task": task, "arguments": arguments, "seconds": seconds, "memory": memory, "path": sys.path}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(_sandbox.__file__))],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=3 * seconds,
            check=False,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
    except subprocess.TimeoutExpired:
        raise QuantkitError(f"{what}: it takes more than {seconds} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise QuantkitError(f"{what}: it takes too long or too much memory, or is damaged") from None
    if "error" in answer:
        raise QuantkitError(f"{what}: {' '.join(str(answer['error']).split())[:300]}")
    return answer["result"]
