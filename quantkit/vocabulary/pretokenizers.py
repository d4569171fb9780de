r"""llama.cpp's pre-tokenizers: how a text is cut into words before byte pairs are merged.

A GGUF names its pre-tokenizer in `tokenizer.ggml.pre`. Each name stands for a list of regular expressions, applied
one after the other to the words that the ones before left, and for a few habits of the tokenizer around them. What
an expression does not match between two matches stays a word of its own.

Two expressions of the reference are implemented as code there, and so here: `DIGIT_TRIPLES` and
`WHOLE_TRIPLES`, whose expression takes time that grows with the square of a number's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.vocabulary import unicode_classes

# Digits in threes counted from the right; what stands before a number stays with its first digits.
DIGIT_TRIPLES = "digit triples"
# The same, and a number whose digits make whole triples begins a word of its own.
WHOLE_TRIPLES = "whole triples"
# Kimi K2's: Han characters are words of their own, and no letters.
KIMI = "kimi"

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES_AND_SPACES = r"\s*[\r\n]+|" + _SPACES
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ASCII_PUNCTUATION_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_UPPER, _LOWER = r"(?:(?=[\p{L}])[^a-z])", r"(?:(?=[\p{L}])[^A-Z])"
_UPPER_M, _LOWER_M = r"(?:(?=[\p{L}\p{M}])[^a-z])", r"(?:(?=[\p{L}\p{M}])[^A-Z])"
_CASED, _CASED_M = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(upper: str, lower: str, tail: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{tail}|{lead}{upper}+{lower}*{tail}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
LLAMA3 = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}|{_OTHERS}|{_LINES_AND_SPACES}"
QWEN2 = f"{_CONTRACTIONS}|{_WORD}|\\p{{N}}|{_OTHERS}|{_LINES_AND_SPACES}"
QWEN35 = (
    f"{_CONTRACTIONS}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
)
_TRAILING_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DEEPSEEK3_WORDS = _ASCII_PUNCTUATION_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, f"{_DEEPSEEK3_WORDS}[\\r\\n]*|{_LINES_AND_SPACES}")
_HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_NOT_PUNCTUATION = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LATIN_GREEK_CYRILLIC = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
# What llama.cpp counts as Han, and a class that stands for it.
_HAN_RANGES = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_HAN = "\xd6"
_NEWLINE_RUNS = r"[^\n]+|[\n]+"


@dataclass(frozen=True)
class Pretokenizer:
    """What a name in `tokenizer.ggml.pre` means to llama.cpp."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise
    add_sep: bool = False  # between two texts, unless tokenizer.ggml.add_sep_token says otherwise
    clean_spaces: bool = True  # decoding removes the space before punctuation
    bytes_as_characters: bool = True  # merges work on GPT-2's byte alphabet; else on the characters themselves
    escape_spaces: bool = False  # a space becomes U+2581 first
    newlines_whole: bool = False  # a run of newlines that is a token is that token
    default_bos: bool = True  # without a key in the metadata, the token 11 is BOS, as it is EOS


# The habits that names share.
def _strict(*patterns: str, **habits: bool) -> Pretokenizer:
    return Pretokenizer(patterns, clean_spaces=False, **habits)


_LLAMA3 = Pretokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_GPT2 = Pretokenizer((GPT2,))
_PAIRS = replace(_GPT2, add_sep=True)
_DIGITS_GPT2 = (r"\p{N}", GPT2)
_QWEN2 = _strict(QWEN2)
_GPT4O = _strict(
    _cased_words(_UPPER, _LOWER, f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_TRAILING_OTHERS}|{_LINES_AND_SPACES}"
)
_BAILING = _strict(
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_OTHERS}|\s*[\r\n]|{_SPACES}",
)
_AYA = _strict(
    DIGIT_TRIPLES,
    _cased_words(_CASED, _CASED_M, f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_TRAILING_OTHERS}|{_LINES_AND_SPACES}",
)
_GEMMA4 = Pretokenizer((_NEWLINE_RUNS,), bytes_as_characters=False, escape_spaces=True, newlines_whole=True)
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK
)
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

PRETOKENIZERS: dict[str, Pretokenizer] = {
    "default": Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "lfm2": _LLAMA3,
    "jina-v5-nano": _LLAMA3,
    "dbrx": Pretokenizer((LLAMA3,)),
    "smaug-bpe": Pretokenizer((LLAMA3,)),
    "chatglm-bpe": Pretokenizer((LLAMA3,), default_bos=False),
    "glm4": Pretokenizer((LLAMA3,), ignore_merges=True, default_bos=False),
    "glm5": Pretokenizer((LLAMA3,), ignore_merges=True, default_bos=False),
    "jais-2": Pretokenizer(
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_OTHERS}|\s*[\r\n]+|{_JAIS2_SPACES}",),
    ),
    "minicpm5": Pretokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_OTHERS}|{_LINES_AND_SPACES}"), ignore_merges=True
    ),
    "deepseek-llm": _strict(
        r"[\r\n]",
        rf"\s?[{_LATIN_GREEK_CYRILLIC}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+\Z",
        _HAN_TO_HANGUL,
        r"\p{N}+",
    ),
    "deepseek-coder": _strict(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, r"\p{N}"),
    "deepseek-v3": _strict(*_DEEPSEEK3),
    "hunyuan-dense": _strict(*_DEEPSEEK3),
    "joyai-llm": _strict(*_DEEPSEEK3),
    "hy_v4": _strict(*_DEEPSEEK3),
    "spark2_5": _strict(r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3_WORDS}|[\r\n]|{_SPACES}", r"\p{N}"),
    "youtu": _strict(
        _YOUTU_SCRIPTS,
        _cased_words(_CASED, _CASED_M, f"{_CONTRACTIONS}?") + rf"|\p{{N}}|{_TRAILING_OTHERS}|{_LINES_AND_SPACES}",
        ignore_merges=True,
    ),
    "falcon": Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "starcoder": Pretokenizer(_DIGITS_GPT2),
    "refact": Pretokenizer(_DIGITS_GPT2),
    "codeshell": Pretokenizer(_DIGITS_GPT2),
    "exaone": Pretokenizer(_DIGITS_GPT2),
    "minerva-7b": Pretokenizer(_DIGITS_GPT2),
    "mellum2": Pretokenizer(_DIGITS_GPT2),
    "command-r": _strict(*_DIGITS_GPT2),
    "smollm": _strict(*_DIGITS_GPT2),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "jina-es": _GPT2,
    "jina-de": _GPT2,
    "gigachat": _GPT2,
    "jina-v2-es": _GPT2,
    "jina-v2-de": _GPT2,
    "a.x-4.0": _GPT2,
    "mellum": _GPT2,
    "modern-bert": _GPT2,
    "exaone4": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "jais": _GPT2,
    "jina-v1-en": _PAIRS,
    "jina-v2-code": _PAIRS,
    "roberta-bpe": _PAIRS,
    "trillion": _strict(GPT2),
    "granite-docling": _strict(GPT2),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "kormo": _QWEN2,
    "f2llmv2": _QWEN2,
    "hunyuan": _QWEN2,
    "solar-open": _QWEN2,
    "grok-2": _QWEN2,
    "megrez": Pretokenizer((QWEN2,)),
    "stablelm2": Pretokenizer((QWEN2,)),
    "qwen35": _strict(QWEN35),
    "ufakzeka": _strict(rf"{_WORD}|\p{{N}}|{_OTHERS}|{_LINES_AND_SPACES}"),
    "laguna": _strict(_NEWLINE_RUNS, QWEN2),
    "poro-chat": _strict(_NOT_PUNCTUATION),
    "bloom": Pretokenizer((_NOT_PUNCTUATION,)),
    "gpt3-finnish": Pretokenizer((_NOT_PUNCTUATION,)),
    "viking": _strict(_NOT_PUNCTUATION, r"\p{N}"),
    "tekken": _strict(
        _cased_words(_UPPER, _LOWER, "") + rf"|\p{{N}}|{_TRAILING_OTHERS}|{_LINES_AND_SPACES}",
        ignore_merges=True,
        add_bos=True,
    ),
    "chameleon": _strict(
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
        add_bos=True,
    ),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "kanana2": _GPT4O,
    "talkie": _GPT4O,
    "minimax-m2": _GPT4O,
    "granite-embed-multi-97m": _strict(
        _cased_words(_UPPER_M, _LOWER_M, f"{_CONTRACTIONS}?")
        + rf"|\p{{N}}{{1,3}}|{_TRAILING_OTHERS}|{_LINES_AND_SPACES}",
        ignore_merges=True,
    ),
    "tiny_aya": _AYA,
    "cohere2moe": _AYA,
    "kimi-k2": _strict(KIMI),
    "superbpe": _strict(r"\p{N}+", WHOLE_TRIPLES),
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "llada-moe": _BAILING,
    "seed-coder": _strict(
        rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES_AND_SPACES}",
    ),
    "afmoe": _strict(DIGIT_TRIPLES, _AFMOE_SCRIPTS, f"{_DEEPSEEK3_WORDS}[\\r\\n]*|{_LINES_AND_SPACES}"),
    "exaone-moe": Pretokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
        )
    ),
    "gemma4": _GEMMA4,
    "granite-embed-multi-311m": _GEMMA4,
    "sarvam-moe": _strict(_NEWLINE_RUNS, bytes_as_characters=False, escape_spaces=True),
}

# A step takes the text, its classes, and the ends of the words so far; it returns the ends of the words it makes.
_Step = Callable[[str, str, list[int]], list[int]]


class Splitter:
    """Cuts text into words as one of the pre-tokenizers does."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Compile the expressions."""
        self._steps = [_step(pattern) for pattern in patterns]

    def ends(self, text: str, codes: np.ndarray) -> list[int]:
        """The end of every word of `text`, in characters. `codes` are the code points of `text`."""
        ends = [len(text)] if text else []
        kinds = unicode_classes.classes(codes)
        for step in self._steps:
            ends = step(text, kinds, ends)
        return ends


@cache
def splitter(name: str) -> Splitter:
    """The splitter of the pre-tokenizer `name`, which `lookup` knows."""
    return Splitter(lookup(name).patterns)


def lookup(name: str) -> Pretokenizer:
    """The pre-tokenizer called `name`. Raises QuantkitError, listing the names, when there is none."""
    try:
        return PRETOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRETOKENIZERS))
        raise QuantkitError(f"the pre-tokenizer {name!r} is not one of {known}") from None


@cache
def _step(pattern: str) -> _Step:
    if pattern == DIGIT_TRIPLES:
        digits = unicode_classes.compile_for_classes(r"\p{N}+")
        return lambda _text, kinds, ends: _split_digits(digits, kinds, ends)
    if pattern == KIMI:
        han = unicode_classes.compile_for_classes(
            rf"{_HAN}+|[^\r\n\p{{L}}\p{{N}}{_HAN}]?\p{{L}}+{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
            rf"| ?[^\s\p{{L}}\p{{N}}{_HAN}]+[\r\n]*|{_LINES_AND_SPACES}"
        )
        return lambda text, kinds, ends: _split(han, _with_han(text, kinds), ends)
    if pattern == WHOLE_TRIPLES:
        runs = re.compile("[0-9]+")
        return lambda text, _kinds, ends: _split_digits(runs, text, ends, before=True)
    if unicode_classes.uses_classes(pattern):
        by_class = unicode_classes.compile_for_classes(pattern)
        return lambda _text, kinds, ends: _split(by_class, kinds, ends)
    by_text = re.compile(pattern, re.ASCII)
    return lambda text, _kinds, ends: _split(by_text, unicode_classes.plain(text), ends)


def _with_han(text: str, kinds: str) -> str:
    """`kinds`, the classes of `text`, with a class of its own for Han characters."""
    if not (runs := list(re.finditer(f"[{_HAN_RANGES}]+", text))):
        return kinds
    pieces, done = [], 0
    for run in runs:
        first, last = run.span()
        pieces += [kinds[done:first], _HAN * (last - first)]
        done = last
    return "".join(pieces) + kinds[done:]


def _split(pattern: re.Pattern[str], text: str, ends: list[int]) -> list[int]:
    result: list[int] = []
    start = 0
    for end in ends:
        done = start
        for match in pattern.finditer(text, start, end):
            first, last = match.span()
            if first > done:
                result.append(first)
            if last > first:
                result.append(last)
            done = last
        if done < end:
            result.append(end)
        start = end
    return result


def _split_digits(digits: re.Pattern[str], kinds: str, ends: list[int], before: bool = False) -> list[int]:
    """Cut numbers into threes from the right; with `before`, also before a number of whole threes, not after one."""
    result: list[int] = []
    start = 0
    for end in ends:
        done = start
        for match in digits.finditer(kinds, start, end):
            first, last = match.span()
            if before:
                cuts = range(first + (last - first) % 3, last - 2, 3)
                result.extend(cut for cut in cuts if cut > done)
                done = max(done, *cuts) if len(cuts) else done
            else:
                result.extend(range(first + ((last - first) % 3 or 3), last + 1, 3))
                done = last
        if done < end:
            result.append(end)
        start = end
    return result
