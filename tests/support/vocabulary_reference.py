"""llama.cpp's own tokenizer, through llama-cpp-python, and small vocabularies to try it on."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from quantkit.formats.gguf import Metadata, ValueType, encode_header

SAMPLE = (
    "It's what you'd expect: we'll tokenize, they've tokenized, he's TOKENIZING. 'Tis 1234567 + 89 = 3.14159!\n\n"
    "def f(x):\n    return x**2  # a comment\n\tprint('élève', \"naïve\")\r\n"
    "Der Fluß, ÀÉÎ, Ελληνικά, Русский текст, 日本語のテキスト、中文文本。한국어 텍스트 ไทย "
    "हिन्दी العربية 😀🎉 x² ½ Ⅷ ٣٤٥\n"
) * 3
# What text in the tests is made of: all that the splitters tell apart, common and rare.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*"abzEStTmMdDrRvVlL'' \t\n\r!?.,:;/-_<>|()[]{}0123456789$+=^~`\"&#%@*\\\x00\x0b\x0c\x1c\x7f"]),
        st.sampled_from(["'s", "'RE", "  ", "   ", "\n\n", " \n", "\r\n", "123", "4567", "<s>", "</s>", "<|user|>"]),
        st.sampled_from(
            [*"\u0301\u0308\u0e31ÀßñЖщΩ中文日本ひカ한국😀\u200d\ufe0f\u00a0\u2003\u3000\x85٣५²½Ⅷªºſ\u2028\u2581"]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
).map("".join)


class LlamaCpp:
    """A vocabulary loaded by llama.cpp."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._api = llama_cpp
        _silence()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)

    def close(self) -> None:
        self._api.llama_model_free(self._model)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        out = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self.vocab, data, len(data), out, room, add_special, parse_special)
        assert count >= 0
        return list(out[:count])

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        given = (self._api.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(1 << 22)
        count = self._api.llama_detokenize(self.vocab, given, len(ids), buffer, len(buffer), False, special)
        assert count >= 0
        return buffer.raw[:count].decode("utf-8", "replace")

    def facts(self) -> tuple[int | None, int | None, int | None, bool, bool]:
        """BOS, EOS, EOT, and whether the first two are added."""
        api = self._api
        ids = (api.llama_vocab_bos(self.vocab), api.llama_vocab_eos(self.vocab), api.llama_vocab_eot(self.vocab))
        bos, eos, eot = (None if token < 0 else token for token in ids)
        return bos, eos, eot, api.llama_vocab_get_add_bos(self.vocab), api.llama_vocab_get_add_eos(self.vocab)

    def is_control(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_control(self.vocab, token))


@cache
def _silence() -> object:
    import llama_cpp

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, data: object) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    return quiet


def write_gguf(path: Path, metadata: Metadata) -> Path:
    """A GGUF of metadata alone, which llama.cpp loads when it is asked for the vocabulary only."""
    whole = Metadata()
    whole.set("general.architecture", ValueType.STRING, "llama")
    for key, value in (("block_count", 1), ("context_length", 512), ("embedding_length", 64)):
        whole.set(f"llama.{key}", ValueType.UINT32, value)
    whole.set("llama.feed_forward_length", ValueType.UINT32, 64)
    whole.set("llama.attention.head_count", ValueType.UINT32, 2)
    whole.set("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5)
    whole.update(metadata)
    path.write_bytes(encode_header(whole, [], 32))
    return path


@cache
def byte_level_vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of a byte-level BPE trained on SAMPLE with words that no pre-tokenizer would keep whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    words = [SAMPLE[i : i + 9] for i in range(len(SAMPLE))]
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tuple(tokens), tuple(merges)


def byte_level_metadata(pre: str, *, drop: Sequence[str] = ()) -> Metadata:
    """Metadata of that vocabulary with special tokens, as a converter writes it. `drop` leaves tokens out."""
    tokens, merges = byte_level_vocabulary()
    kept = [token for token in tokens if token not in drop]
    special = ["<s>", "</s>", "<|user|>", "<tool>", "  "]
    types = [1] * len(kept) + [3, 3, 3, 4, 4]
    metadata = Metadata()
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "gpt2")
    metadata.set("tokenizer.ggml.pre", ValueType.STRING, pre)
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, kept + special, ValueType.STRING)
    metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, types, ValueType.INT32)
    metadata.set("tokenizer.ggml.merges", ValueType.ARRAY, merges, ValueType.STRING)
    metadata.set("tokenizer.ggml.bos_token_id", ValueType.UINT32, len(kept))
    metadata.set("tokenizer.ggml.eos_token_id", ValueType.UINT32, len(kept) + 1)
    return metadata


def sentencepiece_metadata() -> Metadata:
    """A SentencePiece vocabulary with ties between scores, characters that are no tokens, and user-defined tokens."""
    pieces: dict[str, float] = {}
    text = SAMPLE.replace(" ", "\u2581")
    for length in range(1, 7):
        for start in range(0, len(text), 1 + length // 2):
            # Scores repeat, so that the order of equal ones matters.
            pieces.setdefault(text[start : start + length], -float(len(pieces) // 3))
    for rare in "日ðЖ😀":
        pieces.pop(rare, None)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    for piece, score in pieces.items():
        tokens.append(piece)
        types.append(1)
        scores.append(score)
    tokens += ["<|user|>", "<tool>", "  "]
    types += [3, 4, 4]
    scores += [-1000.0] * 3
    metadata = Metadata()
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "llama")
    metadata.set("tokenizer.ggml.pre", ValueType.STRING, "default")
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    metadata.set("tokenizer.ggml.scores", ValueType.ARRAY, scores, ValueType.FLOAT32)
    metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, types, ValueType.INT32)
    metadata.set("tokenizer.ggml.bos_token_id", ValueType.UINT32, 1)
    metadata.set("tokenizer.ggml.eos_token_id", ValueType.UINT32, 2)
    return metadata


def gemma4_metadata() -> Metadata:
    """Gemma 4's kind of BPE: characters instead of bytes, spaces as U+2581, byte tokens to fall back to."""
    words = [SAMPLE.replace(" ", "\u2581")[i : i + 9].replace("\n", "") for i in range(len(SAMPLE))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=700, show_progress=False, min_frequency=1))
    model = json.loads(tokenizer.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    learned = [token for token in learned if token not in ("日", "語")]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "\n", "\n\n"]
    types = [3, 3, 3, 3] + [6] * 256 + [1] * (len(learned) + 2) + [3, 4]
    tokens += ["<|user|>", "<tool>"]
    metadata = Metadata()
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "gemma4")
    metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, tokens, ValueType.STRING)
    metadata.set("tokenizer.ggml.token_type", ValueType.ARRAY, types, ValueType.INT32)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata.set("tokenizer.ggml.merges", ValueType.ARRAY, merges, ValueType.STRING)
    for role, token in (("padding", 0), ("eos", 1), ("bos", 2), ("unknown", 3)):
        metadata.set(f"tokenizer.ggml.{role}_token_id", ValueType.UINT32, token)
    metadata.set("tokenizer.ggml.add_space_prefix", ValueType.BOOL, False)
    return metadata
