"""The YAML in front of a model card, which strangers write: what a parser would not survive is refused before."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import QuantkitError

MAX_BYTES = 1 << 18
_MAX_ALIASES = 16
_MAX_DEPTH = 100


def refuse_bombs(card: Path) -> None:
    """Refuse the model card `card`, if it is there, as `refuse_bombs_in` does."""
    if card.is_file():
        with open(card, "rb") as file:
            refuse_bombs_in(file.read(MAX_BYTES + 8), str(card))


def refuse_bombs_in(start: bytes, label: str) -> None:
    """Refuse front matter that is huge, nests deeply, or has many aliases, which expand without limit.

    `start` is the beginning of a card: all of it, or more than MAX_BYTES. Raises QuantkitError.
    """
    import yaml  # type: ignore[import-untyped]

    if not start.startswith(b"---"):
        return
    front, end, _ = start[3:].partition(b"\n---")
    if len(front) > MAX_BYTES or (not end and len(start) > MAX_BYTES):
        raise QuantkitError(f"{label}: front matter of more than {MAX_BYTES} bytes")
    opening = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
    aliases = depth = 0
    try:
        for token in yaml.scan(front):
            aliases += isinstance(token, yaml.AliasToken)
            depth += isinstance(token, opening) - isinstance(token, closing)
            # The scanner looks at every open bracket again for each token.
            if depth > _MAX_DEPTH:
                raise QuantkitError(f"{label}: brackets within more than {_MAX_DEPTH} others in its front matter")
    except (yaml.YAMLError, RecursionError):
        return  # the parser will report it
    if aliases > _MAX_ALIASES:
        raise QuantkitError(f"{label}: {aliases} aliases in its front matter, and {_MAX_ALIASES} are the most")
