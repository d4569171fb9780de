"""The vocabulary of a GGUF file: text to token ids and back, exactly as llama.cpp does it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, ValueType
from quantkit.vocabulary import pretokenizers
from quantkit.vocabulary.attributes import Attribute, TokenType, attributes
from quantkit.vocabulary.encoders import (
    MAX_TOKEN_LENGTH,
    META_SPACE,
    BytePairEncoder,
    Encoder,
    SentencePieceEncoder,
    byte_alphabet,
)
from quantkit.vocabulary.rwkv import RwkvEncoder, bytes_of
from quantkit.vocabulary.unigram import UnigramEncoder
from quantkit.vocabulary.wordpiece import WordPieceEncoder

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_PREFIX = "tokenizer.ggml."
MAX_TOKENS = 1 << 22  # far more than any vocabulary has
# The keys of special tokens; the last three are older names.
_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
_OLDER_KEYS = {"fim_pre": "prefix_token_id", "fim_suf": "suffix_token_id", "fim_mid": "middle_token_id"}
# `tokenizer.ggml.model` of the vocabularies that are known.
MODELS = ("gpt2", "gemma4", "llama", "bert", "t5", "rwkv")
# The ids of special tokens that the kinds of vocabularies have where the metadata does not say.
_DEFAULT_IDS: dict[str, dict[str, int | None]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102},
    "t5": {"eos": 1, "unk": 2},
    "gpt2": {"eos": 11},
}
# Of these kinds, tokens write spaces by a stand-in, and bytes are no characters.
_WITH_SPACES = ("llama", "bert", "t5")
# Special tokens that may each be looked for in a text, and the characters by which more of them are sorted out first.
_MANY_SPECIAL = 1024
_BEGINNING = 8
_ASCII_SPACE = " \t\n\v\f\r"
_SPLIT_OUT = Attribute.USER_DEFINED | Attribute.CONTROL | Attribute.UNKNOWN
_HIDDEN = Attribute.CONTROL | Attribute.UNKNOWN


class Vocabulary:
    """A GGUF's vocabulary, made by `Vocabulary.from_metadata`.

    `tokens` holds the tokens' texts as the file has them, `bos`, `eos` and `eot` the ids of special tokens or None,
    `add_bos` and `add_eos` whether `encode` puts them around a text. Two vocabularies are equal when they encode
    and decode alike: same `fingerprint`.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Read the vocabulary. See `from_metadata`."""
        self.model = metadata.string(_PREFIX + "model")
        if self.model not in MODELS:
            raise QuantkitError(f"the tokenizer model {self.model!r} is not supported, only {', '.join(MODELS)}")
        is_spm, has_spaces = self.model == "llama", self.model in _WITH_SPACES
        self.pre = "gemma4" if self.model == "gemma4" else metadata.string(_PREFIX + "pre", "default")
        habits = pretokenizers.lookup("default" if has_spaces else self.pre or "default")
        self.tokens: list[str] = _read_tokens(metadata)
        self._ids = {text: token for token, text in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice = next(text for token, text in enumerate(self.tokens) if self._ids[text] != token)
            raise QuantkitError(f"{_PREFIX}tokens has the token {twice!r} twice")
        special = self._read_special(metadata, habits.default_bos)
        types = _read_array(metadata, "token_type", (ValueType.INT32,), len(self.tokens))
        name = metadata.string("general.name", "")
        self._attributes = attributes(self._ids, types, special, pre=self.pre, model_name=name)
        self.bos, self.eos, self.eot = special["bos"], special["eos"], special["eot"]
        self._escapes_spaces = has_spaces or habits.escape_spaces
        cleans = habits.clean_spaces and not has_spaces and self.model != "rwkv"
        self._cleans_spaces = self.model == "bert" or cleans
        self._space_prefix = metadata.flag(_PREFIX + "add_space_prefix", is_spm)
        adds_bos = self.model in ("llama", "bert") or (self.model != "t5" and habits.add_bos)
        self.add_bos = metadata.flag(_PREFIX + "add_bos_token", adds_bos)
        self.add_eos = metadata.flag(_PREFIX + "add_eos_token", self.model == "t5")
        adds_sep = self.model == "bert" or (not has_spaces and habits.add_sep)
        self._between = [
            special[role]
            for role, adds in (("eos", self.add_eos), ("sep", metadata.flag(_PREFIX + "add_sep_token", adds_sep)))
            if adds
        ]
        # WordPiece has its own two tokens around a text, whatever the flags say.
        around = (special["bos"], special["sep"]) if self.model == "bert" else (self.bos, self.eos)
        self._first, self._last = around
        self.add_bos = self.add_bos or habits.newlines_whole
        self._add_first, self._add_last = (True, True) if self.model == "bert" else (self.add_bos, self.add_eos)
        for role, wanted, token in (("BOS", self._add_first, around[0]), ("EOS", self._add_last, around[1])):
            if wanted and token is None:
                raise QuantkitError(f"the vocabulary adds {role} to every text but names no {role} token")
        split_out = np.flatnonzero(self._attributes & _SPLIT_OUT).tolist()
        self._special = sorted(split_out, key=lambda token: -len(self._bytes(token)))
        self._encoder = self._make_encoder(metadata, special["unk"], types)
        self._pieces: list[bytes | None] = [None] * len(self.tokens)
        self._fingerprint_parts = [
            (key, int(value.type), bytes(value.raw))
            for key, value in sorted(metadata.items())
            if key.startswith(_PREFIX) or key == "general.name"
        ]

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Vocabulary:
        """The vocabulary that `metadata` describes: `tokenizer.ggml.model` gpt2 or gemma4 (BPE), llama (SPM),
        bert (WordPiece), t5 (Unigram) or rwkv.

        Raises QuantkitError when keys are missing, of the wrong type or contradictory, or the model is another.
        """
        return cls(metadata)

    def _read_special(self, metadata: Metadata, default_bos: bool) -> dict[str, int | None]:
        special: dict[str, int | None] = dict.fromkeys(_SPECIAL_KEYS)
        special.update(_DEFAULT_IDS.get(self.model, {}))
        if self.model == "gpt2" and default_bos:
            special["bos"] = 11
        for role, key in (*_SPECIAL_KEYS.items(), *_OLDER_KEYS.items()):
            default = special[role]
            if default is not None and default >= len(self.tokens):
                special[role] = None
            if _PREFIX + key not in metadata:
                continue
            token = metadata.integer(_PREFIX + key)
            if token < len(self.tokens):
                special[role] = token
            elif role in ("bos", "eos"):
                raise QuantkitError(f"{_PREFIX}{key} is {token}, but there are only {len(self.tokens)} tokens")
            else:
                log.warning("%s%s is %d, but there are only %d tokens: ignored", _PREFIX, key, token, len(self.tokens))
        return special

    def _make_encoder(self, metadata: Metadata, unknown: int | None, types: Array | None) -> Encoder:
        if self.model == "rwkv":
            return RwkvEncoder(self.tokens)
        if self.model == "llama":
            return SentencePieceEncoder(self._ids, self._scores(metadata))
        if self.model in ("bert", "t5"):
            if unknown is None:
                raise QuantkitError("the vocabulary names no token for unknown words")
            if (longest := max(map(len, self.tokens))) > MAX_TOKEN_LENGTH:
                raise QuantkitError(f"a token has {longest} characters, more than {MAX_TOKEN_LENGTH}")
        if self.model == "bert":
            lowercase = metadata.flag(_PREFIX + "normalizer.lowercase", True)
            accents = metadata.flag(_PREFIX + "normalizer.strip_accents", lowercase)
            return WordPieceEncoder(self._ids, int(unknown or 0), lowercase, accents)
        if self.model == "t5":
            return self._make_unigram(metadata, int(unknown or 0), types)
        return BytePairEncoder(self._ids, metadata.strings(_PREFIX + "merges"), self.pre or "default")

    def _make_unigram(self, metadata: Metadata, unknown: int, types: Array | None) -> UnigramEncoder:
        scores = self._scores(metadata)
        kinds = np.full(len(self.tokens), TokenType.NORMAL) if types is None else types
        normal = scores[kinds == TokenType.NORMAL]
        found = np.isin(kinds, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED))
        own = self._attributes & Attribute.USER_DEFINED != 0
        charsmap = b""
        if (key := _PREFIX + "precompiled_charsmap") in metadata:
            charsmap = metadata.array(key, (ValueType.UINT8, ValueType.INT8)).tobytes()
        return UnigramEncoder(
            [
                (token, self._bytes(token), 0.0 if own[token] else float(scores[token]))
                for token in np.flatnonzero(found).tolist()
            ],
            [self._bytes(token) for token in np.flatnonzero(kinds == TokenType.USER_DEFINED).tolist()],
            unknown,
            float(normal.min(initial=np.inf)) if len(normal) else 0.0,
            charsmap,
            self._space_prefix,
            metadata.flag(_PREFIX + "remove_extra_whitespaces", False),
        )

    def _scores(self, metadata: Metadata) -> Array:
        """The scores of all tokens, float32. Raises QuantkitError for one that is no number."""
        scores = _read_array(metadata, "scores", (ValueType.FLOAT32, ValueType.INT32), len(self.tokens))
        if scores is None:
            scores = np.zeros(len(self.tokens), dtype=np.float32)
        if np.isnan(scores).any():
            raise QuantkitError(f"{_PREFIX}scores has a score that is not a number")
        return scores.astype(np.float32)

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """A digest of all that encoding and decoding depend on."""
        digest = hashlib.sha256()
        for key, kind, raw in self._fingerprint_parts:
            digest.update(f"{key}\0{kind}\0{len(raw)}\0".encode("utf-8", "surrogateescape"))
            digest.update(raw)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether both encode and decode alike."""
        return isinstance(other, Vocabulary) and self._fingerprint_parts == other._fingerprint_parts

    def __hash__(self) -> int:
        """Equal for equal vocabularies."""
        return hash(self.fingerprint)

    def is_control(self, token: int) -> bool:
        """Whether `token` is a control token, not text. Raises IndexError beyond the vocabulary."""
        return bool(self._attributes[token] & Attribute.CONTROL)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> Array:
        """The token ids of `text`: int32 of shape (n,).

        `add_special` puts BOS and EOS around them where the vocabulary asks for it. `parse_special` encodes the texts
        of control tokens as those tokens; without it they are ordinary text, but user-defined tokens are always
        found. Lone surrogates in `text` count as U+FFFD. Raises QuantkitError when the vocabulary cannot express it.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        parts: list[Array] = []
        if add_special and self._add_first:
            parts.append(np.array([self._first], dtype=np.int32))
        after_special = True
        for piece in self._partition(text, parse_special):
            if isinstance(piece, int):
                parts.append(np.array([piece], dtype=np.int32))
                after_special = True
                continue
            if self.model == "llama" and self._space_prefix and after_special:
                piece = " " + piece
            parts.append(self._encoder.encode(piece))
            after_special = False
        if add_special and self._add_last:
            parts.append(np.array([self._last], dtype=np.int32))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def encode_pair(self, first: str, second: str, parse_special: bool = False) -> Array:
        """The token ids of two texts that a model compares, with what the vocabulary puts around and between them.

        As llama-embedding separates them: EOS where the vocabulary adds it to texts, and SEP where it says so. Raises
        QuantkitError as `encode`, and where nothing would separate them.
        """
        between = [token for token in self._between if token is not None]
        if not between:
            raise QuantkitError("the vocabulary has nothing to put between two texts: it is not one of a reranker")
        ids = [self.encode(text, add_special=False, parse_special=parse_special) for text in (first, second)]
        before = [self._first] if self._add_first else []
        after = [self._last] if self._add_last else []
        return np.concatenate([np.array(part, np.int32) for part in (before, ids[0], between, ids[1], after)])

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Split special tokens out of `text`, the longest first."""
        pieces: list[str | int] = [text] if text else []
        for token in self._may_occur(text):
            attribute, wanted = self._attributes[token], self.tokens[token]
            if (attribute & _HIDDEN and not parse_special) or wanted not in text:
                continue
            split: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, int):
                    split.append(piece)
                else:
                    split += self._split_at(piece, token, wanted, int(attribute))
            pieces = split
        return pieces

    def _may_occur(self, text: str) -> list[int]:
        """The special tokens that `text` may hold: all, or where they are many, those whose beginning occurs in it."""
        if len(self._special) < _MANY_SPECIAL:
            return self._special
        begins = [{text[i : i + n] for i in range(len(text) - n + 1)} for n in range(_BEGINNING + 1)]
        return [t for t in self._special if self.tokens[t][:_BEGINNING] in begins[min(_BEGINNING, len(self.tokens[t]))]]

    @staticmethod
    def _split_at(piece: str, token: int, wanted: str, attribute: int) -> Iterable[str | int]:
        parts = piece.split(wanted)
        last = len(parts) - 1
        for i, part in enumerate(parts):
            if i > 0:
                yield token
                if attribute & Attribute.RSTRIP:
                    part = part.lstrip(_ASCII_SPACE)
            if i < last and attribute & Attribute.LSTRIP:
                part = part.rstrip(_ASCII_SPACE)
            if part:
                yield part

    def decode(self, ids: Sequence[int] | Array, special: bool = True) -> str:
        """The text of token ids; control tokens appear by name unless `special` is false.

        Bytes that do not form UTF-8 become U+FFFD. Raises IndexError for ids beyond the vocabulary.
        """
        pieces = []
        for i, token in enumerate(np.asarray(ids).tolist()):
            if not 0 <= token < len(self.tokens):
                raise IndexError(f"token {token} is not one of {len(self.tokens)}")
            piece = b"" if not special and self._attributes[token] & _HIDDEN else self.piece(token)
            if i == 0 and self._space_prefix and piece.startswith(b" "):
                piece = piece[1:]
            pieces.append(piece)
        data = b"".join(pieces)
        if self._cleans_spaces:
            data = re.sub(rb" (?=[?!.,])", b"", data)
            data = re.sub(rb" ' ", b"'", data)
            data = re.sub(rb" (?='(?:[sm]|re|ve))", b"", data)
        return data.decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self.tokens[token].encode("utf-8", "surrogateescape")

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for in a text. Raises IndexError beyond the vocabulary."""
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token)
        return piece

    def _make_piece(self, token: int) -> bytes:
        text, attribute = self.tokens[token], self._attributes[token]
        if attribute & _SPLIT_OUT:
            return self._bytes(token)
        if attribute & Attribute.NORMAL:
            if self.model == "rwkv":
                return bytes_of(text)
            if self._escapes_spaces:
                return self._bytes(token).replace(META_SPACE.encode(), b" ")
            return b"".join(_decode_character(character, text) for character in text)
        if attribute & Attribute.BYTE:
            found = re.match("[0-9a-fA-F]{1,2}", text[3:5])
            return bytes([int(found[0], 16) if found else 0])
        return b""


def _decode_character(character: str, text: str) -> bytes:
    byte = byte_alphabet().find(character)
    if byte >= 0:
        return bytes([byte])
    name = character.encode("utf-8", "surrogateescape").hex()
    return f"[UNK_BYTE_0x{name}{text}]".encode("utf-8", "surrogateescape")


def _read_tokens(metadata: Metadata) -> list[str]:
    tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(metadata.strings(_PREFIX + "tokens"))]
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise metadata.wrong(_PREFIX + "tokens", f"1 to {MAX_TOKENS} tokens")
    return tokens


def _read_array(metadata: Metadata, key: str, items: Sequence[ValueType], count: int) -> Array | None:
    if _PREFIX + key not in metadata:
        return None
    result: Array = metadata.array(_PREFIX + key, items)
    if len(result) < count:
        raise metadata.wrong(_PREFIX + key, f"one number for each of the {count} tokens")
    return result[:count]
