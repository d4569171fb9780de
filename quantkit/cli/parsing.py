"""Values of options as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Value, ValueType
from quantkit.pipeline.options import Override
from quantkit.pipeline.plan import MAX_TEXT


def parse_override(text: str) -> Override:
    """A metadata override "KEY=TYPE:VALUE", TYPE one of int, float, bool, str, as llama-quantize stores it."""
    key, _, value = text.partition("=")
    kind, colon, value = value.partition(":")
    if not key or not colon:
        raise QuantkitError(f"malformed override {text!r}: write KEY=TYPE:VALUE, TYPE one of int, float, bool, str")
    try:
        if kind == "int":
            return key, ValueType.UINT32, abs(int(value)) & 0xFFFFFFFF
        if kind == "float":
            number = float(value)
            Value.of(ValueType.FLOAT32, number)
            return key, ValueType.FLOAT32, number
        if kind == "bool":
            return key, ValueType.BOOL, {"true": True, "false": False}[value]
    except (ValueError, KeyError):
        raise QuantkitError(f"override {text!r}: {value!r} is not {'an' if kind == 'int' else 'a'} {kind}") from None
    if kind != "str":
        raise QuantkitError(f"override {text!r}: unknown type {kind!r}; use int, float, bool or str")
    if len(value.encode()) > MAX_TEXT:
        raise QuantkitError(f"override {key!r}: a string may have {MAX_TEXT} bytes at most")
    return key, ValueType.STRING, value


def parse_scaled(text: str) -> tuple[str, float]:
    """A name and a number, 1 where none follows the last colon."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def parse_tensor_types(items: Iterable[str]) -> list[tuple[str, GGMLType]]:
    """Per-tensor types "REGEX=TYPE", as --tensor-type takes them; expressions are made lower case."""
    pairs = []
    for item in items:
        pattern, equals, kind = item.partition("=")
        if not pattern or not equals or not kind:
            raise QuantkitError(f"malformed tensor type {item!r}: write REGEX=TYPE, such as attn_v=q6_k")
        pairs.append((pattern.lower(), GGMLType.parse(kind)))
    return pairs


def parse_size(text: str) -> int:
    """A size such as 500M, 2G or 5.2GB (powers of 1000), 8GiB (powers of 1024), or plain bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMGT]?)(I?B)?", text.strip().upper())
    size = 0.0 if match is None else float(match[1])
    if match is None or not size or (not match[2] and match[3] == "IB"):
        raise QuantkitError(f"not a size: {text!r}; write 500M, 2G or 8GiB")
    return int(size * (1024 if match[3] == "IB" else 1000) ** " KMGT".index(match[2] or " "))


def parse_memory(text: str | None) -> int | None:
    """A size of memory, None where none is given."""
    return None if text is None else parse_size(text)


def parse_layers(text: str) -> list[int]:
    """Layer numbers, as --prune-layers takes them: "3,4,7"."""
    try:
        layers = [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        layers = [-1]
    if not layers or any(layer < 0 for layer in layers):
        raise QuantkitError(f"not a list of layers: {text!r}; write numbers with commas")
    return layers
