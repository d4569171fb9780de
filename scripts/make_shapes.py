"""Small GGUF files with the shapes that mixtures treat apart: experts, Falcon, 80 layers, tied embeddings, odd rows.

    python scripts/make_shapes.py DIRECTORY

The weights are random; the metadata is as little as llama-quantize needs to load the model's hyper-parameters.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput


@dataclass(frozen=True)
class Shape:
    """A model: its architecture and sizes. `type` is what its matrices are stored in."""

    architecture: str = "llama"
    n_layer: int = 3
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 0
    n_vocab: int = 64
    tied: bool = False
    fused_qkv: bool = False
    type: GGMLType = GGMLType.F16


SHAPES = {
    "experts-8": Shape(n_expert=8, n_layer=9),
    "experts-64": Shape(architecture="qwen3moe", n_expert=64, n_ff=256, type=GGMLType.BF16),
    "falcon": Shape(architecture="falcon", n_layer=17, fused_qkv=True, n_ff=1024),
    "layers-80": Shape(n_layer=80, n_head=16, n_head_kv=2, n_ff=256),
    "qwen2-80": Shape(architecture="qwen2", n_layer=80, n_head=2, n_ff=256, tied=True),
    "tied": Shape(tied=True, n_layer=16, n_head_kv=1, type=GGMLType.F32),
    "odd-rows": Shape(n_embd=288, n_ff=272, n_head=3, n_head_kv=3, n_layer=9),
    "odder-rows": Shape(n_embd=288, n_ff=284, n_head=3, n_head_kv=3, tied=True, type=GGMLType.BF16),
}


def _metadata(shape: Shape) -> Metadata:
    metadata, arch = Metadata(), shape.architecture
    metadata.set("general.architecture", ValueType.STRING, arch)
    numbers = {
        "block_count": shape.n_layer,
        "context_length": 512,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "vocab_size": shape.n_vocab,
    }
    if shape.n_expert:
        numbers |= {"expert_count": shape.n_expert, "expert_used_count": 2, "expert_feed_forward_length": shape.n_ff}
    for key, value in numbers.items():
        metadata.set(f"{arch}.{key}", ValueType.UINT32, value)
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        metadata.set(f"{arch}.attention.{key}", ValueType.FLOAT32, 1e-5)
    metadata.set("general.file_type", ValueType.UINT32, 1)
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "no_vocab")
    return metadata


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.n_embd // shape.n_head
    embd, kv, ff = shape.n_embd, width * shape.n_head_kv, shape.n_ff
    yield "token_embd.weight", (embd, shape.n_vocab)
    yield "output_norm.weight", (embd,)
    if not shape.tied:
        yield "output.weight", (embd, shape.n_vocab)
    for i in range(shape.n_layer):
        prefix = f"blk.{i}."
        yield prefix + "attn_norm.weight", (embd,)
        if shape.fused_qkv:
            yield prefix + "attn_qkv.weight", (embd, embd + 2 * kv)
        else:
            yield prefix + "attn_q.weight", (embd, embd)
            yield prefix + "attn_k.weight", (embd, kv)
            yield prefix + "attn_v.weight", (embd, kv)
        yield prefix + "attn_output.weight", (embd, embd)
        yield prefix + "ffn_norm.weight", (embd,)
        if shape.n_expert:
            yield prefix + "ffn_gate_inp.weight", (embd, shape.n_expert)
            yield prefix + "ffn_gate_exps.weight", (embd, ff, shape.n_expert)
            yield prefix + "ffn_up_exps.weight", (embd, ff, shape.n_expert)
            yield prefix + "ffn_down_exps.weight", (ff, embd, shape.n_expert)
            continue
        if not shape.fused_qkv:
            yield prefix + "ffn_gate.weight", (embd, ff)
        yield prefix + "ffn_up.weight", (embd, ff)
        yield prefix + "ffn_down.weight", (ff, embd)


def make_shape(name: str, directory: Path) -> Path:
    """Write the file `name` of SHAPES into `directory`; returns its path."""
    shape = SHAPES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    infos = [
        TensorInfo(tensor, dims, GGMLType.F32 if len(dims) == 1 or "gate_inp" in tensor else shape.type)
        for tensor, dims in _tensors(shape)
    ]
    path = directory / f"{name}.gguf"
    with GGUFOutput(path, _metadata(shape), infos) as output:
        for info in infos:
            values = rng.standard_normal((info.n_rows, info.n_per_row)).astype(np.float32) * np.float32(0.05)
            output.write(blocks.encode(values, info.type))
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for each in SHAPES:
        print(make_shape(each, target))
