"""Unigram as GGUF metadata, from the SentencePiece models of XLM-R and T5, or a tokenizer.json."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.sentencepiece_model import Normalizer, read_normalizer
from quantkit.vocabulary.special_tokens import SpecialTokens
from quantkit.vocabulary.writing_sentencepiece import Pieces, read_sentencepiece, write_sentencepiece
from quantkit.vocabulary.writing_wordpiece import write_segment_count

if TYPE_CHECKING:
    import gguf


def write_xlm_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """Unigram, with the four tokens in front that fairseq put there; or what tokenizer.json says."""
    path = files.directory / "sentencepiece.bpe.model"
    if path.is_file():
        pieces, spec = read_sentencepiece(files, path, at_least=True), read_normalizer(path)
        special = ("<s>", "<pad>", "</s>")
        pieces.tokens = [text.encode() for text in (*special, "<unk>")] + pieces.tokens[3:-1]
        pieces.scores = [0.0] * 4 + pieces.scores[3:-1]
        pieces.types = [int(TokenType.CONTROL)] * 3 + [int(TokenType.UNKNOWN)] + pieces.types[3:-1]
    else:
        pieces, spec = _unigram_of_json(files)
    pieces.write_tokens(writer, "t5")
    writer.add_add_space_prefix(spec.adds_prefix)
    write_segment_count(files, writer)
    writer.add_remove_extra_whitespaces(spec.merges_spaces)
    if spec.charsmap:
        writer.add_precompiled_charsmap(spec.charsmap)
    SpecialTokens(files, n_vocab=len(pieces.tokens)).write(writer)


def _unigram_of_json(files: CheckpointFiles) -> tuple[Pieces, Normalizer]:
    """The tokens of a Unigram tokenizer.json, and how it normalises."""
    path = files.directory / "tokenizer.json"
    if files.model.get("type") != "Unigram":
        raise QuantkitError(f"{path}: no Unigram tokenizer, and there is no sentencepiece.bpe.model")
    tokenizer, settings = files.tokenizer(), files.tokenizer_config or {}
    scores = [float(score) for _, score in files.model["vocab"]]
    texts = {token: text for text, token in tokenizer.ids.items()}
    pieces = Pieces(max(files.vocab_size or 0, tokenizer.n_base))
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


def write_t5(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """Unigram, or BPE, from the SentencePiece model of a T5."""
    names = ("tokenizer.model", "spiece.model")
    path = next((files.directory / name for name in names if (files.directory / name).is_file()), None)
    if path is None:
        raise QuantkitError(f"{files.directory}: there is neither {' nor '.join(names)}")
    spec = read_normalizer(path)
    if spec.is_bpe:
        write_sentencepiece(files, writer, pre)
        return
    pieces = read_sentencepiece(files, path)
    pieces.write_tokens(writer, "t5")
    writer.add_add_space_prefix(spec.adds_prefix)
    writer.add_remove_extra_whitespaces(spec.merges_spaces)
    if spec.charsmap:
        writer.add_precompiled_charsmap(spec.charsmap)
    SpecialTokens(files, n_vocab=len(pieces.tokens)).write(writer)
