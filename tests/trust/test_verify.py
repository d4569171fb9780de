"""The verdict on files: sound ones, and ones with one thing wrong each."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import requires_shared
from make_checkpoints import make_checkpoint
from support.conversion import convert
from support.program import call
from support.tiny import FAMILIES, tiny_metadata, tiny_weights, write_gguf

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo, Value, ValueType, encode_header
from quantkit.sources.source import GGUFSource
from quantkit.trust.verify import Verdict, verify

STRING, ARRAY, UINT32, INT32 = ValueType.STRING, ValueType.ARRAY, ValueType.UINT32, ValueType.INT32


def tiny(path: Path, kind: GGMLType = GGMLType.Q8_0, metadata: Metadata | None = None, **weights: np.ndarray) -> Path:
    return write_gguf(path / "tiny.gguf", metadata or tiny_metadata(), tiny_weights() | weights, kind)


def only(verdict: Verdict, part: str) -> str:
    assert not verdict.sound and {problem.part for problem in verdict.problems} == {part}, verdict
    return "; ".join(problem.text for problem in verdict.problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_sound(tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", FAMILIES[family].metadata(), FAMILIES[family].weights(0), GGMLType.F16)
    verdict = verify(path)
    assert verdict.sound, verdict
    assert str(verdict).splitlines()[-1].startswith(f"{path}: sound (")


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-xlm-roberta", "tiny-qwen3-embedding"])
def test_encoders_are_sound(tmp_path: Path, name: str) -> None:
    verdict = verify(convert(make_checkpoint(name, tmp_path), tmp_path / "model.gguf"))
    assert verdict.sound and not verdict.notes, verdict


@requires_shared
def test_a_real_model_is_sound(docs_f16: GGUFSource) -> None:
    assert verify(docs_f16.path).sound


def test_a_scale_that_is_infinite(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    file = GGUFFile(path)
    data = bytearray(path.read_bytes())
    row, block = 5, 1
    at = file.offset("blk.1.ffn_up.weight") + row * file.tensors["blk.1.ffn_up.weight"].type.row_nbytes(96) + block * 34
    data[at : at + 2] = struct.pack("<e", float("inf"))
    path.write_bytes(data)
    told = only(verify(path), "content")
    assert told == "tensor blk.1.ffn_up.weight (Q8_0) holds a scale that is NaN or infinite: block 1 of row 5"


def test_metadata_that_contradicts_the_tensors(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    metadata.set("llama.feed_forward_length", UINT32, 192)
    told = only(verify(tiny(tmp_path, metadata=metadata)), "architecture")
    assert "blk.0.ffn_down.weight is 160 x 96, where the metadata asks for rows of 192" in told
    metadata = tiny_metadata()
    del metadata["llama.attention.head_count"]
    assert "lacks llama.attention.head_count" in only(verify(tiny(tmp_path, metadata=metadata)), "architecture")
    metadata = tiny_metadata()
    metadata.set("llama.block_count", UINT32, 3)
    assert "blk.2.attn_k.weight is missing" in only(verify(tiny(tmp_path, metadata=metadata)), "architecture")


def test_vocabularies(tmp_path: Path) -> None:
    metadata = tiny_metadata()
    tokens, types = metadata.strings("tokenizer.ggml.tokens"), [1] * 256 + [6, 6]
    metadata.set("tokenizer.ggml.tokens", ARRAY, [*tokens[:256], "<0x-1>", "<0xZZ>"], STRING)
    metadata.set("tokenizer.ggml.token_type", ARRAY, types, INT32)
    told = only(verify(tiny(tmp_path, metadata=metadata)), "vocabulary")
    assert "'<0x-1>'" in told and "'<0xZZ>'" in told
    metadata.set("tokenizer.ggml.tokens", ARRAY, tokens[:-1], STRING)
    assert not verify(tiny(tmp_path, metadata=metadata)).sound
    metadata = tiny_metadata()
    metadata["tokenizer.ggml.token_type"] = Value.of(ARRAY, [1] * 258, ValueType.INT8)
    assert "258 INT8" in only(verify(tiny(tmp_path, metadata=metadata)), "vocabulary")


def test_what_llama_cpp_refuses_of_the_layout(tmp_path: Path) -> None:
    infos = [TensorInfo("a", (8,), GGMLType.F32), TensorInfo("b", (8,), GGMLType.F32)]
    metadata = Metadata()
    metadata.set("general.type", STRING, "adapter")
    header = bytearray(encode_header(metadata, infos, 32))
    at = header.index(b"\1\0\0\0\0\0\0\0b") + 8 + 1 + 4 + 8 + 4  # after its name, dimensions and type
    header[at : at + 8] = struct.pack("<Q", 64)
    path = tmp_path / "gap.gguf"
    path.write_bytes(bytes(header) + bytes(128))
    assert "does not follow the one before it" in only(verify(path), "structure")
    path.write_bytes(encode_header(metadata, infos, 32) + bytes(164))
    verdict = verify(path)
    assert verdict.sound and "100 bytes follow the last tensor" in str(verdict)


def test_damage_of_any_kind_is_a_verdict(tmp_path: Path) -> None:
    whole = tiny(tmp_path).read_bytes()
    path, rng = tmp_path / "bad.gguf", random.Random(2)
    header = GGUFFile(tmp_path / "tiny.gguf").offset("token_embd.weight")
    for _ in range(150):
        bad = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        path.write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.2 else bad)
        str(verify(path))


def test_the_command(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    assert "sound (21 tensors" in call("verify", path).stdout
    data = json.loads(call("verify", path, "--json").stdout)
    assert data["sound"] is True and data["n_tensors"] == 21 and data["problems"] == []
    path.write_bytes(path.read_bytes()[:-5000])
    ended = call("verify", path, "--json", code=1)
    assert json.loads(ended.stdout)["problems"][0]["part"] == "structure"
    assert "truncated" in call("verify", path, code=1).stdout
    with pytest.raises(QuantkitError, match="no such file"):
        verify(tmp_path / "none.gguf")
