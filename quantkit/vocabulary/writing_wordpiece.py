"""WordPiece as GGUF metadata, from tokenizer.json or vocab.txt, and what other encoders of BERT's kind have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.special_tokens import SpecialTokens
from quantkit.vocabulary.writing_bpe import bpe_tokens, write_bpe

if TYPE_CHECKING:
    import gguf

# What the reference calls the vocabulary of most English models; no runtime reads it where words are cut by WordPiece.
_WORDPIECE_PRE = "jina-v2-en"
_WORDPIECE_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def write_wordpiece(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """WordPiece from tokenizer.json or vocab.txt, with how many kinds of segments there are."""
    if files.tokenizer_json is not None:
        if (kind := files.model.get("type")) != "WordPiece":
            raise QuantkitError(f"{files.directory / 'tokenizer.json'}: a {kind} tokenizer, where WordPiece is needed")
        tokens, types = bpe_tokens(files)
    else:
        tokens, types = _listed_words(files)
    write_segment_count(files, writer)
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
    files.refuse_more(len(tokens), n_vocab)
    missing = range(len(tokens), n_vocab)
    return tokens + [f"[PAD{i}]" for i in missing], types + [int(TokenType.UNUSED)] * len(missing)


def write_segment_count(files: CheckpointFiles, writer: gguf.GGUFWriter) -> None:
    """Add how many kinds of segments the model tells apart."""
    count = files.config.get("type_vocab_size", 1)
    writer.add_token_type_count(int(count or 0))


def write_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, or WordPiece where there is no tokenizer.json, with how many kinds of segments there are."""
    if files.tokenizer_json is None:
        write_wordpiece(files, writer, pre)
        return
    write_bpe(files, writer, pre)
    write_segment_count(files, writer)


def write_jina_bert(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Byte-level BPE, or WordPiece, with two kinds of segments."""
    if files.model.get("type") == "BPE":
        write_bpe(files, writer, pre)
        writer.add_token_type_count(2)
        return
    write_wordpiece(files, writer, pre)
