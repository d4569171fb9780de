"""What kind of token each token is, as llama.cpp decides when it loads a vocabulary.

A GGUF gives every token a type, but some vocabularies give control tokens a wrong one, so llama.cpp overrides types by
the tokens' texts. The tables below say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag

import numpy as np


class TokenType(IntEnum):
    """A token's type as `tokenizer.ggml.token_type` holds it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Attribute(IntFlag):
    """What a token is, and whether it strips the white space next to it in a text."""

    UNKNOWN = 1
    UNUSED = 2
    NORMAL = 4
    CONTROL = 8
    USER_DEFINED = 16
    BYTE = 32
    LSTRIP = 64
    RSTRIP = 128


_OF_TYPE = {
    TokenType.NORMAL: Attribute.NORMAL,
    TokenType.UNKNOWN: Attribute.UNKNOWN,
    TokenType.CONTROL: Attribute.CONTROL,
    TokenType.USER_DEFINED: Attribute.USER_DEFINED,
    TokenType.UNUSED: Attribute.UNUSED,
    TokenType.BYTE: Attribute.BYTE,
}

END_OF_TURN = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
_END_OF_GENERATION = (
    *END_OF_TURN, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
# The texts of each role, of which the first that a vocabulary has is a control token.
_ROLES = {
    "eot": END_OF_TURN,
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_ALWAYS_USER_DEFINED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def attributes(
    ids: Mapping[str, int], types: np.ndarray | None, special: dict[str, int | None], *, pre: str, model_name: str
) -> np.ndarray:
    """The attributes of every token: int32 of shape (tokens,), each a sum of `Attribute` members.

    `ids` gives the id of each token's text and `types` its type, or None where all are normal. `special` maps roles
    ("eot", "fim_pre", ...) to the ids that the metadata names; roles found by their tokens' text are added to it.
    """
    by_type = np.zeros(256, dtype=np.int32)
    for kind, attribute in _OF_TYPE.items():
        by_type[kind] = attribute
    if types is None:
        result = np.full(len(ids), Attribute.NORMAL, dtype=np.int32)
    else:
        result = by_type[np.where((types < 0) | (types > 255), 0, types)]
    for role, texts in _ROLES.items():
        # Where a vocabulary has several, the reference takes whichever its hash table yields first.
        found = next((ids[text] for text in texts if text in ids), None)
        if special.get(role) is None and found is not None:
            special[role] = found
            result[found] |= Attribute.CONTROL
    for text in ids:
        if "unused" in text and result[ids[text]] & Attribute.CONTROL:
            result[ids[text]] |= Attribute.UNUSED
    for text in _END_OF_GENERATION:
        if text in ids:
            result[ids[text]] |= Attribute.CONTROL
    for text in _ALWAYS_USER_DEFINED:
        if text in ids:
            result[ids[text]] = Attribute.USER_DEFINED
    _except_some(ids, special, result)
    _strip_spaces(ids, result, pre, model_name)
    return result


def _except_some(ids: Mapping[str, int], special: Mapping[str, int | None], result: np.ndarray) -> None:
    """Undo overrides by text for the families where they are wrong."""
    harmony = "<|return|>" in ids and ("<|call|>" in ids or "<|calls|>" in ids)
    solar = "<|flush|>" in ids and ("<|call|>" in ids or "<|calls|>" in ids)
    if "<|end|>" in ids and (harmony or solar):
        result[ids["<|end|>"]] = Attribute.USER_DEFINED
    plamo = ids.get("<|plamo:eos|>")
    plamo_ends = plamo is not None and plamo in (special.get("eos"), special.get("eot"))
    if "</s>" in ids and ("<|tool_response>" in ids or plamo_ends):
        result[ids["</s>"]] = Attribute.NORMAL


def _strip_spaces(ids: Mapping[str, int], result: np.ndarray, pre: str, model_name: str) -> None:
    """Mark the tokens that strip white space; GGUF has no key for it, the reference goes by the model's name."""
    name = model_name.lower()
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        if "<mask>" in ids:
            result[ids["<mask>"]] |= Attribute.LSTRIP
    elif "phi-3" in name or "phi3" in name:
        split_out = result & (Attribute.CONTROL | Attribute.USER_DEFINED | Attribute.UNKNOWN) != 0
        result[split_out] |= Attribute.RSTRIP
        if "</s>" in ids:
            result[ids["</s>"]] |= Attribute.RSTRIP
        for text in ("<unk>", "<s>", "<|endoftext|>"):
            if text in ids:
                result[ids[text]] &= ~Attribute.RSTRIP
    elif "modern-bert" in name and "[MASK]" in ids:
        result[ids["[MASK]"]] |= Attribute.LSTRIP
