"""Chat templates: a conversation in the format that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata
from quantkit.vocabulary import sandbox
from quantkit.vocabulary.vocabulary import Vocabulary

KEY = "tokenizer.chat_template"
_MAX_TEMPLATE = 1 << 20
_MAX_TEXT = 1 << 22
_SECONDS = 10
_MEMORY = 384 << 20


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


def render(metadata: Metadata, messages: Sequence[Message]) -> str:
    """The text of `messages` in the model's own chat template, up to where its answer begins.

    The BOS token is left out where `Vocabulary.encode` adds one. The template runs in jinja2's sandbox, in a process
    with bounded time and memory. Raises QuantkitError when the model has no template, or it fails.
    """
    if KEY not in metadata:
        raise QuantkitError(f"the model has no chat template ({KEY}): give the prompt as plain text")
    template = metadata.string(KEY)
    if len(template) > _MAX_TEMPLATE:
        raise QuantkitError(f"{KEY} has {len(template)} characters, more than any template needs: {_MAX_TEMPLATE}")
    vocabulary = Vocabulary.from_metadata(metadata)
    bos, eos = (
        "" if token is None else vocabulary.tokens[token] for token in (vocabulary.bos, vocabulary.eos)
    )  # fmt: skip
    variables = {"messages": list(messages), "bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
    arguments = {"template": template, "variables": variables, "longest": _MAX_TEXT}
    text = str(sandbox.run("render", arguments, _SECONDS, _MEMORY, f"{KEY} cannot be applied"))
    return text.removeprefix(bos) if vocabulary.add_bos else text
