"""The tokenizer's files in a checkpoint directory, read with bounds and plain errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import MAX_JSON
from quantkit.vocabulary import sandbox

# Bounds of the process that reads tokenizer.json.
_SECONDS = 60
_MEMORY = 1 << 30
_MEMORY_PER_BYTE = 64

# Special tokens by role, in the order in which a checkpoint's tokenizer takes them up.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# A tokenizer class's defaults for what tokenizer_config.json does not say.
_CLASS_DEFAULTS = {
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "CodeLlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
    "GPT2Tokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "GPTNeoXTokenizer": {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"},
}


class AddedToken(NamedTuple):
    """A token beside the trained ones: its text, as it decodes, and whether it is special."""

    text: str
    special: bool


class TokenizerContents(NamedTuple):
    """What tokenizer.json says: the id of every text, the number of trained tokens, and the added ones by id."""

    ids: dict[str, int]
    n_base: int
    added: dict[int, AddedToken]


class CheckpointFiles:
    """The tokenizer files of one checkpoint, each read when first asked for.

    `config` holds the hyper-parameters, whose `vocab_size` counts. Raises QuantkitError for files that are not what
    they should be.
    """

    def __init__(self, directory: Path, config: dict[str, Any], family_tokens: Mapping[str, str] | None = None) -> None:
        """Remember where the files are, and the texts of the special tokens that the family knows, by their roles."""
        self.family_tokens = family_tokens or {}
        self.directory = directory
        self.config = config

    @property
    def vocab_size(self) -> int | None:
        """`vocab_size` of the model, or of its text part; None when config.json does not say."""
        text = self.config.get("text_config")
        size = text.get("vocab_size") if isinstance(text, dict) else None
        size = self.config.get("vocab_size") if size is None else size
        if size is not None and not (isinstance(size, int) and 0 < size < 1 << 24):
            raise QuantkitError(f"{self.directory / 'config.json'}: vocab_size is {size!r}")
        return size

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json as it stands, where the ids of special tokens are looked up; else the hyper-parameters."""
        found = self.read("config.json")
        return self.config if found is None else found

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """tokenizer.json, or None when there is none."""
        return self.read("tokenizer.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """tokenizer_config.json, or None when there is none."""
        return self.read("tokenizer_config.json")

    @property
    def model(self) -> dict[str, Any]:
        """The model of tokenizer.json, empty when there is none."""
        model = (self.tokenizer_json or {}).get("model")
        return model if isinstance(model, dict) else {}

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file that holds an object, or None when it does not exist."""
        path = self.directory / name
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > MAX_JSON:
                raise QuantkitError(f"{path}: larger than {MAX_JSON} bytes, the limit for such a file")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise QuantkitError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(data, dict):
            raise QuantkitError(f"{path}: does not hold a JSON object")
        return data

    def read_text(self, name: str) -> str | None:
        """A text file, or None when it does not exist."""
        path = self.directory / name
        if not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise QuantkitError(f"{path}: not readable: {error}") from None

    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens that the tokenizer declares, by role; further ones as "extra 0", ..."""
        config = self.tokenizer_config or {}
        declared = (self.read("special_tokens_map.json") or {}) | {k: v for k, v in config.items() if v is not None}
        kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        result: dict[str, str] = {}
        for role in ROLES:
            text = _content(declared.get(f"{role}_token")) or _CLASS_DEFAULTS.get(kind, {}).get(role)
            if text:
                result[role] = text
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = declared.get(key) or []
            for entry in more.values() if isinstance(more, dict) else more:
                text = _content(entry)
                if text:
                    result[f"extra {len(result)}"] = text
        return result

    def tokenizer(self) -> TokenizerContents:
        """The tokens of tokenizer.json, with what the other files add to its special tokens.

        tokenizer_config.json overrides the flags of added tokens, and a declared special token that tokenizer.json
        does not list as added becomes one (as transformers' fast tokenizers do). The library that reads the file can
        panic, abort or never return on a malicious file, so it runs in a separate process.
        """
        path = self.directory / "tokenizer.json"
        arguments = {
            "path": str(path.absolute()),
            "added": [entry for _, entry in sorted(self.declared_tokens.items())],
            "special": list(self.special_tokens().values()),
        }
        memory = _MEMORY + _MEMORY_PER_BYTE * path.stat().st_size
        found = sandbox.run("read_tokenizer", arguments, _SECONDS, memory, f"{path}: not a tokenizer that can be read")
        added = {token: AddedToken(text, special) for token, special, text in found["added"]}
        return TokenizerContents(found["ids"], int(found["n_base"]), added)

    @property
    def declared_tokens(self) -> dict[int, dict[str, Any]]:
        """The added tokens that tokenizer_config.json declares (`added_tokens_decoder`), by their ids."""
        entries = (self.tokenizer_config or {}).get("added_tokens_decoder") or {}
        try:
            result = {int(token): entry for token, entry in entries.items()}
            if all(isinstance(entry["content"], str) for entry in result.values()):
                return result
        except (AttributeError, TypeError, ValueError, KeyError):
            pass
        path = self.directory / "tokenizer_config.json"
        raise QuantkitError(f"{path}: added_tokens_decoder does not map token ids to tokens")

    @property
    def listed_tokens(self) -> dict[int, dict[str, Any]]:
        """The added tokens that tokenizer.json lists, by their ids."""
        listed = (self.tokenizer_json or {}).get("added_tokens") or []
        try:
            return {int(entry["id"]): entry for entry in listed if isinstance(entry["content"], str)}
        except (TypeError, KeyError, ValueError):
            raise QuantkitError(f"{self.directory / 'tokenizer.json'}: added_tokens is malformed") from None

    @property
    def has_sentencepiece(self) -> bool:
        """Whether there is a tokenizer.model."""
        return (self.directory / "tokenizer.model").is_file()

    @property
    def is_llama_hf(self) -> bool:
        """Whether tokenizer.json is a SentencePiece vocabulary: BPE with byte fallback."""
        decoder = (self.tokenizer_json or {}).get("decoder") or {}
        model = self.model
        return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"

    def refuse_more(self, needed: int, n_vocab: int) -> None:
        """Raise QuantkitError for a tokenizer that needs more than the `n_vocab` tokens that the model has."""
        if needed > n_vocab:
            raise QuantkitError(
                f"{self.directory}: the tokenizer has {needed} tokens, more than vocab_size in config.json, {n_vocab}"
            )


def _content(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
