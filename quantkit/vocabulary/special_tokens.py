"""Special tokens, what is added to a text, merges and chat templates: what a GGUF holds beside its tokens.

They are gathered from tokenizer.json, tokenizer_config.json and config.json by the rules of the reference converter
(`SpecialVocab` of the gguf package in llama.cpp, which is newer than the package on PyPI).
"""

from __future__ import annotations

import logging
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.vocabulary.checkpoint_files import ROLES, CheckpointFiles

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)

# The keys of the roles that a GGUF has keys for.
_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
_ADD_KEYS = {role: f"tokenizer.ggml.add_{role}_token" for role in ("bos", "eos", "sep")}


class SpecialTokens:
    """What the files of a checkpoint say besides the tokens themselves.

    `ids` maps roles to token ids, `adds` roles to whether the tokenizer puts that token around a text.
    `n_vocab`, where given, drops ids that are out of range.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        merges: bool = False,
        roles: Iterable[str] = ROLES,
        n_vocab: int | None = None,
    ) -> None:
        """Gather everything. Raises QuantkitError for malformed files."""
        self.ids: dict[str, int] = {}
        self.adds: dict[str, bool] = {}
        self.merges: list[str] = []
        self.chat_template: Any = None
        self._lowercase: bool | None = None
        self._strip_accents: bool | None = None
        self._files = files
        self._n_vocab = n_vocab
        self._roles = list(roles)
        try:
            self._gather(merges)
        except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
            raise QuantkitError(
                f"{files.directory}: the tokenizer's files are malformed ({type(error).__name__}: {error})"
            ) from None

    def _gather(self, merges: bool) -> None:
        tokenizer = self._files.tokenizer_json
        config = dict(self._files.tokenizer_config or {})
        if tokenizer is not None:
            if merges:
                self.merges = _merges(tokenizer.get("model", {}).get("merges"))
            if tokenizer.get("normalizer"):
                self._read_normalizer(tokenizer["normalizer"])
            self._read_post_processor(tokenizer.get("post_processor"), config)
        if config:
            self.chat_template = self._find_chat_template(config)
            self._read_tokenizer_config(config, (tokenizer or {}).get("added_tokens") or [])
        hyper_parameters = self._files.config_json
        for role in self._roles:
            token = hyper_parameters.get(f"{role}_token_id")
            if token is None:
                token = (hyper_parameters.get("text_config") or {}).get(f"{role}_token_id")
            self.set(role, token)
        if merges and not self.merges:
            self.merges = _merges_of_text(self._files.read_text("merges.txt") or "")

    def set(self, role: str, token: Any) -> None:
        """Give `role` the id `token`, unless it has one already or `token` is no usable id."""
        if not isinstance(token, int):
            return
        if token < 0:
            raise QuantkitError(f"{self._files.directory}: the {role} token has the id {token}")
        if self._n_vocab is not None and token >= self._n_vocab:
            log.warning("the %s token %d is beyond the vocabulary of %d: ignored", role, token, self._n_vocab)
            return
        self.ids.setdefault(role, token)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to `writer`, in the reference's order."""
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.ids.items():
            if role in _ID_KEYS:
                writer.add_uint32(_ID_KEYS[role], token)
        for role, value in self.adds.items():
            if role in _ADD_KEYS:
                writer.add_bool(_ADD_KEYS[role], value)
        if self.chat_template is not None:
            self._write_chat_template(writer)
        if self._lowercase is not None:
            writer.add_bool("tokenizer.ggml.normalizer.lowercase", self._lowercase)
        if self._strip_accents is not None:
            writer.add_bool("tokenizer.ggml.normalizer.strip_accents", self._strip_accents)

    def _write_chat_template(self, writer: gguf.GGUFWriter) -> None:
        if isinstance(self.chat_template, str):
            writer.add_string("tokenizer.chat_template", self.chat_template)
            return
        allowed = string.ascii_letters + string.digits
        default, names = None, set()
        for choice in self.chat_template:
            name = "".join(c if c in allowed else "_" for c in choice.get("name", ""))
            template = choice.get("template")
            if not name or template is None:
                continue
            if name == "default":
                default = template
            else:
                names.add(name)
                writer.add_string(f"tokenizer.chat_template.{name}", template)
        if names:
            # The reference writes them in the order of a set, which changes from run to run.
            writer.add_array("tokenizer.chat_templates", sorted(names))
        if default is not None:
            writer.add_string("tokenizer.chat_template", default)

    def _read_normalizer(self, normalizer: dict[str, Any]) -> None:
        kind = normalizer.get("type")
        if kind == "Lowercase":
            self._lowercase = True
        elif kind == "StripAccents":
            self._strip_accents = True
        elif kind == "BertNormalizer":
            self._lowercase = normalizer.get("lowercase", self._lowercase)
            self._strip_accents = normalizer.get("strip_accents", self._strip_accents)
        elif kind == "Sequence":
            for part in normalizer.get("normalizers", []):
                self._read_normalizer(part)

    def _read_post_processor(self, post_processor: Any, config: dict[str, Any]) -> None:
        """Learn what is added to a text; may complete `config`, where there is one."""
        for role, stand_in in (("bos", "cls"), ("eos", "sep")):
            if not config.get(f"{role}_token") and config.get(f"{stand_in}_token"):
                config[f"{role}_token"] = config[f"{stand_in}_token"]
        if not post_processor:
            return
        texts = {role: config.get(f"{role}_token") for role in ("bos", "eos", "sep", "cls")}
        for processor in post_processor.get("processors", [post_processor]):
            kind = processor.get("type")
            if kind == "ByteLevel":
                self.adds.setdefault("bos", False)
                self.adds.setdefault("eos", False)
            elif kind == "RobertaProcessing":
                self.adds |= {"bos": True, "eos": True, "sep": True}
                for role, other in (("cls", "bos"), ("sep", "eos")):
                    if not texts[role] and config:
                        texts[role] = config[f"{role}_token"] = processor.get(role, [texts[other]])[0]
            elif kind == "TemplateProcessing":
                self._read_template(processor, texts, config)

    def _read_template(self, processor: dict[str, Any], texts: dict[str, Any], config: dict[str, Any]) -> None:
        single, pair = processor.get("single", []), processor.get("pair", [])
        first = last = None
        if len(single) > 1:
            first, last = _special(single[0]), _special(single[-1])
            if first:
                self._read_first(first, texts, config)
            if last:
                self._read_last(last, texts, config)
        if not pair:
            return
        start = 1 if first and _special(pair[0]) == first else 0
        stop = len(pair) - 1 if last and _special(pair[-1]) == last else len(pair)
        pair = pair[start:stop]
        if not pair or _sequence(pair[0]) != "A" or _sequence(pair[-1]) != "B" or len(pair) < 3:
            return
        between = pair[1:-1]
        enders = (texts["sep"], texts["eos"])
        adds_separator = bool(_special(between[0]) and _special(between[0]) in enders and not last)
        if len(between) == 2 and _special(between[1]) and _special(between[1]) in enders:
            adds_separator = True
        self.adds["sep"] = adds_separator
        if adds_separator and not texts["sep"] and config:
            config["sep_token"] = texts["eos"]

    def _read_first(self, first: str, texts: dict[str, Any], config: dict[str, Any]) -> None:
        if not config:
            texts["bos"] = first
        elif first not in (texts["bos"], texts["cls"]):
            for role in ("bos", "cls"):
                if not texts[role]:
                    texts[role] = config[f"{role}_token"] = first
        self.adds["bos"] = first in (texts["bos"], texts["cls"])

    def _read_last(self, last: str, texts: dict[str, Any], config: dict[str, Any]) -> None:
        if not config:
            texts["eos"] = last
        elif last != texts["eos"]:
            # The token that ended a text so far then ends a turn.
            role = next((role for role in ("eot", "eom") if role not in self._roles), None)
            if role:
                self._roles.append(role)
                config[f"{role}_token"] = texts["eos"]
            texts["eos"] = config["eos_token"] = last
        self.adds["eos"] = last == texts["eos"]

    def _find_chat_template(self, config: dict[str, Any]) -> Any:
        alternative: Any = self._files.read_text("chat_template.jinja")
        if alternative is not None:
            more = sorted((self._files.directory / "additional_chat_templates").glob("*.jinja"))
            if more:
                alternative = [{"name": "default", "template": alternative}]
                for path in more:
                    text = self._files.read_text(f"additional_chat_templates/{path.name}")
                    alternative.append({"name": path.stem, "template": text})
        else:
            alternative = (self._files.read("chat_template.json") or {}).get("chat_template")
        template = config.get("chat_template", alternative)
        if template is None or isinstance(template, (str, list)):
            return template
        log.warning("%s: chat_template is neither text nor a list: ignored", self._files.directory)
        return None

    def _read_tokenizer_config(self, config: dict[str, Any], added: list[dict[str, Any]]) -> None:
        for role in self._roles:
            adds = config.get(f"add_{role}_token")
            if isinstance(adds, bool) and self.adds.setdefault(role, adds) != adds:
                log.warning("add_%s_token is %s in tokenizer_config.json but not in tokenizer.json", role, adds)
            text = config.get(f"{role}_token")
            if isinstance(text, dict):
                text = text.get("content")
            if isinstance(text, str):
                self.set(role, next((token.get("id") for token in added if token.get("content") == text), None))


def _special(part: dict[str, Any]) -> str | None:
    text = part.get("SpecialToken", {}).get("id")
    return text if isinstance(text, str) else None


def _sequence(part: dict[str, Any]) -> str | None:
    text = part.get("Sequence", {}).get("id")
    return text if isinstance(text, str) else None


def _merges(merges: Any) -> list[str]:
    """Merges as "left right"; a space inside a half becomes the character that stands for it in GPT-2's alphabet."""
    if not isinstance(merges, list) or not merges:
        return []
    if all(isinstance(merge, str) for merge in merges):
        return merges
    if all(isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) for merge in merges):
        return [f"{left} {right}" if " " not in left + right else _escaped(left, right) for left, right in merges]
    raise ValueError("merges are neither strings nor pairs")


def _escaped(left: str, right: str) -> str:
    return " ".join(half.replace(" ", chr(ord(" ") + 256)) for half in (left, right))


def _merges_of_text(text: str) -> list[str]:
    """The merges of merges.txt: two symbols a line, after an optional line that starts with #."""
    lines = text.split("\n")
    if lines and lines[0].strip().startswith("#"):
        lines = lines[1:]
    pairs = (line.split(None, 3) for line in lines)
    return [f"{parts[0]} {parts[1]}" for parts in pairs if len(parts) == 2]


def looks_special(token: str) -> bool:
    """Whether an added token is a control token by its text, whatever the checkpoint says."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )
