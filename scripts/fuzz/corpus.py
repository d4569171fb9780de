"""The small inputs that fuzzing begins with, a folder for each target; together they stay below 2 MB.

Usage: python scripts/fuzz/corpus.py FOLDER
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from make_checkpoints import LLAVA, PROJECTORS  # noqa: E402
from support.tiny import FAMILIES, tiny_metadata, tiny_weights, write_gguf  # noqa: E402

from quantkit import blocks  # noqa: E402
from quantkit.blocks.types import GGMLType  # noqa: E402
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType, encode_header  # noqa: E402
from quantkit.formats.imatrix import Importance, ImportanceMatrix  # noqa: E402

TINYLM = ROOT / "fixtures" / "tinylm"


def small(metadata: Metadata) -> Metadata:
    """Metadata whose vocabulary has a few tokens."""
    for key, kind in (("tokens", ValueType.STRING), ("token_type", ValueType.INT32)):
        items = metadata[f"tokenizer.ggml.{key}"].value
        metadata.set(f"tokenizer.ggml.{key}", ValueType.ARRAY, list(items)[:3] + list(items)[-3:], kind)
    metadata.set("tokenizer.ggml.merges", ValueType.ARRAY, ["a b", "ab c"], ValueType.STRING)
    metadata.set("tokenizer.ggml.bos_token_id", ValueType.UINT32, 4)
    metadata.set("tokenizer.ggml.eos_token_id", ValueType.UINT32, 5)
    return metadata


def gguf_files() -> list[bytes]:
    """Headers of models of every family with rows of one block, and files of single things."""
    found = []
    for family in FAMILIES.values():
        infos = [
            TensorInfo(name, (32, *([6] if array.ndim > 1 else [])), GGMLType.Q8_0)
            for name, array in family.weights(0).items()
        ]
        data = encode_header(small(family.metadata()), infos[:12], 32)
        found.append(data + bytes(sum(-(-info.nbytes // 32) * 32 for info in infos[:12])))
    version_2 = bytearray(found[0])
    version_2[4] = 2
    every = Metadata()
    for kind in ValueType:
        if kind not in (ValueType.STRING, ValueType.ARRAY):
            every.set(f"a.{kind.name}", kind, 1)
            every.set(f"b.{kind.name}", ValueType.ARRAY, [1, 0], kind)
    every.set("split.count", ValueType.UINT16, 2)
    return [*found, bytes(version_2), encode_header(every, [], 32)]


def imatrices(folder: Path) -> list[bytes]:
    """One matrix in both formats."""
    sums = Importance(np.ones((2, 4), np.float32), np.array([3, 4]))
    matrix = ImportanceMatrix({"blk.0.a.weight": sums, "b": sums}, ["text"], 2, 512)
    matrix.save(folder / "gguf")
    matrix.save_legacy(folder / "dat")
    return [(folder / name).read_bytes() for name in ("gguf", "dat")]


def make(home: Path) -> None:
    """Write all of them."""
    import tempfile

    def put(target: str, inputs: list[bytes]) -> None:
        folder = home / target
        folder.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(inputs):
            (folder / f"{i:02d}").write_bytes(data)

    put("gguf", gguf_files())
    with tempfile.TemporaryDirectory() as work:
        put("imatrix", imatrices(Path(work)))
        tiny = write_gguf(
            Path(work) / "tiny.gguf", tiny_metadata(), dict(list(tiny_weights().items())[:2]), GGMLType.Q4_0
        )
        put("gguf_verify", [*gguf_files()[:3], tiny.read_bytes()])
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                         "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}).encode()  # fmt: skip
    put("safetensors", [struct.pack("<Q", len(header)) + header + bytes(22)])
    put("safetensors_index", [b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../x.safetensors"}}'])
    configs = [(TINYLM / "config.json").read_bytes()]
    for name in (
        "Qwen2ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Phi3ForCausalLM",
        "Mistral3ForConditionalGeneration",
    ):
        scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
        configs.append(json.dumps({"architectures": [name], "hidden_size": 64, "num_hidden_layers": 2,
                                   "num_attention_heads": 4, "rope_scaling": scaling,
                                   "text_config": {"model_type": "mistral"}}).encode())  # fmt: skip
    put("config", configs)
    tokenizer = json.loads((TINYLM / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"] = {**tokenizer["model"], "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"], ["a", "a"]]}
    more = {
        "bos_token": {"content": "a"},
        "added_tokens_decoder": {"0": {"content": "x"}},
        "chat_template": [{"name": "n"}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "extra_special_tokens": {"a": "b"},
    }
    put("tokenizer_json", [json.dumps(each).encode() for each in (tokenizer, more, {**tokenizer, **more})])
    put("sentencepiece", sentencepiece_models())
    put("logits", [b"_logits_" + struct.pack("<iii", 4, 6, 1) + struct.pack("<4i", 1, 2, 3, 0) + bytes(20)])
    put(
        "tasks",
        [b"\0context\n1\na\nb\nc\nd", b"\1x,The _ is,cat,dog,2\n\n", b"\2" + choice_file(), b"\6" + choice_file()],
    )
    kinds, row = blocks.encodable(), np.linspace(-1, 1, 512, dtype=np.float32)[None]
    encoded = [
        bytes([i]) + blocks.encode(row, kind, np.ones(512, np.float32)).tobytes()[:320] for i, kind in enumerate(kinds)
    ]
    put("decoders", encoded)
    words = {"tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x41>", "\u2581"], "merges": ["a b"],
             "types": [2, 3, 3, 1, 1, 4, 6, 1], "text": "ab <s> a\u00e9"}  # fmt: skip
    words["scores"] = [-float(i) for i in range(len(words["tokens"]))]
    models = (("gpt2", "gpt-2"), ("gpt2", "qwen2"), ("llama", ""), ("gemma4", ""), ("bert", ""), ("t5", ""))
    put("adapter", [adapter()])
    put("projector", projectors())
    put("packed", packed())
    put("vocabulary", [json.dumps({**words, "model": model, "pre": pre}).encode() for model, pre in models])


def safetensors_file(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A file of F32 tensors of these shapes, all zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def adapter() -> bytes:
    """An adapter of rank 2 to a matrix and the embedding of the fixture, and a whole norm."""
    base = json.loads((TINYLM / "config.json").read_bytes())
    width, vocabulary = base["hidden_size"], base["vocab_size"]
    settings = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "r": 2,
        "rank_pattern": {"layers.0": 2},
        "alpha_pattern": {"q": 3},
    }
    q, embedding = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.embed_tokens"
    shapes: dict[str, tuple[int, ...]] = {
        f"{q}.lora_A.weight": (2, width),
        f"{q}.lora_B.weight": (width, 2),
        f"{embedding}.lora_embedding_A": (2, vocabulary),
        f"{embedding}.lora_embedding_B": (width, 2),
        "base_model.model.model.norm.weight": (width,),
    }
    return json.dumps(settings).encode() + b"\0" + safetensors_file(shapes)


def projectors() -> list[bytes]:
    """The two configurations of a checkpoint of every kind of projector."""
    made = []
    for recipe in (PROJECTORS | LLAVA).values():
        preprocessor = recipe.files.get("preprocessor_config.json", "{}")
        made.append(json.dumps(recipe.config).encode() + b"\0" + str(preprocessor).encode())
    return made


def packed() -> list[bytes]:
    """What libraries packed, with what they say of it, where it is small."""
    made = []
    for path in sorted((ROOT / "tests" / "goldens" / "packed").glob("*.safetensors")):
        said = json.loads(path.with_suffix(".json").read_bytes())["quantization_config"]
        made.append(json.dumps({"quantization_config": said}).encode() + b"\0" + path.read_bytes())
    return [each for each in made if len(each) < 40_000]


def choice_file() -> bytes:
    """A multiple-choice file of one task."""

    def text(value: bytes) -> bytes:
        return struct.pack("<I", len(value)) + value

    answers = struct.pack("<I", 2) + text(b"yes") + text(b"no") + struct.pack("<2i", 1, 0)
    return struct.pack("<II", 1, 0) + text(b"question") + answers + struct.pack("<I", 0)


def sentencepiece_models() -> list[bytes]:
    """A model of a few pieces, as a protocol buffer written by hand: field 1 is a piece (text, score, type)."""
    pieces = b""
    for i, text in enumerate([b"<unk>", b"<s>", b"</s>", b"a", b"<0x41>"]):
        kind = {0: 2, 1: 3, 2: 3, 4: 6}.get(i, 1)
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -i) + b"\x18" + bytes([kind])
        pieces += b"\x0a" + bytes([len(body)]) + body
    return [pieces + b"\x12\x02\x18\x02", pieces]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
