"""A checkpoint's vocabulary as GGUF metadata: the keys, types, values and order of the reference converter.

Here are the styles of vocabularies by name, and those that choose among kinds; each kind has a module of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.vocabulary import pretokenizers, rwkv
from quantkit.vocabulary.attributes import TokenType
from quantkit.vocabulary.checkpoint_files import CheckpointFiles
from quantkit.vocabulary.special_tokens import SpecialTokens
from quantkit.vocabulary.writing_bpe import (
    write_bpe,
    write_eurobert,
    write_hunyuan,
    write_hunyuan_moe,
    write_kimi,
    write_modern_bert,
    write_qwen3_asr,
    write_qwen3_omni,
)
from quantkit.vocabulary.writing_sentencepiece import (
    write_gemma1,
    write_gemma4,
    write_internlm2,
    write_internlm3,
    write_jamba,
    write_llama_hf,
    write_nemotron,
    write_phi3,
    write_sentencepiece,
    write_spm_prefix,
)
from quantkit.vocabulary.writing_unigram import write_t5, write_xlm_roberta
from quantkit.vocabulary.writing_wordpiece import write_jina_bert, write_roberta, write_wordpiece

if TYPE_CHECKING:
    import gguf

log = logging.getLogger(__name__)

_CODE_LLAMA_VOCABULARY = 32016
_SMALL_GRANITE_VOCABULARY = 49152
_RWKV_VOCABULARY, _RWKV_END_OF_TURN = 65536, 261
# llama.cpp's name for the template of these models.
_RWKV_TEMPLATE = "rwkv-world"


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

    `config` holds the model's hyper-parameters, as config.json has them or with its text part merged in. `style` is one
    of these kinds:
    - "bpe": byte-level BPE from tokenizer.json.
    - "spm": SentencePiece from tokenizer.model; "spm-prefix": that, with what tokenizer_config.json says of a space in
      front of text; "llama-hf": SentencePiece from a tokenizer.json with byte fallback.
    - "wordpiece": BERT's.
    - "xlm-roberta" and "t5": Unigram from the SentencePiece models of these.
    - "rwkv": RWKV's list of byte strings.
    - "spm-or-bpe": spm if there is a tokenizer.model; "gemma": that, without a space in front of text; "roberta": bpe
      if there is a tokenizer.json, else wordpiece.
    - "auto": the first of spm, llama-hf and bpe whose files are there, with what the reference adds for Llama.
    The other styles are named for the families that do something of their own with one of these.

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
    if files.has_sentencepiece:
        write_sentencepiece(files, writer, pre)
    elif files.is_llama_hf:
        write_llama_hf(files, writer, pre)
    else:
        write_bpe(files, writer, pre)
    n_vocab = files.vocab_size
    if n_vocab == _CODE_LLAMA_VOCABULARY:
        special = SpecialTokens(files, roles=("prefix", "suffix", "middle", "eot"))
        special.set("eot", 32010)
        special.write(writer)
    if n_vocab == _SMALL_GRANITE_VOCABULARY:
        writer.add_bool("tokenizer.ggml.add_bos_token", False)


def _write_sentencepiece_or_bpe(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    write = write_sentencepiece if files.has_sentencepiece else write_bpe
    write(files, writer, pre)


def _write_gemma(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    _write_sentencepiece_or_bpe(files, writer, pre)
    if files.has_sentencepiece:
        writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def _write_gemma3n(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    """As Gemma's, with the tokens of images and sounds, which have no embedding in each layer."""
    config = {k: v for k, v in files.config.items() if k not in ("text_config", "vocab_size_per_layer_input")}
    _write_gemma(CheckpointFiles(files.directory, config, files.family_tokens), writer, pre)


def _write_wordpiece_or_xlm_roberta(files: CheckpointFiles, writer: gguf.GGUFWriter, pre: str | None) -> None:
    write = write_xlm_roberta if files.model.get("type") == "Unigram" else write_wordpiece
    write(files, writer, pre)


def _write_rwkv(files: CheckpointFiles, writer: gguf.GGUFWriter, _pre: str | None) -> None:
    """RWKV's list of byte strings. Two line ends end a turn of a chat; what ends a text has no number there."""
    tokens = ["<s>", *rwkv.read_tokens(files.directory / rwkv.NAME)]
    n_vocab = files.vocab_size or _RWKV_VOCABULARY
    files.refuse_more(len(tokens), n_vocab)
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
    "bpe": write_bpe,
    "spm": write_sentencepiece,
    "llama-hf": write_llama_hf,
    "spm-or-bpe": _write_sentencepiece_or_bpe,
    "gemma": _write_gemma,
    "spm-prefix": write_spm_prefix,
    "gemma1": write_gemma1,
    "gemma3n": _write_gemma3n,
    "nemotron": write_nemotron,
    "qwen3-omni": write_qwen3_omni,
    "qwen3-asr": write_qwen3_asr,
    "hunyuan": write_hunyuan,
    "hunyuan-moe": write_hunyuan_moe,
    "kimi": write_kimi,
    "internlm2": write_internlm2,
    "internlm3": write_internlm3,
    "phi3": write_phi3,
    "gemma4": write_gemma4,
    "wordpiece": write_wordpiece,
    "roberta": write_roberta,
    "modern-bert": write_modern_bert,
    "jina-bert": write_jina_bert,
    "eurobert": write_eurobert,
    "xlm-roberta": write_xlm_roberta,
    "wordpiece-or-xlm-roberta": _write_wordpiece_or_xlm_roberta,
    "t5": write_t5,
    "jamba": write_jamba,
    "rwkv": _write_rwkv,
}
