"""What runs in a separate process, because an untrusted file can make it loop, exhaust the memory or abort.

Run by `sandbox.run`, as a script: a JSON object on standard input, another on standard output. Imports nothing of the
package, so that the process starts fast and its memory can be bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any


class Refused(Exception):
    """What a template raises through raise_exception."""


def render(template: str, variables: dict[str, Any], longest: int) -> str:
    """The text that `template` makes of `variables`, with the names that Hugging Face's templates count on."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise Refused(f"the template refuses: {message}")

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    parts, length = [], 0
    for part in environment.from_string(template).generate(variables):
        length += len(part)
        if length > longest:
            raise Refused(f"it makes a text of more than {longest} characters of this conversation")
        parts.append(part)
    return "".join(parts)


def read_tokenizer(path: str, added: list[dict[str, Any]], special: list[str]) -> dict[str, Any]:
    """The vocabulary of a tokenizer.json.

    `added` are tokens, as tokenizer_config.json declares them, that come to its own; `special` are texts of special
    tokens, added where no such token is there yet. Returns the ids of all texts, the number of tokens without added
    ones, and of each added token its id, whether it is special and normalized, and the text that it decodes to.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(path)
    # Those of sentence encoders bring texts to one length.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [AddedToken(t["content"], **{flag: bool(t[flag]) for flag in flags if flag in t}) for t in added]
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
    for text in special:
        if text not in known:
            known.add(text)
            tokens.append(AddedToken(text, special=True, normalized=False))
    for token in tokens:
        if token.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    rows = []
    for number, entry in tokenizer.get_added_tokens_decoder().items():
        shown = entry.content
        if not entry.normalized:
            # llama.cpp compares added tokens with the text after normalization.
            ids = tokenizer.encode(shown, add_special_tokens=False).ids
            shown = tokenizer.decode(ids, skip_special_tokens=False)
        rows.append([number, entry.special, shown])
    return {
        "ids": tokenizer.get_vocab(with_added_tokens=True),
        "n_base": tokenizer.get_vocab_size(with_added_tokens=False),
        "added": rows,
    }


TASKS: dict[str, Callable[..., Any]] = {"render": render, "read_tokenizer": read_tokenizer}


def main() -> None:
    """Read a request, write its result or its error."""
    os.environ.clear()
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    # Windows has no such limits; there the caller's timeout is the only one.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"result": TASKS[request["task"]](**request["arguments"])}
    except Refused as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
