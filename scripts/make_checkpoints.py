"""Tiny random checkpoints, the same bytes on every machine, for the conversion tests and their goldens.

    python scripts/make_checkpoints.py DIRECTORY

Weights come from the raw bits of a counter-based generator, the vocabulary from a list of merges, so nothing
depends on the version of a library.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import family_recipes
import projector_recipes

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# fmt: off
MERGES = (
    "Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "e n", "o r", "Ġ w", "Ġ c", "i t", "i s",
    "a n", "e s", "Ġ o", "Ġ f", "e d", "in g", "Ġ b", "Ġ p", "o u", "a l", "Ġ m", "a r", "Ġ in", "Ġt o", "Ġo f",
    "Ġa n", "Ġan d", "l l", "Ġ d", "1 2", "12 3", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ",
)
# fmt: on
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CARD = """---
license: apache-2.0
language:
- en
- no
tags:
- tiny
- test
pipeline_tag: text-generation
base_model: example-org/Base-Model-7B-v1.5
datasets:
- example-org/some-data
---

# A model of a test
"""


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: its config.json, how its weights are stored, and the files beside them.

    `letters` are the shapes of its tensors as family_recipes.py writes them, `tensors` those that record_recipes.py
    recorded (a Llama's without either), `norm_at` is what its norms are near, `vocabulary` says which tokenizer it
    has, and `added` which tokens more.
    """

    config: dict[str, Any]
    dtype: str = "BF16"
    norm_dtype: str | None = None
    shards: int = 1
    tied: bool = False
    biases: bool = False
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    letters: dict[str, str] | None = None
    tensors: dict[str, str] | None = None
    norm_at: float = 1
    vocabulary: str = "bpe"
    added: tuple[str, ...] = ()


def _recorded(folder: str) -> dict[str, Recipe]:
    """The recipes that record_recipes.py wrote into a folder."""
    paths = sorted((Path(__file__).resolve().parent / "recipes" / folder).glob("*.json"))
    return {path.stem: Recipe(**json.loads(path.read_text(encoding="utf-8"))) for path in paths}


def _config(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 296,
        "eos_token_id": 297,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": 320,
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


# By directory name, from which general.* takes its share.
RECIPES = {
    "Tiny-Llama-0.1M-Instruct-v0.2": Recipe(
        _config(
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        ),
        shards=2,
        tied=True,
        files={
            "README.md": CARD,
            "chat_template.jinja": TEMPLATE,
            "generation_config.json": json.dumps(
                {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [297, 299]}
            ),
        },
    ),
    "tiny-llama3-scaling": Recipe(
        _config(
            rope_theta=10000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 128,
            },
            num_key_value_heads=1,
        ),
        dtype="F16",
        files={"generation_config.json": "{ not json"},
    ),
    "tiny-linear": Recipe(
        _config(
            num_key_value_heads=None,
            max_position_embeddings=None,
            rms_norm_eps=None,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling={"type": "linear", "factor": 4.0},
            _name_or_path="example-org/Linear-13B-chat",
        ),
        dtype="F32",
        biases=True,
    ),
    "tiny-yarn": Recipe(
        _config(
            head_dim=24,
            intermediate_size=100,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000000,
                "factor": 4,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.25,
            },
        ),
        norm_dtype="F32",
    ),
    "tiny-mistral": Recipe(
        _config(
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            head_dim=None,
            num_attention_heads=8,
            num_key_value_heads=None,
            max_position_embeddings=None,
            sliding_window=128,
            rope_theta=100000.0,
        ),
        shards=3,
        tokenizer_config={
            "add_bos_token": False,
            "add_prefix_space": False,
            "chat_template": [
                {"name": "default", "template": TEMPLATE},
                {"name": "tool_use", "template": "{{ tools }}" + TEMPLATE},
            ],
        },
    ),
}
FAMILIES = {
    name: Recipe(config, letters=letters, **changes)
    for name, (config, letters, changes) in family_recipes.FAMILIES.items()
} | _recorded(".")
ADDED = (
    ("<|begin|>", True),
    ("<|finish|>", True),
    ("<|start|>", True),
    ("<|end|>", True),
    ("<tool>", False),
    (" two words ", False),
)


def _byte_alphabet() -> list[str]:
    """A printable character for each byte, as byte-level BPE writes them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256)]


def _bytes_in_order() -> str:
    """The printable character for each byte, by the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in printable]
    return "".join(chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256))


def tokenizer(more: tuple[tuple[str, bool], ...] = ()) -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE of 296 tokens with Llama 3's pre-tokenizer, and six added tokens, or `more`."""
    tokens = _byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    first = len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    bos = {"id": ADDED[0][0], "ids": [first], "tokens": [ADDED[0][0]]}
    single = [{"SpecialToken": {"id": ADDED[0][0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": first + i, "content": text, **flags, "normalized": not special, "special": special}
            for i, (text, special) in enumerate((*ADDED, *more))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {ADDED[0][0]: bos},
        },
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in MERGES],
        },
    }


def _field(number: int, value: float | str | bytes) -> bytes:
    """A field of a protocol buffer: text or a message, a float, or a whole number below 128."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number << 3, value])
    data = value.encode() if isinstance(value, str) else value
    return bytes([number << 3 | 2, len(data)]) + data


WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wordpiece() -> dict[str, Any]:
    """A tokenizer.json: BERT's, with words and letters that begin a word or go on."""
    words = [merge.replace(" ", "").replace("Ġ", "").lower() for merge in MERGES]
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    tokens = list(dict.fromkeys([*WORDPIECE_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in ("[CLS]", "[SEP]")}
    begin, end = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("[CLS]", "[SEP]"))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        # As sentence encoders have it.
        "truncation": {"max_length": 128, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [{"id": tokens.index(text), "content": text, **flags} for text in WORDPIECE_SPECIAL],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first, end],
            "pair": [begin, first, end, second, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": special,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }


def merged_bytes(merge: str) -> bytes:
    """The bytes of the token that a merge makes."""
    alphabet = {character: byte for byte, character in enumerate(_bytes_in_order())}
    return bytes(alphabet[character] for character in merge.replace(" ", ""))


def byte_fallback() -> dict[str, Any]:
    """A tokenizer.json: Gemma 4's, BPE on characters, with byte tokens for those that are none of its own."""
    pairs = [merge.replace("Ġ", "▁") for merge in MERGES[:24]]
    letters = sorted({letter for pair in pairs for letter in pair.replace(" ", "")})
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [pair.replace(" ", "") for pair in pairs]
    tokens += [f"<unused{i}>" for i in range(317 - len(tokens))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [(text, True) for text in special] + [("<|tool_call>", True), ("<|turn>", True), ("<|extra|>", False)]
    ids = {text: tokens.index(text) if text in tokens else len(tokens) + i - 4 for i, (text, _) in enumerate(added)}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    first = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[text], "content": text, **flags, "special": special} for text, special in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in pairs],
        },
    }


def sentencepiece(gemma: bool, unigram: bool = False) -> bytes:
    """A tokenizer.model of some 310 pieces, BPE with byte fallback: Llama's special tokens first, or Gemma's.

    With `unigram` a model of that kind.
    """
    special = ("<pad>", "<eos>", "<bos>", "<unk>") if gemma else ("<unk>", "<s>", "</s>")
    pieces = [(text, 0.0, 2 if text == "<unk>" else 3) for text in special]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(0 if unigram else 256)]
    words = [merge.replace(" ", "").replace("Ġ", "▁") for merge in MERGES[:28]]
    words += sorted({letter for word in words for letter in word})
    pieces += [(word, float(-i), 1) for i, word in enumerate(words)]
    pieces += [("<start_of_turn>", 0.0, 4), ("<unused0>", 0.0, 5)]
    model = b"".join(
        _field(1, _field(1, text) + _field(2, score) + (_field(3, kind) if kind != 1 else b""))
        for text, score, kind in pieces
    )
    # Of the trainer: its model_type (3) is BPE, and byte_fallback (35, beyond the one-byte tags) is on.
    if unigram:
        return model + _field(2, _field(3, 1)) + _field(3, _field(3, 1))
    return model + _field(2, _field(3, 2) + bytes([0x98, 0x02, 1])) + _field(3, _field(3, int(not gemma)))


def _write_vocabulary(recipe: Recipe, directory: Path, write: Callable[[str, object], None]) -> None:
    if recipe.vocabulary in ("bpe", "gpt2"):
        # transformers' classes for some families add this token where it is missing.
        more = ("<|endoftext|>",) if recipe.vocabulary == "gpt2" else recipe.added
        write("tokenizer.json", tokenizer(tuple((text, True) for text in more)))
        special = {"bos_token": ADDED[0][0], "eos_token": ADDED[1][0], "pad_token": ADDED[1][0]}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **recipe.tokenizer_config}
        write("tokenizer_config.json", settings)
        return
    if recipe.vocabulary == "wordpiece":
        write("tokenizer.json", wordpiece())
        roles = zip(("pad", "unk", "cls", "sep", "mask"), WORDPIECE_SPECIAL, strict=True)
        write("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **{f"{r}_token": t for r, t in roles}})
        return
    if recipe.vocabulary == "rwkv":
        words = (
            [bytes([byte]) for byte in range(256)]
            + [merged_bytes(merge) for merge in MERGES]
            + ["🎩 hat", "é🎩", b"\xc3\\'"]
        )
        lines = []
        for token, word in enumerate(words, 1):
            size = len(word.encode() if isinstance(word, str) else word)
            lines.append(f"{token} {word!r} {size}\n")
        (directory / "rwkv_vocab_v20230424.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
        write("tokenizer_config.json", {"tokenizer_class": "RwkvTokenizer", "chat_template": TEMPLATE})
        return
    if recipe.vocabulary in ("kimi", "hunyuan-moe"):
        tokens = [bytes([byte]) for byte in range(256)] + [merged_bytes(merge) for merge in MERGES]
        lines = [f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
        (directory / ("tiktoken.model" if recipe.vocabulary == "kimi" else "hy.tiktoken")).write_text("".join(lines))
        settings: dict[str, Any] = {"tokenizer_class": "HYTokenizer", "chat_template": TEMPLATE}
        if recipe.vocabulary == "kimi":
            named = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>")
            listed = {str(len(tokens) + i): {"content": text, "special": True} for i, text in enumerate(named)}
            settings = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "added_tokens_decoder": listed}
        write("tokenizer_config.json", settings)
        return
    if recipe.vocabulary == "gemma4":
        write("tokenizer.json", byte_fallback())
        ends = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
        write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ends})
        return
    if recipe.vocabulary == "t5":
        (directory / "spiece.model").write_bytes(sentencepiece(False, unigram=True))
        write("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"})
        return
    if recipe.vocabulary == "unigram":
        (directory / "sentencepiece.bpe.model").write_bytes(sentencepiece(False, unigram=True))
        ends = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "mask_token": "<mask>",
        }
        write("tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", "pad_token": "<pad>", **ends})
        return
    gemma = recipe.vocabulary == "gemma"
    (directory / "tokenizer.model").write_bytes(sentencepiece(gemma))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ends = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    settings = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "bos_token": ends[0],
        "eos_token": ends[1],
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": TEMPLATE,
    }
    if recipe.vocabulary in ("phi3", "internlm2", "internlm3"):
        added = {"<|endoftext|>": 314, "<|user|>": 315, "<|tool|>": 316}
        if recipe.vocabulary != "phi3":
            # What ends a turn of a chat, in the place of a token that is not used.
            added = {"<|im_start|>": 307, "<|im_end|>": 308}
            settings["add_prefix_space"] = False
        settings["added_tokens_decoder"] = {
            str(token): {"content": text, "special": text != "<|tool|>", **flags} for text, token in added.items()
        }
        if recipe.vocabulary == "phi3":
            write("added_tokens.json", added)
    write("tokenizer_config.json", settings)


def unfold(name: str) -> list[str]:
    """All names that a name with `{0-3}` or `{0,2}` in it stands for."""
    if (found := re.search(r"\{([^}]*)\}", name)) is None:
        return [name]
    first, _, last = found[1].partition("-")
    numbers = [str(n) for n in range(int(first), int(last) + 1)] if last else first.split(",")
    return [whole for n in numbers for whole in unfold(f"{name[: found.start()]}{n}{name[found.end() :]}")]


def _stored(recipe: Recipe) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and shape of each tensor, in the order of the file."""
    if recipe.tensors is not None:
        listed = {name: said.split() for folded, said in recipe.tensors.items() for name in unfold(folded)}
        return {
            name: (
                next((word for word in listed[name] if not word.isdecimal()), recipe.dtype),
                tuple(int(word) for word in listed[name] if word.isdecimal()),
            )
            for name in sorted(listed)
        }
    stored = {}
    for name, shape in _shapes(recipe).items():
        dtype = recipe.dtype if len(shape) > 1 or recipe.norm_dtype is None else recipe.norm_dtype
        stored[name] = ("F32" if name.endswith("inv_freq") else dtype, shape)
    return stored


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    config = recipe.config
    if recipe.letters is not None:
        return family_recipes.shapes(config.get("text_config", config), recipe.letters)
    hidden, feed, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    default_kv = 8 if config["model_type"] == "mistral" else heads
    head = config.get("head_dim", hidden // heads)
    queries, keys = heads * head, config.get("num_key_value_heads", default_kv) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", feed, hidden),
            ("mlp.up_proj", feed, hidden),
            ("mlp.down_proj", hidden, feed),
        ):
            shapes[f"{block}{name}.weight"] = (rows, columns)
            if recipe.biases:
                shapes[f"{block}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{name}.weight"] = (hidden,)
        shapes[f"{block}self_attn.rotary_emb.inv_freq"] = (head // 2,)  # a buffer that old checkpoints carry
    shapes["model.norm.weight"] = (hidden,)
    if not recipe.tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _packed(name: str, parts: Callable[[int, int], dict[str, str]], **quantization: Any) -> Recipe:
    """The recipe `name` with the `parts` of quantized matrices, by their ends, for those of its layers."""
    recipe, tensors = (RECIPES | FAMILIES)[name], {}
    for tensor, (dtype, shape) in _stored(recipe).items():
        if tensor.endswith("_proj.weight"):
            for ending, said in parts(shape[0], shape[1]).items():
                tensors[tensor.removesuffix(".weight") + ending] = said
        else:
            tensors[tensor] = " ".join(map(str, (dtype, *shape)))
    config = {**recipe.config, "quantization_config": quantization}
    return replace(recipe, config=config, tensors=tensors, letters=None, shards=1)


def _fp8(high: int, wide: int) -> Callable[[int, int], dict[str, str]]:
    def parts(rows: int, columns: int) -> dict[str, str]:
        scales = f"F32 {-(-rows // high)} {-(-columns // wide)}"
        return {".weight": f"F8_E4M3 {rows} {columns}", ".weight_scale_inv": scales}

    return parts


def _gptq(bits: int) -> Callable[[int, int], dict[str, str]]:
    def parts(rows: int, columns: int) -> dict[str, str]:
        groups = columns // 32
        return {
            ".qweight": f"I32 {columns * bits // 32} {rows}",
            ".qzeros": f"I32 {groups} {rows * bits // 32}",
            ".scales": f"F16 {groups} {rows}",
            ".g_idx": f"I32 {columns}",
        }

    return parts


# Checkpoints that are quantized already.
PACKED = {
    "tiny-packed-fp8": _packed("tiny-qwen3-moe", _fp8(128, 128), quant_method="fp8", weight_block_size=[128, 128]),
    "tiny-packed-fp8-uneven": _packed("tiny-yarn", _fp8(32, 40), quant_method="fp8", weight_block_size=[32, 40]),
    "tiny-packed-gptq": _packed(
        "tiny-llama3-scaling", _gptq(4), quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=False
    ),
    "tiny-packed-gptq-v2": _packed(
        "tiny-qwen3", _gptq(8), quant_method="gptq", bits=8, group_size=32, checkpoint_format="gptq_v2", sym=False
    ),
}


# Multimodal ones, of which only the projector is converted.
PROJECTORS = {name: Recipe(**recipe) for name, recipe in projector_recipes.PROJECTORS.items()} | _recorded("projectors")
# And those that the reference converter does not know.
LLAVA = _recorded("llava")


def _weights(name: str, shape: tuple[int, ...], dtype: str, norm_at: float) -> np.ndarray:
    """Weights of about the size of trained ones, some exactly halfway between two narrower values."""
    count = int(np.prod(shape))
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)
    if dtype == "U8":  # codes of four bits, or scales: powers of two from 2^-8 to 2^-5
        bytes_ = (raw >> np.uint64(40)).astype(np.uint8)
        return (119 + bytes_ % 4 if name.endswith("_scales") else bytes_).astype(np.uint8).reshape(shape)
    if dtype == "F8_E4M3":  # all but the two codes that are no number
        codes = (raw >> np.uint64(40)).astype(np.uint8)
        return np.where(codes & 127 == 127, codes - 1, codes).reshape(shape)
    if dtype in ("I8", "I32"):
        if name.endswith(".g_idx"):  # groups of 32 columns, which stand in another order
            return (np.arange(count) * 7 % count // 32).astype(np.int32)
        return (
            (raw >> np.uint64(32)).astype(np.uint32).astype(f"<{dtype.lower()[0]}{int(dtype[1:]) // 8}").reshape(shape)
        )
    values = (raw >> np.uint64(40)).astype(np.int64) - (1 << 23)
    weights = np.ldexp(values.astype(np.float32), -27)  # exact: 24 bits, within 1/16
    weights.view(np.uint32)[::7] = weights.view(np.uint32)[::7] & 0xFFFF8000 | 0x8000
    if name.lower().endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "scale", "layer_scalar")):
        weights += np.float32(norm_at)
    if dtype == "BF16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(shape)
    return weights.astype(np.float16 if dtype == "F16" else np.float32).reshape(shape)


def _safetensors(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": data.shape, "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data.tobytes() for _, data in tensors.values())


def make_checkpoint(name: str, parent: Path) -> Path:
    """Write the checkpoint called `name` into a directory of that name under `parent`, and return it."""
    recipe, directory = (RECIPES | FAMILIES | PACKED | PROJECTORS | LLAVA)[name], parent / name
    directory.mkdir(parents=True)

    def write(file: str, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(text, encoding="utf-8", newline="\n")

    write("config.json", recipe.config)
    _write_vocabulary(recipe, directory, write)
    for file, text in recipe.files.items():
        write(file, text)
    tensors = {
        key: (dtype, _weights(key, shape, dtype, recipe.norm_at)) for key, (dtype, shape) in _stored(recipe).items()
    }
    if recipe.shards == 1:
        (directory / "model.safetensors").write_bytes(_safetensors(tensors))
        return directory
    weight_map = {}
    for i in range(recipe.shards):
        file = f"model-{i + 1:05d}-of-{recipe.shards:05d}.safetensors"
        part = dict(list(tensors.items())[i * len(tensors) // recipe.shards : (i + 1) * len(tensors) // recipe.shards])
        (directory / file).write_bytes(_safetensors(part))
        weight_map.update(dict.fromkeys(part, file))
    write("model.safetensors.index.json", {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    return directory


if __name__ == "__main__":
    for recipe_name in RECIPES | FAMILIES | PACKED | PROJECTORS | LLAVA:
        make_checkpoint(recipe_name, Path(sys.argv[1]))
