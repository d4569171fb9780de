"""What a SentencePiece model says of normalisation, which its library does not give: read off the protocol buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import MAX_JSON

# Numbers of fields in sentencepiece_model.proto.
_TRAINER, _NORMALIZER = 2, 3
_MODEL_TYPE = 3
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES = 2, 3, 4
_BPE = 2
# Kinds of fields: a whole number, eight bytes, bytes with their length, four bytes.
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Normalizer:
    """Whether a space is put in front of a text, whether spaces are merged, the table of replacements, and the kind."""

    adds_prefix: bool = True
    merges_spaces: bool = True
    charsmap: bytes = b""
    is_bpe: bool = False


def read_normalizer(path: Path) -> Normalizer:
    """What the SentencePiece model in `path` says. Raises QuantkitError for a file that is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise QuantkitError(f"{path}: larger than {MAX_JSON} bytes, the limit for such a file")
        fields = dict(_fields(path.read_bytes()))
        trainer = dict(_fields(_message(fields.get(_TRAINER, b""))))
        spec = dict(_fields(_message(fields.get(_NORMALIZER, b""))))
        return Normalizer(
            bool(spec.get(_DUMMY_PREFIX, 1)),
            bool(spec.get(_EXTRA_SPACES, 1)),
            _message(spec.get(_CHARSMAP, b"")),
            trainer.get(_MODEL_TYPE) == _BPE,
        )
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror or error}") from None
    except (ValueError, IndexError):
        raise QuantkitError(f"{path}: not a SentencePiece model") from None


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and the value of each field of a message; raises ValueError or IndexError for a damaged one."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == _VARINT:
            yield tag >> 3, varint()
            continue
        size = {_EIGHT: 8, _FOUR: 4}.get(kind)
        if size is None:
            if kind != _BYTES:
                raise ValueError
            size = varint()
        if size > len(data) - at:
            raise ValueError
        yield tag >> 3, data[at : at + size]
        at += size
