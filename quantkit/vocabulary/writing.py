"""A checkpoint's vocabulary as GGUF metadata: the keys, types, values and order of the reference converter."""

from __future__ import annotations

import logging
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.vocabulary import pretokenizers, recognition, rwkv, tiktoken_file
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.sentencepiece_model import Normalizer, read_normalizer
from quantkit.vocabulary.special_tokens import SpecialTokens

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)

_CODE_LLAMA_VOCABULARY = 32016
_SMALL_GRANITE_VOCABULARY = 49152
# The end of a turn in Gemma 1, which its files do not name.
_GEMMA1_END_OF_TURN = 107
# The files of ranks, and what comes after them in these vocabularies; the checkpoints' own code says it alone.
_KIMI_RANKS, _KIMI_RESERVED = "tiktoken.model", 258
_HUNYUAN_RANKS = "hy.tiktoken"
_HUNYUAN_SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")
_RWKV_VOCABULARY, _RWKV_END_OF_TURN = 65536, 261
# llama.cpp's name for the template of these models.
_RWKV_TEMPLATE = "rwkv-world"
# Tokens that Gemma 4's chat parser has to see.
_GEMMA4_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)


def write_vocabulary(
    directory: Path,
    config: dict[str, Any],
    writer: gguf.GGUFWriter,
    *,
    style: str = "auto",
    pre: str | None = None,
    usual_pre: str | None = None,
    special: Mapping[str, str] | None = None,
) -> None:
    """Add the `tokenizer.*` keys of the checkpoint in `directory` to `writer`.

    `config` holds the model's hyper-parameters, as config.json has them or with its text part merged in. `style` is
    "bpe" (byte-level BPE from tokenizer.json), "spm" (SentencePiece from tokenizer.model), "llama-hf" (SentencePiece
    from a tokenizer.json with byte fallback), "spm-or-bpe" (spm if there is a tokenizer.model), "gemma" (that, without
    a space in front of text), "spm-prefix" (spm with what tokenizer_config.json says of that space), "gemma1",
    "gemma3n", "phi3", "gemma4", "nemotron", "hunyuan", "hunyuan-moe", "kimi", "internlm2", "internlm3",
    "qwen3-omni", "qwen3-asr" and "jamba" (what those families do with one of these, or with a file of ranks of
    tiktoken's), "rwkv" (RWKV's list of byte strings), "wordpiece" (BERT's), "roberta" (byte-level BPE if there is a
    tokenizer.json, else WordPiece),
    "xlm-roberta" and "t5" (Unigram from the SentencePiece models of these), "wordpiece-or-xlm-roberta", "modern-bert",
    "jina-bert" and "eurobert" (what these do with one), or "auto": the first of spm, llama-hf and bpe whose files are
    there, with what the reference adds for Llama.
    `pre` overrides the name of the pre-tokenizer wherever byte-level BPE is written; `usual_pre`, the family's own
    name, is taken where the name that was found cuts a text in the same way. `special` has the texts of special tokens
    by their roles, for roles that the files of byte-level BPE give no token.

    Raises QuantkitError when files are missing or malformed, or the pre-tokenizer is not recognised.
    """
    if pre is not None and style != "wordpiece":
        pretokenizers.lookup(pre)
    files = CheckpointFiles(directory, config, special or {})
    if style not in _STYLES:
        raise QuantkitError(f"the vocabulary style {style!r} is not one of {', '.join(_STYLES)}")
    try:
        _STYLES[style](files, writer, pre)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OverflowError, RecursionError) as error:
        # Untrusted files: any field can have any type. Fields are checked where a good message helps the user.
        log.debug("while reading the tokenizer's files", exc_info=True)
        problem = f"{type(error).__name__}: {error}"[:200]
        raise QuantkitError(f"{directory}: the tokenizer's files are malformed ({problem})") from None
    found = writer.kv_data[0].get("tokenizer.ggml.pre")
    if pre is None and usual_pre is not None and found is not None and _same_words(found.value, usual_pre):
        found.value = usual_pre


def _same_words(name: str, other: str) -> bool:
    return pretokenizers.lookup(name).patterns == pretokenizers.lookup(other).patterns


def _write_auto(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    prefix = (files.tokenizer_config or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", bool(prefix))
    if _has_sentencepiece(files):
        _write_sentencepiece(files, writer, pre)
    elif _is_llama_hf(files):
        _write_llama_hf(files, writer, pre)
    else:
        _write_bpe(files, writer, pre)
    n_vocab = files.vocab_size
    if n_vocab == _CODE_LLAMA_VOCABULARY:
        special = SpecialTokens(files, roles=("prefix", "suffix", "middle", "eot"))
        special.set("eot", 32010)
        special.write(writer)
    if n_vocab == _SMALL_GRANITE_VOCABULARY:
        writer.add_bool("tokenizer.ggml.add_bos_token", False)


def _write_sentencepiece_or_bpe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    write = _write_sentencepiece if _has_sentencepiece(files) else _write_bpe
    write(files, writer, pre)


def _write_gemma(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    _write_sentencepiece_or_bpe(files, writer, pre)
    if _has_sentencepiece(files):
        writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def _write_gemma3n(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """As Gemma's, with the tokens of images and sounds, which have no embedding in each layer."""
    config = {k: v for k, v in files.config.items() if k not in ("text_config", "vocab_size_per_layer_input")}
    _write_gemma(CheckpointFiles(files.directory, config, files.family_tokens), writer, pre)


def _has_sentencepiece(files: CheckpointFiles) -> bool:
    return (files.directory / "tokenizer.model").is_file()


def _is_llama_hf(files: CheckpointFiles) -> bool:
    decoder = (files.tokenizer_json or {}).get("decoder") or {}
    model = files.model
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def looks_special(token: str) -> bool:
    """Whether an added token is a control token by its text, whatever the checkpoint says."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


# ---- byte-level BPE


def _write_bpe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if files.tokenizer_json is None:
        raise QuantkitError(
            f"{files.directory}: there is no vocabulary to convert: neither tokenizer.model nor tokenizer.json"
        )
    if files.model.get("type") != "BPE":
        kind = files.model.get("type")
        raise QuantkitError(f"{files.directory / 'tokenizer.json'}: a {kind} tokenizer, only BPE is supported")
    tokens, types = _bpe_tokens(files)
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


# ChatML, whatever a checkpoint brings: as the reference has it.
_QWEN3_ASR_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _write_qwen3_asr(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """As Qwen3-Omni's, with a template for chats of its own."""
    _write_bpe(files, writer, pre)
    writer.add_chat_template(_QWEN3_ASR_TEMPLATE)
    _end_of_turn(files, writer)


def _write_qwen3_omni(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, where the end of a turn begins and ends a text whatever its files say."""
    _write_bpe(files, writer, pre)
    _end_of_turn(files, writer)


def _end_of_turn(files: CheckpointFiles, writer: gguf.GGUFWriter) -> None:
    for token, entry in _added_tokens(files).items():
        if entry.get("content") == "<|im_end|>":
            writer.add_bos_token_id(token)
            writer.add_eos_token_id(token)
            break


def _write_hunyuan(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, with the ends of a text and a turn from config.json and generation_config.json."""
    _write_bpe(files, writer, pre)
    end = files.config.get("eod_token_id")
    if isinstance(end, int) and end >= 0:
        writer.add_uint32("tokenizer.ggml.eos_token_id", end)
    ends = (files.read("generation_config.json") or {}).get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1 and isinstance(ends[0], int) and ends[0] >= 0:
        writer.add_uint32("tokenizer.ggml.eot_token_id", ends[0])


def _write_tiktoken(
    files: CheckpointFiles, writer: gguf.GGUFWriter, name: str, special: dict[int, str], pre: str
) -> None:
    """Byte-level BPE from a file of ranks; `special` are the texts of control tokens by their ids."""
    ranks = tiktoken_file.read_ranks(files.directory / name)
    n_vocab = files.vocab_size or max(len(ranks), *special) + 1
    _check_size(files, len(ranks), n_vocab)
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


def _write_kimi(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, where there is no tokenizer.json from Kimi's file of ranks.

    After the ranks come 258 control tokens, some of which tokenizer_config.json names.
    """
    if files.tokenizer_json is not None or not (files.directory / _KIMI_RANKS).is_file():
        _write_bpe(files, writer, pre)
        return
    first = len(tiktoken_file.read_ranks(files.directory / _KIMI_RANKS))
    named = _added_tokens(files)
    special = {
        token: named[token]["content"] if token in named else f"<|reserved_token_{token}|>"
        for token in range(first, first + _KIMI_RESERVED)
    }
    _write_tiktoken(files, writer, _KIMI_RANKS, special, pre or "kimi-k2")


def _write_hunyuan_moe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE from Hunyuan's file of ranks, or as the dense models have it.

    After the ranks come five control tokens, and further ones that are only numbered.
    """
    if not (files.directory / _HUNYUAN_RANKS).is_file():
        _write_hunyuan(files, writer, pre)
        return
    first = len(tiktoken_file.read_ranks(files.directory / _HUNYUAN_RANKS))
    n_vocab = files.vocab_size or first + len(_HUNYUAN_SPECIAL)
    extra = (f"<|extra_{i}|>" for i in range(n_vocab))
    special = dict(zip(range(first, n_vocab), (*_HUNYUAN_SPECIAL, *extra), strict=False))
    _write_tiktoken(files, writer, _HUNYUAN_RANKS, special, pre or "hunyuan")
    writer.add_bos_token_id(first + _HUNYUAN_SPECIAL.index("<|bos|>"))


def _bpe_tokens(files: CheckpointFiles) -> tuple[list[str], list[int]]:
    tokenizer = files.tokenizer()
    texts = {token: text for text, token in tokenizer.ids.items()}
    n_vocab = files.vocab_size or len(tokenizer.ids)
    _check_size(files, max(texts, default=-1) + 1, n_vocab)
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


def _check_size(files: CheckpointFiles, needed: int, n_vocab: int) -> None:
    if needed > n_vocab:
        raise QuantkitError(
            f"{files.directory}: the tokenizer has {needed} tokens, more than vocab_size in config.json, {n_vocab}"
        )


# ---- SentencePiece


class _Pieces:
    """The tokens, scores and types of a SentencePiece vocabulary as it is built."""

    def __init__(self, n_vocab: int) -> None:
        self.tokens = [f"[PAD{token}]".encode() for token in range(n_vocab)]
        self.scores = [-10000.0] * n_vocab
        self.types = [int(TokenType.UNUSED)] * n_vocab

    def put(self, token: int, text: str, score: float, kind: TokenType) -> None:
        """Set a token; ignore one beyond the vocabulary."""
        if not 0 <= token < len(self.tokens):
            log.warning("the token %r has the id %d, beyond the vocabulary of %d", text, token, len(self.tokens))
            return
        self.tokens[token], self.scores[token], self.types[token] = text.encode(), score, int(kind)

    def write(self, files: CheckpointFiles, writer: gguf.GGUFWriter) -> None:
        """Add all keys of a SentencePiece vocabulary."""
        self.write_tokens(writer)
        SpecialTokens(files, n_vocab=len(self.tokens)).write(writer)

    def write_tokens(self, writer: gguf.GGUFWriter, model: str = "llama") -> None:
        """Add what is there for each token. `model` is the kind of vocabulary."""
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)


def _write_sentencepiece(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    _sentencepiece_pieces(files).write(files, writer)


def _sentencepiece_pieces(files: CheckpointFiles) -> _Pieces:
    """tokenizer.model, with added_tokens.json and what tokenizer_config.json adds."""
    pieces = _read_sentencepiece(files)
    for token, entry in _added_tokens(files).items():
        text = entry["content"]
        if entry.get("special") or looks_special(text):
            kind = TokenType.CONTROL
        else:
            text, kind = text.replace("\u2581", " "), TokenType.USER_DEFINED
        pieces.put(token, text, -1000.0, kind)
    return pieces


def _write_spm_prefix(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    _write_sentencepiece(files, writer, pre)
    prefix = (files.tokenizer_config or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", bool(prefix))


def _write_gemma1(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    _write_sentencepiece(files, writer, pre)
    special = SpecialTokens(files, roles=("eot",))
    special.chat_template = None
    special.set("eot", _GEMMA1_END_OF_TURN)
    special.write(writer)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def _write_nemotron(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    _write_sentencepiece(files, writer, pre)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 1)


def _write_internlm2(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece; what ends a turn of a chat ends a text."""
    from sentencepiece import SentencePieceProcessor

    pieces = _read_sentencepiece(files, unused="[UNUSED", nul="\U0001f409")
    declared = _added_tokens(files) | _listed_tokens(files)
    ends = [token for token, entry in declared.items() if entry["content"] == "<|im_end|>"]
    for token, entry in declared.items():
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        pieces.put(token, entry["content"], -1000.0, kind)
    model = SentencePieceProcessor()
    model.LoadFromFile(str(files.directory / "tokenizer.model"))
    special = SpecialTokens(files, n_vocab=len(pieces.tokens))
    if ends and "eos" in special.ids:
        special.ids["eos"] = ends[-1]
    pieces.write_tokens(writer)
    writer.add_bool("tokenizer.ggml.add_space_prefix", str(model.Normalize("a")).startswith("\u2581"))
    special.write(writer)


def _write_internlm3(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece; what ends a turn of a chat ends a text."""
    pieces = _sentencepiece_pieces(files)
    pieces.write_tokens(writer)
    special = SpecialTokens(files, n_vocab=len(pieces.tokens))
    prefix = (files.tokenizer_config or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", bool(prefix))
    for token, entry in _added_tokens(files).items():
        if entry.get("special") and entry["content"] == "<|im_end|>" and "eos" in special.ids:
            special.ids["eos"] = token
    special.write(writer)


def _write_phi3(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if (files.tokenizer_config or {}).get("tokenizer_class") == "GPT2Tokenizer":
        _write_bpe(files, writer, pre)
        return
    pieces = _read_sentencepiece(files)
    for token, entry in (*_added_tokens(files).items(), *_listed_tokens(files).items()):
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        pieces.put(token, entry["content"], -1000.0, kind)
    pieces.write(files, writer)


def _added_tokens(files: CheckpointFiles) -> dict[int, dict[str, Any]]:
    return files.added_tokens_decoder((files.tokenizer_config or {}).get("added_tokens_decoder") or {})


def _listed_tokens(files: CheckpointFiles) -> dict[int, dict[str, Any]]:
    """The added tokens that tokenizer.json lists, by their ids."""
    listed = (files.tokenizer_json or {}).get("added_tokens") or []
    try:
        return {int(entry["id"]): entry for entry in listed if isinstance(entry["content"], str)}
    except (TypeError, KeyError, ValueError):
        raise QuantkitError(f"{files.directory / 'tokenizer.json'}: added_tokens is malformed") from None


def _read_sentencepiece(
    files: CheckpointFiles,
    path: Path | None = None,
    *,
    unused: str | None = None,
    nul: str | None = None,
    at_least: bool = False,
) -> _Pieces:
    """tokenizer.model, or `path`, with added_tokens.json.

    With `at_least`, all tokens count, even if config.json announces fewer, and added ones do not. Tokens that begin
    with `unused` count as unused, and the one that is the character NUL gets the text `nul`.
    """
    from sentencepiece import SentencePieceProcessor

    path = path or files.directory / "tokenizer.model"
    if not path.is_file():
        raise QuantkitError(f"{path}: not found")
    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise QuantkitError(f"{path}: not a SentencePiece model: {error}") from None
    n_pieces = model.vocab_size()
    n_vocab = _per_layer_vocab_size(files) or files.vocab_size or n_pieces
    pieces = _Pieces(max(n_vocab, n_pieces) if at_least else n_vocab)
    for token in range(min(n_pieces, len(pieces.tokens))):
        kind = TokenType.NORMAL
        for holds, other in (
            (model.IsUnknown, TokenType.UNKNOWN),
            (model.IsControl, TokenType.CONTROL),
            (model.IsUnused, TokenType.UNUSED),
            (model.IsByte, TokenType.BYTE),
        ):
            if holds(token):
                kind = other
                break
        text = model.IdToPiece(token)
        if unused is not None and text.startswith(unused):
            kind = TokenType.UNUSED
        if nul is not None and text == "\0":
            text = nul
        pieces.put(token, text, model.GetScore(token), kind)
    for text, token in ({} if at_least else files.read("added_tokens.json") or {}).items():
        if not isinstance(token, int):
            raise QuantkitError(f"{files.directory / 'added_tokens.json'}: the token {text!r} has no number")
        pieces.put(token, text, -1000.0, TokenType.USER_DEFINED)
    return pieces


def _per_layer_vocab_size(files: CheckpointFiles) -> int | None:
    text = files.config.get("text_config")
    merged = files.config | (text if isinstance(text, dict) else {})
    size = merged.get("vocab_size_per_layer_input")
    return size if isinstance(size, int) and 0 < size < 1 << 24 else None


# ---- SentencePiece as tokenizer.json tells it


def _llama_hf_tokens(files: CheckpointFiles) -> tuple[list[bytes], list[float], list[int]]:
    if not _is_llama_hf(files):
        raise QuantkitError(f"{files.directory / 'tokenizer.json'}: not a BPE tokenizer with byte fallback")
    tokenizer = files.tokenizer()
    n_base, vocab = tokenizer.n_base, tokenizer.ids
    texts = {token: text for text, token in vocab.items()}
    special = {vocab[text] for text in files.special_tokens().values() if text in vocab}
    added = sorted(token for token in tokenizer.added if token >= n_base)
    tokens: list[bytes] = []
    types: list[int] = []
    for token in range(n_base):
        if token not in texts:
            raise QuantkitError(f"{files.directory / 'tokenizer.json'}: no token has the id {token}")
        text = texts[token]
        kind = TokenType.CONTROL if token in special else TokenType.NORMAL
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenType.BYTE
        tokens.append(text.encode())
        types.append(int(kind))
    for token in added:
        tokens.append(texts[token].encode())
        types.append(int(TokenType.CONTROL if token in special else TokenType.USER_DEFINED))
    return tokens, [-1000.0] * len(tokens), types


def _write_llama_hf(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    tokens, scores, types = _llama_hf_tokens(files)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    SpecialTokens(files, n_vocab=len(tokens)).write(writer)


def _write_jamba(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if _has_sentencepiece(files):
        _write_sentencepiece(files, writer, pre)
    else:
        _write_llama_hf(files, writer, pre)
        writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def _write_gemma4(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    tokens, scores, types = _llama_hf_tokens(files)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    visible = [
        int(TokenType.USER_DEFINED) if t.decode() in _GEMMA4_VISIBLE else k for t, k in zip(tokens, types, strict=True)
    ]
    writer.add_token_types(visible)
    SpecialTokens(files, merges=True).write(writer)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)


# ---- WordPiece and Unigram


# What the reference calls the vocabulary of most English models; no runtime reads it where words are cut by WordPiece.
_WORDPIECE_PRE = "jina-v2-en"
_WORDPIECE_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def _write_wordpiece(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if files.tokenizer_json is not None:
        if (kind := files.model.get("type")) != "WordPiece":
            raise QuantkitError(f"{files.directory / 'tokenizer.json'}: a {kind} tokenizer, where WordPiece is needed")
        tokens, types = _bpe_tokens(files)
    else:
        tokens, types = _listed_words(files)
    _write_token_types(files, writer)
    for token, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.CONTROL:
            tokens[token] = text[2:] if text.startswith("##") else f"\u2581{text}"
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre(pre or _WORDPIECE_PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialTokens(files, n_vocab=len(tokens)).write(writer)


def _listed_words(files: CheckpointFiles) -> tuple[list[str], list[int]]:
    """The tokens of vocab.txt, one in a line, and their types."""
    text = files.read_text("vocab.txt")
    if text is None:
        raise QuantkitError(f"{files.directory}: there is neither tokenizer.json nor vocab.txt")
    tokens = text.split("\n")[: -1 if text.endswith("\n") else None]
    special = {*_WORDPIECE_SPECIAL, *files.special_tokens().values()}
    types = [int(TokenType.CONTROL if token in special else TokenType.NORMAL) for token in tokens]
    n_vocab = files.vocab_size or len(tokens)
    _check_size(files, len(tokens), n_vocab)
    missing = range(len(tokens), n_vocab)
    return tokens + [f"[PAD{i}]" for i in missing], types + [int(TokenType.UNUSED)] * len(missing)


def _write_token_types(files: CheckpointFiles, writer: gguf.GGUFWriter) -> None:
    """Add how many kinds of segments the model tells apart."""
    count = files.config.get("type_vocab_size", 1)
    writer.add_token_type_count(int(count or 0))


def _write_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if files.tokenizer_json is None:
        _write_wordpiece(files, writer, pre)
        return
    _write_bpe(files, writer, pre)
    _write_token_types(files, writer)


def _write_jina_bert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    if files.model.get("type") == "BPE":
        _write_bpe(files, writer, pre)
        writer.add_token_type_count(2)
        return
    _write_wordpiece(files, writer, pre)


def _write_modern_bert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE with BERT's tokens around a text."""
    for role in ("bos", "eos", "sep"):
        writer.add_bool(f"tokenizer.ggml.add_{role}_token", True)
    _write_bpe(files, writer, pre)


def _write_eurobert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, with nothing in front of a text."""
    writer.add_add_bos_token(False)
    _write_bpe(files, writer, pre)


def _write_wordpiece_or_xlm_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    (_write_xlm_roberta if files.model.get("type") == "Unigram" else _write_wordpiece)(files, writer, pre)


def _write_xlm_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """Unigram, with the four tokens in front that fairseq put there; or what tokenizer.json says."""
    path = files.directory / "sentencepiece.bpe.model"
    if path.is_file():
        pieces, spec = _read_sentencepiece(files, path, at_least=True), read_normalizer(path)
        special = ("<s>", "<pad>", "</s>")
        pieces.tokens = [text.encode() for text in (*special, "<unk>")] + pieces.tokens[3:-1]
        pieces.scores = [0.0] * 4 + pieces.scores[3:-1]
        pieces.types = [int(TokenType.CONTROL)] * 3 + [int(TokenType.UNKNOWN)] + pieces.types[3:-1]
    else:
        pieces, spec = _unigram_of_json(files)
    pieces.write_tokens(writer, "t5")
    writer.add_add_space_prefix(spec.adds_prefix)
    _write_token_types(files, writer)
    writer.add_remove_extra_whitespaces(spec.merges_spaces)
    if spec.charsmap:
        writer.add_precompiled_charsmap(spec.charsmap)
    SpecialTokens(files, n_vocab=len(pieces.tokens)).write(writer)


def _unigram_of_json(files: CheckpointFiles) -> tuple[_Pieces, Normalizer]:
    """The tokens of a Unigram tokenizer.json, and how it normalises."""
    path = files.directory / "tokenizer.json"
    if files.model.get("type") != "Unigram":
        raise QuantkitError(f"{path}: no Unigram tokenizer, and there is no sentencepiece.bpe.model")
    tokenizer, settings = files.tokenizer(), files.tokenizer_config or {}
    scores = [float(score) for _, score in files.model["vocab"]]
    texts = {token: text for text, token in tokenizer.ids.items()}
    pieces = _Pieces(max(files.vocab_size or 0, tokenizer.n_base))
    unknown = next(
        (token for token, added in tokenizer.added.items() if added.text == settings.get("unk_token")),
        files.model.get("unk_id", 3),
    )
    special = set(files.special_tokens().values())
    for token in range(tokenizer.n_base):
        kind = TokenType.NORMAL
        if token == unknown:
            kind = TokenType.UNKNOWN
        elif texts[token] in special:
            kind = TokenType.CONTROL
        elif token in tokenizer.added:
            kind = TokenType.USER_DEFINED
        pieces.put(token, texts[token], scores[token], kind)
    normalizer = (files.tokenizer_json or {}).get("normalizer") or {}
    charsmap = b64decode(normalizer["precompiled_charsmap"])
    prefix, cleans = settings.get("add_prefix_space", True), settings.get("clean_up_tokenization_spaces", False)
    return pieces, Normalizer(bool(prefix), bool(cleans), charsmap)


def _write_t5(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    names = ("tokenizer.model", "spiece.model")
    path = next((files.directory / name for name in names if (files.directory / name).is_file()), None)
    if path is None:
        raise QuantkitError(f"{files.directory}: there is neither {' nor '.join(names)}")
    spec = read_normalizer(path)
    if spec.is_bpe:
        _write_sentencepiece(files, writer, pre)
        return
    pieces = _read_sentencepiece(files, path)
    pieces.write_tokens(writer, "t5")
    writer.add_add_space_prefix(spec.adds_prefix)
    writer.add_remove_extra_whitespaces(spec.merges_spaces)
    if spec.charsmap:
        writer.add_precompiled_charsmap(spec.charsmap)
    SpecialTokens(files, n_vocab=len(pieces.tokens)).write(writer)


def _write_rwkv(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """RWKV's list of byte strings. Two line ends end a turn of a chat; what ends a text has no number there."""
    tokens = ["<s>", *rwkv.read_tokens(files.directory / rwkv.NAME)]
    n_vocab = files.vocab_size or _RWKV_VOCABULARY
    _check_size(files, len(tokens), n_vocab)
    types = [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1)
    missing = range(len(tokens), n_vocab)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([*tokens, *(f"[PAD{token}]" for token in missing)])
    writer.add_token_types([*map(int, types), *([int(TokenType.UNUSED)] * len(missing))])
    special = SpecialTokens(files)
    if special.chat_template is None:
        special.chat_template = _RWKV_TEMPLATE
    special.set("eot", _RWKV_END_OF_TURN)
    special.ids |= {"bos": 0, "eos": 0}
    special.write(writer)


_STYLES: dict[str, Callable[[CheckpointFiles, Any, str | None], None]] = {
    "auto": _write_auto,
    "bpe": _write_bpe,
    "spm": _write_sentencepiece,
    "llama-hf": _write_llama_hf,
    "spm-or-bpe": _write_sentencepiece_or_bpe,
    "gemma": _write_gemma,
    "spm-prefix": _write_spm_prefix,
    "gemma1": _write_gemma1,
    "gemma3n": _write_gemma3n,
    "nemotron": _write_nemotron,
    "qwen3-omni": _write_qwen3_omni,
    "qwen3-asr": _write_qwen3_asr,
    "hunyuan": _write_hunyuan,
    "hunyuan-moe": _write_hunyuan_moe,
    "kimi": _write_kimi,
    "internlm2": _write_internlm2,
    "internlm3": _write_internlm3,
    "phi3": _write_phi3,
    "gemma4": _write_gemma4,
    "wordpiece": _write_wordpiece,
    "roberta": _write_roberta,
    "modern-bert": _write_modern_bert,
    "jina-bert": _write_jina_bert,
    "eurobert": _write_eurobert,
    "xlm-roberta": _write_xlm_roberta,
    "wordpiece-or-xlm-roberta": _write_wordpiece_or_xlm_roberta,
    "t5": _write_t5,
    "jamba": _write_jamba,
    "rwkv": _write_rwkv,
}
