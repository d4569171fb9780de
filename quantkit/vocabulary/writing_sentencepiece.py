"""SentencePiece as GGUF metadata, from tokenizer.model or a tokenizer.json, and what single families add to it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.special_tokens import SpecialTokens, looks_special
from quantkit.vocabulary.writing_bpe import write_bpe

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)

# The end of a turn in Gemma 1, which its files do not name.
_GEMMA1_END_OF_TURN = 107
# Tokens that Gemma 4's chat parser has to see.
_GEMMA4_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)


class Pieces:
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


def write_sentencepiece(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece from tokenizer.model, with the tokens that other files add."""
    _sentencepiece_pieces(files).write(files, writer)


def _sentencepiece_pieces(files: CheckpointFiles) -> Pieces:
    """tokenizer.model, with added_tokens.json and what tokenizer_config.json adds."""
    pieces = read_sentencepiece(files)
    for token, entry in files.declared_tokens.items():
        text = entry["content"]
        if entry.get("special") or looks_special(text):
            kind = TokenType.CONTROL
        else:
            text, kind = text.replace("\u2581", " "), TokenType.USER_DEFINED
        pieces.put(token, text, -1000.0, kind)
    return pieces


def read_sentencepiece(
    files: CheckpointFiles,
    path: Path | None = None,
    *,
    unused: str | None = None,
    nul: str | None = None,
    at_least: bool = False,
) -> Pieces:
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
    pieces = Pieces(max(n_vocab, n_pieces) if at_least else n_vocab)
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


def write_spm_prefix(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """SentencePiece, with what tokenizer_config.json says of a space in front of text."""
    write_sentencepiece(files, writer, pre)
    prefix = (files.tokenizer_config or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", bool(prefix))


def write_gemma1(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """SentencePiece without a space in front of text, with the end of a turn, which no file names."""
    write_sentencepiece(files, writer, pre)
    special = SpecialTokens(files, roles=("eot",))
    special.chat_template = None
    special.set("eot", _GEMMA1_END_OF_TURN)
    special.write(writer)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def write_nemotron(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """SentencePiece, with the tokens of padding and of the unknown, which no file names."""
    write_sentencepiece(files, writer, pre)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 1)


def write_internlm2(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece; what ends a turn of a chat ends a text."""
    from sentencepiece import SentencePieceProcessor

    pieces = read_sentencepiece(files, unused="[UNUSED", nul="\U0001f409")
    declared = files.declared_tokens | files.listed_tokens
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


def write_internlm3(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece; what ends a turn of a chat ends a text."""
    pieces = _sentencepiece_pieces(files)
    pieces.write_tokens(writer)
    special = SpecialTokens(files, n_vocab=len(pieces.tokens))
    prefix = (files.tokenizer_config or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_bool("tokenizer.ggml.add_space_prefix", bool(prefix))
    for token, entry in files.declared_tokens.items():
        if entry.get("special") and entry["content"] == "<|im_end|>" and "eos" in special.ids:
            special.ids["eos"] = token
    special.write(writer)


def write_phi3(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """SentencePiece, where the tokens that files add are what these say, or byte-level BPE (Phi-4)."""
    if (files.tokenizer_config or {}).get("tokenizer_class") == "GPT2Tokenizer":
        write_bpe(files, writer, pre)
        return
    pieces = read_sentencepiece(files)
    for token, entry in (*files.declared_tokens.items(), *files.listed_tokens.items()):
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        pieces.put(token, entry["content"], -1000.0, kind)
    pieces.write(files, writer)


# ---- from a tokenizer.json with byte fallback


def _llama_hf_tokens(files: CheckpointFiles) -> tuple[list[bytes], list[float], list[int]]:
    if not files.is_llama_hf:
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


def write_llama_hf(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece from a tokenizer.json with byte fallback."""
    tokens, scores, types = _llama_hf_tokens(files)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    SpecialTokens(files, n_vocab=len(tokens)).write(writer)


def write_jamba(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """SentencePiece from either file."""
    if files.has_sentencepiece:
        write_sentencepiece(files, writer, pre)
    else:
        write_llama_hf(files, writer, pre)
        writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def write_gemma4(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """SentencePiece from tokenizer.json, with its merges, and tokens that are seen in chats."""
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
