"""Render a chat template in a process of its own: a template from a stranger can loop or grow without end.

Run by `chat.render`, as a script: a JSON object on standard input, another on standard output. Imports nothing of the
package, so that the process starts fast and its memory can be bounded.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

MEMORY = 1 << 30


class Refused(Exception):
    """What a template raises through raise_exception."""


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that `template` makes of `variables`, with the names that Hugging Face's templates count on."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise Refused(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render(variables)


def main() -> None:
    """Read a request, write its text or its error."""
    request = json.load(sys.stdin)
    # Windows has no such limits; there the caller's patience is the only bound.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except Refused as error:
        answer = {"error": f"the template refuses: {error}"}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
