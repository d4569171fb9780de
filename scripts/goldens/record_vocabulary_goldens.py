"""Record what the reference converter writes for small vocabularies of every kind, as goldens of the tests.

    python scripts/goldens/record_vocabulary_goldens.py path/to/llama.cpp [CASE ...]

Makes tests/goldens/vocabulary/: a directory of tokenizer files for each case, and expected.json with the keys that
the converter of that llama.cpp adds. Needs torch, transformers and sentencepiece, which the tests do not. Cases that
are named are made anew, the others stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TARGET = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "vocabulary"
TEXT = (
    "It's what you'd expect: we'll tokenize, they've tokenized. 1234567 + 89 = 3.14!\n\ndef f(x):\n    return x**2\n"
    "Der Fluß, ÀÉÎ, Ελληνικά, Русский, 日本語、中文。한국어 ไทย हिन्दी العربية 😀 x² ½\n"
)
WORDS = [TEXT[i : i + 9] for i in range(len(TEXT))]
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
FAST = "PreTrainedTokenizerFast"
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def byte_level(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE of 300 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def split(pattern: str) -> Any:
    """A pre-tokenizer of one expression."""
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def byte_fallback() -> Tokenizer:
    """SentencePiece as tokenizer.json tells it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [word.replace(" ", "▁") for word in WORDS],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


def template(tokenizer: Tokenizer, single: str, pair: str, *texts: str) -> Any:
    """A template that adds special tokens."""
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(text, tokenizer.token_to_id(text)) for text in texts]
    )


def save(name: str, tokenizer: Tokenizer | None, settings: Any, config: dict[str, Any], **files: Any) -> None:
    """Write the files of a case; in the names of `files` a double underscore stands for a dot."""
    if name not in wanted():
        return
    directory = TARGET / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    contents = {"config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}}
    contents |= {key.replace("__", "."): value for key, value in files.items()}
    if settings is not None:
        contents["tokenizer_config.json"] = settings
    if tokenizer is not None:
        contents["tokenizer.json"] = json.loads(tokenizer.to_str())
    for file, content in contents.items():
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            content = text.encode()
        (directory / file).write_bytes(content)


def make_cases() -> None:
    """Write the tokenizer files of every case."""
    TARGET.mkdir(exist_ok=True)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)

    llama3 = byte_level(split(LLAMA3), ignore_merges=True)
    llama3.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    odd = [AddedToken(text, normalized=False) for text in ("▁odd", "é!")]
    llama3.add_tokens(["<|reserved|>", "<tool_call>", *odd])
    begin = "<|begin_of_text|>"
    after = template(llama3, f"{begin} $A", f"{begin} $A {begin} $B", begin)
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), after])
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool use", "template": "{{ b }}"}]
    settings = {"tokenizer_class": FAST, "bos_token": begin, "eos_token": "<|end_of_text|>", "chat_template": templates}
    settings["pad_token"] = {"__type": "AddedToken", "content": "<|reserved|>"}
    save("llama3", llama3, settings, {"vocab_size": llama3.get_vocab_size() + 5, "eos_token_id": [1, 2]})

    qwen2 = byte_level(split(QWEN2), normalizers.NFC())
    qwen2.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    qwen2.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = {"tokenizer_class": FAST, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    settings |= {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    config = {"vocab_size": 320, "bos_token_id": 300, "eos_token_id": 302}
    save("qwen2", qwen2, settings, config, chat_template__jinja="{{ jinja }}")

    gpt2 = byte_level(bytes_alone)
    gpt2.add_special_tokens(["<|endoftext|>"])
    settings = {"tokenizer_class": FAST, **{f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk")}}
    settings |= {"add_prefix_space": False}
    settings["added_tokens_decoder"] = {"5": {"content": gpt2.id_to_token(5), "special": True, **PLAIN}}
    save("gpt2", gpt2, settings, {"vocab_size": 49152})

    ended = byte_level(bytes_alone, normalizers.NFC())
    ended.add_special_tokens(["<bos>", "<eos>", "<sep>", "<turn_end>"])
    pair = "<bos> $A <sep> $B:1 <eos>:1"
    ended.post_processor = template(ended, "<bos> $A <eos>", pair, "<bos>", "<eos>", "<sep>")
    settings = {"tokenizer_class": FAST, "bos_token": "<bos>", "eos_token": "<turn_end>", "sep_token": "<sep>"}
    config = {"vocab_size": 310, "pad_token_id": 3, "text_config": {"mask_token_id": 7}}
    save(
        "template", ended, settings | {"add_eos_token": False}, config, chat_template__json={"chat_template": "{{ j }}"}
    )

    corpus = TARGET / "corpus.txt"
    corpus.write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(TARGET / "spm"), vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, user_defined_symbols=["<mask>", "▁▁"], control_symbols=["<ctl>"],
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
    )  # fmt: skip
    model = (TARGET / "spm.model").read_bytes()
    for path in (corpus, TARGET / "spm.model", TARGET / "spm.vocab"):
        path.unlink()
    added = {"0": ("<unk>", True), "1": ("<s>", True), "2": ("</s>", True), "430": ("<|user|>", False)}
    added |= {"431": ("▁x▁", False), "432": ("<extra>", True), "9999": ("far", True)}
    decoder = {token: {"content": text, "special": special, **PLAIN} for token, (text, special) in added.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", **ENDS, "added_tokens_decoder": decoder}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    more = {"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>", "add_prefix_space": True}
    files = {"tokenizer__model": model, "added_tokens__json": {"<added>": 433, "<far>": 5000}}
    save("spm", None, settings | more | {"chat_template": "{{ x }}"}, {"vocab_size": 440, **ids}, **files)
    settings_of_code = {"tokenizer_class": "CodeLlamaTokenizer", **ENDS}
    save("codellama", None, settings_of_code, {"vocab_size": 32016, **ids}, tokenizer__model=model)

    hf = byte_fallback()
    hf.add_special_tokens(["<|sys|>"])
    hf.add_tokens(["<|user|>", AddedToken("  ", normalized=False)])
    hf.post_processor = template(hf, "<s> $A", "<s> $A <s> $B", "<s>")
    settings_of_hf = {"tokenizer_class": FAST, **ENDS, "unk_token": "<unk>", "additional_special_tokens": ["<|sys|>"]}
    save("llama_hf", hf, settings_of_hf, {"vocab_size": 408, **ids})
    save("phi3", hf, settings, {"vocab_size": 10000}, tokenizer__model=model)

    gemma = byte_fallback()
    gemma.normalizer = normalizers.Replace(" ", "▁")
    gemma.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    gemma.add_special_tokens(["<|tool_call>"])
    for name in ("gemma4", "gemma_bpe"):
        save(name, gemma, {"tokenizer_class": FAST, **ENDS}, {"vocab_size": 500})

    make_encoders()


def make_encoders() -> None:
    """The cases of WordPiece and Unigram."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    words.post_processor = template(words, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
    words.decoder = decoders.WordPiece()
    roles = ("pad", "unk", "cls", "sep", "mask")
    settings: dict[str, Any] = {f"{role}_token": text for role, text in zip(roles, special, strict=True)}
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    count = words.get_vocab_size()
    config = {"model_type": "bert", "vocab_size": count + 3, "type_vocab_size": 2, "pad_token_id": 0}
    save("bert", words, settings, config)
    listed = "\n".join(sorted(words.get_vocab(), key=words.get_vocab().__getitem__)) + "\n"
    save("bert_txt", None, settings, config | {"vocab_size": count}, vocab__txt=listed)

    model = unigram()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = pieces.vocab_size() + 2
    roles = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    settings = {"tokenizer_class": "XLMRobertaTokenizer", **{f"{role}_token": text for role, text in roles.items()}}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = {"model_type": "xlm-roberta", "vocab_size": size, "type_vocab_size": 1, **ids}
    save("xlmr", None, settings, config, sentencepiece__bpe__model=model)

    listed = [(pieces.id_to_piece(token), pieces.get_score(token)) for token in range(3, pieces.vocab_size())]
    first = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    json_words = Tokenizer(models.Unigram([*first, *listed, ("<mask>", 0.0)], 3))
    charsmap = read_normalizer(model)
    json_words.normalizer = normalizers.Precompiled(charsmap)
    json_words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    json_words.decoder = decoders.Metaspace()
    json_words.add_special_tokens([text for text, _ in first] + ["<mask>"])
    json_words.post_processor = template(json_words, "<s> $A </s>", "<s> $A </s> </s> $B </s>", "<s>", "</s>")
    save("xlmr_json", json_words, settings | {"clean_up_tokenization_spaces": True}, config)

    t5 = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    added = {"<extra_id_0>": size - 1, "<far>": 5000}
    config = {"model_type": "t5", "vocab_size": size, "eos_token_id": 1, "pad_token_id": 0}
    model = unigram(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    save("t5", None, t5, config, spiece__model=model, added_tokens__json=added)


def unigram(**ids: int) -> bytes:
    """A SentencePiece model of Unigram, with a few replacements of its own."""
    corpus, rules, prefix = TARGET / "corpus.txt", TARGET / "rules.tsv", TARGET / "unigram"
    corpus.write_text(TEXT)
    spaces = [0x9, 0xA, 0xB, 0xC, 0xD, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
    rules.write_text("FB01\t66 69\n41 30A\tE5\n" + "".join(f"{code:X}\t20\n" for code in spaces))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(prefix), vocab_size=160, model_type="unigram",
        character_coverage=0.98, control_symbols=["<ctl>"], user_defined_symbols=["<own>"], hard_vocab_limit=False,
        minloglevel=2, normalization_rule_tsv=str(rules), **ids,
    )  # fmt: skip
    model = prefix.with_suffix(".model")
    made = model.read_bytes()
    for path in (corpus, rules, model, prefix.with_suffix(".vocab")):
        path.unlink()
    return made


def read_normalizer(model: bytes) -> bytes:
    """The table of replacements in a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return bytes(proto.normalizer_spec.precompiled_charsmap)


# The style that each case is converted in, and the pre-tokenizer that the reference has to be told.
CASES = {
    "llama3": ("auto", "llama-bpe"),
    "qwen2": ("auto", "qwen2"),
    "gpt2": ("auto", "gpt-2"),
    "template": ("bpe", "olmo"),
    "spm": ("spm", ""),
    "codellama": ("auto", ""),
    "llama_hf": ("auto", ""),
    "phi3": ("phi3", ""),
    "gemma4": ("gemma4", ""),
    "gemma_bpe": ("bpe", "gemma4"),
    "bert": ("wordpiece", "jina-v2-en"),
    "bert_txt": ("wordpiece", "jina-v2-en"),
    "xlmr": ("xlm-roberta", ""),
    "xlmr_json": ("xlm-roberta", ""),
    "t5": ("t5", ""),
}


def wanted() -> list[str]:
    """The cases to make."""
    return sys.argv[2:] or list(CASES)


def convert(directory: Path, style: str, pre: str) -> list[Any]:
    """What the reference converter writes: key, type, and value, of an array its length and a digest."""
    import conversion.bert
    import conversion.gemma
    import conversion.llama
    import conversion.phi
    import conversion.t5
    import gguf

    family = {
        "phi3": conversion.phi.Phi3MiniModel,
        "gemma4": conversion.gemma.Gemma4Model,
        "wordpiece": conversion.bert.BertModel,
        "xlm-roberta": conversion.bert.BertModel,
        "t5": conversion.t5.T5Model,
    }
    kind = family.get(style, conversion.llama.LlamaModel)
    model = kind.__new__(kind)
    model.dir_model = directory
    config = json.loads((directory / "config.json").read_text())
    model.hparams = config | config.get("text_config", {})
    model.gguf_writer = gguf.GGUFWriter(path=None, arch="llama")
    model.is_mistral_format, model.origin_hf_arch, model.is_eagle3 = False, None, False
    model.get_vocab_base_pre = lambda tokenizer: pre
    methods = {"bpe": "_set_vocab_gpt2", "spm": "_set_vocab_sentencepiece", "xlm-roberta": "_xlmroberta_set_vocab"}
    set_vocab = methods.get(style, "set_vocab")
    getattr(model, set_vocab)()
    return [[key, int(value.type), plain(value.value)] for key, value in model.gguf_writer.kv_data[0].items()]


def plain(value: Any) -> Any:
    """A value as JSON holds it, long ones as their length and SHA-256."""
    if not isinstance(value, (list, tuple, bytes)):
        return value
    items: list[Any] = [item.decode() if isinstance(item, bytes) else item for item in value]
    items = [int(item) if isinstance(item, int) else item for item in items]
    return [len(items), hashlib.sha256(json.dumps(items).encode()).hexdigest()]


def main() -> None:
    """Make the cases and record what the reference writes."""
    source = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    make_cases()
    path = TARGET / "expected.json"
    expected = json.loads(path.read_text()) if path.is_file() else {}
    for name in wanted():
        style, pre = CASES[name]
        expected[name] = {"style": style, "values": convert(TARGET / name, style, pre)}
    path.write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
