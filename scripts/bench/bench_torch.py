"""Time the torch backend, and hold it against numpy's float32.

    python scripts/bench/bench_torch.py MODEL TEXT --device cuda [--chunks N] [--judge-chunks N] [--synthetic]

For float32 and bfloat16: perplexity over all chunks, seconds after loading (the first run, which also starts the
device, and the second), and on the first chunks the difference from numpy. With --synthetic also the tokens a second
of a Llama of 1.1 billion weights made up at random.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from quantkit.blocks.types import GGMLType
from quantkit.evaluate.perplexity import chunked, perplexity, tokenize
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.evaluate.torch_backend import TorchTransformer
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.sources.source import open_model
from quantkit.vocabulary import Vocabulary


class SyntheticLlama:
    """A TensorSource of random F16 weights in the shapes of TinyLlama-1.1B."""

    label = "synthetic Llama"
    n_vocab, n_embd, n_ff, n_layer, n_head, n_head_kv = 32000, 2048, 5632, 22, 32, 4

    def __init__(self) -> None:
        self.metadata = Metadata()
        self.metadata.set("general.architecture", ValueType.STRING, "llama")
        for key, value in {
            "context_length": 2048,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "rope.dimension_count": self.n_embd // self.n_head,
            "vocab_size": self.n_vocab,
        }.items():
            self.metadata.set(f"llama.{key}", ValueType.UINT32, value)
        self.metadata.set("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5)
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        shapes = {"token_embd": (self.n_vocab, self.n_embd), "output": (self.n_vocab, self.n_embd)}
        for i in range(self.n_layer):
            for name, shape in {
                "attn_q": (self.n_embd, self.n_embd),
                "attn_k": (n_kv, self.n_embd),
                "attn_v": (n_kv, self.n_embd),
                "attn_output": (self.n_embd, self.n_embd),
                "ffn_gate": (self.n_ff, self.n_embd),
                "ffn_up": (self.n_ff, self.n_embd),
                "ffn_down": (self.n_embd, self.n_ff),
            }.items():
                shapes[f"blk.{i}.{name}"] = shape
        self._tensors = {
            f"{name}.weight": TensorInfo(f"{name}.weight", (n_in, n_out), GGMLType.F16)
            for name, (n_out, n_in) in shapes.items()
        }
        for name in ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(self.n_layer) for n in ("attn", "ffn"))]:
            self._tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", (self.n_embd,), GGMLType.F32)
        self._pool = (np.random.default_rng(1).standard_normal(self.n_vocab * self.n_embd) / 45).astype(np.float16)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See TensorSource."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See TensorSource."""
        info = self._tensors[name]
        stop = info.n_rows if stop is None else stop
        if info.type is GGMLType.F32:
            return np.ones((stop - start, info.n_per_row), np.float32).view(np.uint8)
        rows = self._pool[: info.n_rows * info.n_per_row].reshape(info.n_rows, info.n_per_row)
        return rows[start:stop].view(np.uint8)

    def release(self, name: str) -> None:
        """See TensorSource."""


def synchronize(device: str) -> None:
    """Wait for what is under way on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--judge-chunks", type=int, default=16, help="chunks that numpy computes too")
    parser.add_argument("--synthetic", action="store_true")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(json.dumps({"device": name, "torch": torch.__version__}), flush=True)
    source = open_model(args.model)
    ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), args.text.read_text(encoding="utf-8"))
    judged = chunked(ids, Chunking(chunks=args.judge_chunks), bos, source.label)
    judge = Transformer(source).log_likelihoods(judged, 256)
    for precision in ("f32", "bf16"):
        compute = Compute(backend="torch", device=args.device, precision=precision)
        own = TorchTransformer(source, compute).log_likelihoods(judged, 256)
        runs = [perplexity(source, ids, chunking=Chunking(chunks=args.chunks), compute=compute) for _ in range(2)]
        print(
            json.dumps(
                {
                    "precision": precision,
                    "ppl": runs[1].ppl.value,
                    "chunks": runs[1].n_chunks,
                    "seconds": [round(run.seconds, 3) for run in runs],
                    "tokens_per_second": round(runs[1].tokens_per_second),
                    "largest_difference": float(np.abs(own - judge).max()),
                    "relative_difference": float(np.linalg.norm(own - judge) / np.linalg.norm(judge)),
                    "relative_difference_of_ppl": float(np.exp(judge.mean() - own.mean()) - 1),
                }
            ),
            flush=True,
        )
    if not args.synthetic:
        return
    llama = SyntheticLlama()
    n_weights = sum(info.n_elements for info in llama.tensors.values())
    for precision in ("f32", "bf16"):
        began = time.perf_counter()
        model = TorchTransformer(llama, Compute(backend="torch", device=args.device, precision=precision))
        loading = time.perf_counter() - began
        n_seq = model.batch(512)
        tokens = np.random.default_rng(2).integers(0, llama.n_vocab, (n_seq, 512)).astype(np.int32)
        model.log_likelihoods(tokens, 256)
        synchronize(args.device)
        began = time.perf_counter()
        for _ in range(3):
            model.log_likelihoods(tokens, 256)
        seconds = (time.perf_counter() - began) / 3
        print(
            json.dumps(
                {
                    "weights": n_weights,
                    "precision": precision,
                    "loading": round(loading, 1),
                    "batch": n_seq,
                    "tokens_per_second": round(tokens.size / seconds),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
