r"""Which of llama.cpp's pre-tokenizers a tokenizer.json describes.

The reference converter encodes one text and looks a hash of the ids up in a list of known vocabularies, so it
rejects every custom vocabulary. Here the definition decides: what tokenizer.json does to a text before it
merges, reduced to a list of steps, is looked up in DEFINITIONS. Where several names share a definition, the one
whose habits agree with the rest of the tokenizer is taken.

A step is one of
    split REGEX      every match is a word, and so is what lies between
    bytes            GPT-2's expression (the regex of ByteLevel)
    digit            every digit alone
    digits           every run of digits
    punctuation      every run of punctuation
    spaces           a space ends the word that it follows
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.vocabulary import pretokenizers

log = logging.getLogger(__name__)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES
_CJK = "split [\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_TO_HANGUL = "split [\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK_LLM = pretokenizers.PRETOKENIZERS["deepseek-llm"].patterns


def _cased(tail: str, digits: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"split {lead}{_UPPER}*{_LOWER}+{tail}|{lead}{_UPPER}+{_LOWER}*{tail}|{digits}|{_SLASH_TAIL}"


_LLAMA3 = f"split {_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = f"split {_CONTRACTIONS}|{_WORD}|\\p{{N}}|{_TAIL}"
_BLOOM = "split  ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


@dataclass(frozen=True)
class Definition:
    """A list of steps, the normalizers that may come before them, and the names that stand for it, best first."""

    steps: tuple[str, ...]
    names: tuple[str, ...]
    normalizers: tuple[str, ...] = ("", "NFC")


DEFINITIONS = (
    Definition((_LLAMA3,), ("llama-bpe", "dbrx", "glm4")),
    Definition((_QWEN2,), ("qwen2", "deepseek-r1-qwen")),
    Definition(
        (
            f"split {_CONTRACTIONS}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
        ),
        ("qwen35",),
    ),
    Definition(("bytes",), ("gpt-2",), ("",)),
    Definition(("bytes",), ("olmo",), ("NFC",)),
    Definition(("digit", "bytes"), ("starcoder", "smollm"), ("",)),
    Definition(("digit", "bytes"), ("command-r",), ("NFC",)),
    Definition((_cased("", r"\p{N}"),), ("tekken",)),
    Definition((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),), ("gpt-4o", "granite-embed-multi-97m")),
    Definition(
        (r"split \d{1,3}(?=(?:\d{3})*\b)", _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
        ("tiny_aya",),
    ),
    Definition(
        (r"split [\r\n]", *(f"split {p}" for p in _DEEPSEEK_LLM[1:3]), r"split \s+$", _HAN_TO_HANGUL, "digit"),
        ("deepseek-llm",),
    ),
    Definition(
        (r"split [\r\n]", r"split \s?\p{L}+", r"split \s?\p{P}+", _HAN_TO_HANGUL, "digit"),
        ("deepseek-coder",),
    ),
    Definition(
        (r"split \p{N}{1,3}", _CJK, rf"split {_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"),
        ("deepseek-v3",),
    ),
    Definition(
        (
            r"split \p{N}{1,3}",
            _CJK,
            rf"split {_PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
            r"split \p{N}",
        ),
        ("spark2_5",),
    ),
    Definition(("punctuation", "bytes", "digits", "split [0-9][0-9][0-9]"), ("falcon",)),
    Definition((_BLOOM,), ("bloom", "poro-chat")),
    Definition((_BLOOM, "digit"), ("viking",)),
    Definition(
        (rf"split '(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}",),
        ("bailingmoe2",),
    ),
    Definition(
        (rf"split {_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",),
        ("seed-coder",),
    ),
    Definition((rf"split {_WORD}|\p{{N}}|{_TAIL}",), ("ufakzeka",)),
    Definition(
        (
            rf"split {_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        ),
        ("exaone-moe",),
    ),
    Definition(
        (r"split \p{N}{1,3}", rf"split {_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_TAIL}"),
        ("minicpm5",),
    ),
    Definition((r"split \p{N}+", r"split (?=(\d{3})+(?!\d))"), ("superbpe",)),
    Definition(("spaces",), ("gemma4",), ("space to \u2581",)),
)


# Tokens that distinguish vocabularies with the same definition: if the token is there, the name takes precedence.
MARKS = {"deepseek-r1-qwen": "<｜begin▁of▁sentence｜>"}


def recognise(tokenizer: dict[str, Any], *, adds_bos: bool | None = None, cleans_spaces: bool | None = None) -> str:
    """The name for `tokenizer.ggml.pre` of a tokenizer.json.

    `adds_bos` is None when the GGUF will not say whether BOS is added, so that the name decides it; `cleans_spaces`
    is clean_up_tokenization_spaces, if the checkpoint has it. Raises QuantkitError, showing what was seen, when the
    definition is not known.
    """
    normalizer = _normalizer(tokenizer.get("normalizer"))
    steps = _steps(tokenizer.get("pre_tokenizer"))
    for definition in DEFINITIONS:
        if normalizer in definition.normalizers and steps in (definition.steps, _digits_as_split(definition.steps)):
            return _best(definition.names, tokenizer, adds_bos, cleans_spaces)
    seen = {"normalizer": tokenizer.get("normalizer"), "pre_tokenizer": tokenizer.get("pre_tokenizer")}
    raise QuantkitError(
        "the pre-tokenizer of tokenizer.json is not known to llama.cpp by its definition: "
        f"{json.dumps(seen, ensure_ascii=False)}",
        option="pre",
    )


def _best(names: tuple[str, ...], tokenizer: dict[str, Any], adds_bos: bool | None, cleans: bool | None) -> str:
    ignore_merges = bool((tokenizer.get("model") or {}).get("ignore_merges", False))

    def mismatches(name: str) -> tuple[bool, bool, bool]:
        habits = pretokenizers.lookup(name)
        return (
            habits.ignore_merges != ignore_merges,
            adds_bos is None and habits.add_bos,
            cleans is not None and habits.clean_spaces != cleans,
        )

    added = {token.get("content") for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict)}
    possible = [name for name in names if name not in MARKS or MARKS[name] in added]
    name = min(sorted(possible, key=lambda name: name not in MARKS), key=mismatches)
    if mismatches(name)[0]:
        log.warning("tokenizer.json has ignore_merges %s, but llama.cpp's %s has not", ignore_merges, name)
    return name


def _normalizer(normalizer: Any) -> str:
    """A short name of the normalizer: "" for none, "NFC", "space to ▁", or its JSON."""
    while isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers") or []
        if len(parts) > 1:
            break
        normalizer = parts[0] if parts else None
    if not normalizer:
        return ""
    if normalizer.get("type") == "NFC":
        return "NFC"
    if normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
        return "space to \u2581"
    return json.dumps(normalizer, sort_keys=True)


def _steps(pre_tokenizer: Any) -> tuple[str, ...]:
    if not isinstance(pre_tokenizer, dict):
        return ()
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers")
        return tuple(step for part in parts for step in _steps(part)) if isinstance(parts, list) else ()
    return _step(pre_tokenizer)


def _step(part: dict[str, Any]) -> tuple[str, ...]:
    kind, behavior = part.get("type"), part.get("behavior")
    pattern = part.get("pattern") or {}
    if kind == "Split" and isinstance(pattern, dict):
        isolated = (behavior, bool(part.get("invert"))) in (("Isolated", False), ("Removed", True))
        if isolated and isinstance(pattern.get("Regex"), str):
            return (f"split {canonical_regex(pattern['Regex'])}",)
        if pattern.get("String") == " " and behavior == "MergedWithPrevious" and not part.get("invert"):
            return ("spaces",)
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return ("bytes",) if part.get("use_regex", True) else ()
    if kind == "Digits":
        return ("digit",) if part.get("individual_digits") else ("digits",)
    if kind == "Punctuation" and behavior == "Contiguous":
        return ("punctuation",)
    return (json.dumps(part, sort_keys=True),)


def _digits_as_split(steps: tuple[str, ...]) -> tuple[str, ...]:
    return tuple({"digit": r"split \p{N}", "digits": r"split \p{N}+"}.get(step, step) for step in steps)


def canonical_regex(pattern: str) -> str:
    """One spelling for expressions that tokenizers write in several ways and that match the same."""
    for character, escape in (("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t")):
        pattern = pattern.replace(character, escape)
    cased = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    pattern = pattern.replace(cased, _CONTRACTIONS).replace(r"\p{N}{1}", r"\p{N}")
    for spelling in ("'(?i:[sdmt]|ll|ve|re)", "(?i:'(?:[sdmt]|ll|ve|re))"):
        # Bailing's last expression differs otherwise as well, and keeps its own spelling.
        if r"\s*[\r\n]+" in pattern:
            pattern = pattern.replace(spelling, _CONTRACTIONS)
    # Possessive repetition changes the speed here, not the match: nothing after it could match what it has consumed.
    pattern = pattern.replace("?+", "?").replace("++", "+")
    return re.sub(r"\|\\s\+\$(?=\|)", "", pattern)
