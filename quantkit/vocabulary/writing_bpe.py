"""Byte-level BPE as GGUF metadata, from tokenizer.json or a file of ranks, and what single families add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.vocabulary import recognition, tiktoken_file
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.special_tokens import SpecialTokens, looks_special

if TYPE_CHECKING:
    import gguf

# The files of ranks, and what comes after them in these vocabularies; the checkpoints' own code says it alone.
_KIMI_RANKS, _KIMI_RESERVED = "tiktoken.model", 258
_HUNYUAN_RANKS = "hy.tiktoken"
_HUNYUAN_SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")
# ChatML, whatever a checkpoint brings: as the reference has it.
_QWEN3_ASR_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_bpe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE from tokenizer.json. `pre` overrides the name of the pre-tokenizer, in all of this module."""
    if files.tokenizer_json is None:
        raise QuantkitError(
            f"{files.directory}: there is no vocabulary to convert: neither tokenizer.model nor tokenizer.json"
        )
    if files.model.get("type") != "BPE":
        kind = files.model.get("type")
        raise QuantkitError(f"{files.directory / 'tokenizer.json'}: a {kind} tokenizer, only BPE is supported")
    tokens, types = bpe_tokens(files)
    special = SpecialTokens(files, merges=True)
    for role, text in files.family_tokens.items():
        special.set(role, files.tokenizer().ids.get(text))
    if pre is None:
        cleans = (files.tokenizer_config or {}).get("clean_up_tokenization_spaces")
        pre = recognition.recognise(files.tokenizer_json, adds_bos=special.adds.get("bos"), cleans_spaces=cleans)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.write(writer)


def bpe_tokens(files: CheckpointFiles) -> tuple[list[str], list[int]]:
    """The texts of the tokens of tokenizer.json, padded to the size of the vocabulary, and their types."""
    tokenizer = files.tokenizer()
    texts = {token: text for text, token in tokenizer.ids.items()}
    n_vocab = files.vocab_size or len(tokenizer.ids)
    files.refuse_more(max(texts, default=-1) + 1, n_vocab)
    tokens: list[str] = []
    types: list[int] = []
    for token in range(n_vocab):
        text, kind = texts.get(token), TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{token}]", TokenType.UNUSED
        elif token in tokenizer.added:
            text = tokenizer.added[token].text
            if tokenizer.added[token].special or looks_special(text):
                kind = TokenType.CONTROL
            else:
                text, kind = text.replace("\u2581", " "), TokenType.USER_DEFINED
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def write_modern_bert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE with BERT's tokens around a text."""
    for role in ("bos", "eos", "sep"):
        writer.add_bool(f"tokenizer.ggml.add_{role}_token", True)
    write_bpe(files, writer, pre)


def write_eurobert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, with nothing in front of a text."""
    writer.add_add_bos_token(False)
    write_bpe(files, writer, pre)


def write_qwen3_asr(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """As Qwen3-Omni's, with a template for chats of its own."""
    write_bpe(files, writer, pre)
    writer.add_chat_template(_QWEN3_ASR_TEMPLATE)
    _end_of_turn(files, writer)


def write_qwen3_omni(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, where the end of a turn begins and ends a text whatever its files say."""
    write_bpe(files, writer, pre)
    _end_of_turn(files, writer)


def _end_of_turn(files: CheckpointFiles, writer: gguf.GGUFWriter) -> None:
    for token, entry in files.declared_tokens.items():
        if entry.get("content") == "<|im_end|>":
            writer.add_bos_token_id(token)
            writer.add_eos_token_id(token)
            break


def write_hunyuan(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, with the ends of a text and a turn from config.json and generation_config.json."""
    write_bpe(files, writer, pre)
    end = files.config.get("eod_token_id")
    if isinstance(end, int) and end >= 0:
        writer.add_uint32("tokenizer.ggml.eos_token_id", end)
    ends = (files.read("generation_config.json") or {}).get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1 and isinstance(ends[0], int) and ends[0] >= 0:
        writer.add_uint32("tokenizer.ggml.eot_token_id", ends[0])


# ---- from files of ranks


def _write_tiktoken(
    files: CheckpointFiles, writer: gguf.GGUFWriter, name: str, special: dict[int, str], pre: str
) -> None:
    """Byte-level BPE from a file of ranks; `special` are the texts of control tokens by their ids."""
    ranks = tiktoken_file.read_ranks(files.directory / name)
    n_vocab = files.vocab_size or max(len(ranks), *special) + 1
    files.refuse_more(len(ranks), n_vocab)
    texts = {rank: tiktoken_file.written(token) for token, rank in ranks.items()}
    tokens, types = [], []
    for token in range(n_vocab):
        kind = TokenType.CONTROL if token in special else TokenType.NORMAL if token in texts else TokenType.UNUSED
        tokens.append(special.get(token) or texts.get(token) or f"[PAD{token}]")
        types.append(int(kind))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(tiktoken_file.merges(ranks))
    SpecialTokens(files).write(writer)


def write_kimi(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, where there is no tokenizer.json from Kimi's file of ranks.

    After the ranks come 258 control tokens, some of which tokenizer_config.json names.
    """
    if files.tokenizer_json is not None or not (files.directory / _KIMI_RANKS).is_file():
        write_bpe(files, writer, pre)
        return
    first = len(tiktoken_file.read_ranks(files.directory / _KIMI_RANKS))
    named = files.declared_tokens
    special = {
        token: named[token]["content"] if token in named else f"<|reserved_token_{token}|>"
        for token in range(first, first + _KIMI_RESERVED)
    }
    _write_tiktoken(files, writer, _KIMI_RANKS, special, pre or "kimi-k2")


def write_hunyuan_moe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE from Hunyuan's file of ranks, or as the dense models have it.

    After the ranks come five control tokens, and further ones that are only numbered.
    """
    if not (files.directory / _HUNYUAN_RANKS).is_file():
        write_hunyuan(files, writer, pre)
        return
    first = len(tiktoken_file.read_ranks(files.directory / _HUNYUAN_RANKS))
    n_vocab = files.vocab_size or first + len(_HUNYUAN_SPECIAL)
    extra = (f"<|extra_{i}|>" for i in range(n_vocab))
    special = dict(zip(range(first, n_vocab), (*_HUNYUAN_SPECIAL, *extra), strict=False))
    _write_tiktoken(files, writer, _HUNYUAN_RANKS, special, pre or "hunyuan")
    writer.add_bos_token_id(first + _HUNYUAN_SPECIAL.index("<|bos|>"))
