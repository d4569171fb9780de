"""Whole commands against llama-quantize: a 1.1-billion-weight F16 Llama, the same threads, in turn.

    python scripts/bench/bench_quantize.py [--types Q4_K_M,Q8_0] [--threads 2] [--repeat 2] [--directory DIR]

Each run is a process of its own, start-up included. The reference is `llama_model_quantize`, the function behind
llama-quantize, called through llama-cpp-python. Prints a Markdown table of seconds, ratios and peak memory, and checks
that both wrote the same bytes. Needs 5 GB of free disk.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.pipeline.mixtures import file_type
from quantkit.report.tables import table

LAYERS, EMBD, FF, HEADS, HEADS_KV, VOCAB = 22, 2048, 5632, 32, 4, 32000

OURS = "from quantkit.cli.main import main; main()"
THEIRS = """
import ctypes, sys, llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


class Shape(NamedTuple):
    """The sizes of a Llama."""

    layers: int = LAYERS
    embd: int = EMBD
    ff: int = FF
    heads: int = HEADS
    heads_kv: int = HEADS_KV
    vocab: int = VOCAB


def make_model(path: Path, tokens: Sequence[str] = (), shape: Shape = Shape()) -> None:  # noqa: B008
    """Write the F16 model: normal weights of the usual spread, from one block of random numbers.

    `tokens` are its vocabulary, which quantizing does without.
    """
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    for key, value in {
        "block_count": shape.layers,
        "context_length": 2048,
        "embedding_length": shape.embd,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads_kv,
    }.items():
        metadata.set(f"llama.{key}", ValueType.UINT32, value)
    metadata.set("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5)
    metadata.set("tokenizer.ggml.model", ValueType.STRING, "gpt2" if tokens else "no_vocab")
    if tokens:
        metadata.set("tokenizer.ggml.pre", ValueType.STRING, "llama-bpe")
        metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, list(tokens), ValueType.STRING)
        metadata.set("tokenizer.ggml.merges", ValueType.ARRAY, [], ValueType.STRING)
    embd, ff, kv = shape.embd, shape.ff, shape.embd // shape.heads * shape.heads_kv
    shapes = {"token_embd": (embd, shape.vocab), "output_norm": (embd,), "output": (embd, shape.vocab)}
    for i in range(shape.layers):
        shapes |= {
            f"blk.{i}.attn_norm": (embd,),
            f"blk.{i}.attn_q": (embd, embd),
            f"blk.{i}.attn_k": (embd, kv),
            f"blk.{i}.attn_v": (embd, kv),
            f"blk.{i}.attn_output": (embd, embd),
            f"blk.{i}.ffn_norm": (embd,),
            f"blk.{i}.ffn_gate": (embd, ff),
            f"blk.{i}.ffn_up": (embd, ff),
            f"blk.{i}.ffn_down": (ff, embd),
        }
    infos = [
        TensorInfo(f"{name}.weight", sizes, GGMLType.F32 if len(sizes) == 1 else GGMLType.F16)
        for name, sizes in shapes.items()
    ]
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24).astype(np.float32) * np.float32(0.02)).astype(np.float16)
    with GGUFOutput(path, metadata, infos) as output:
        for info in infos:
            if info.type == GGMLType.F32:
                output.write(np.ones(info.n_elements, np.float32))
                continue
            left = info.n_elements
            while left:
                start = int(rng.integers(0, pool.size // 2))
                part = pool[start : start + min(left, pool.size // 2)]
                output.write(part)
                left -= part.size


def run(command: list[str]) -> tuple[float, float]:
    """Run a process; returns its seconds and its peak memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[1:]} failed with exit code {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Make the model, run both in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="Q4_K_M,Q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        home = Path(temporary)
        source, ours, theirs = home / "model-F16.gguf", home / "ours.gguf", home / "theirs.gguf"
        make_model(source)
        rows = []
        for name in options.types.split(","):
            threads = str(options.threads)
            options_ = ["-q", "--type", name, "--threads", threads, "-o", str(ours), "--force"]
            command = [OURS, "quantize", str(source), *options_]
            first = run(command)[0]  # compiles the kernels, unless an earlier run did
            mine, other = [], []
            for _ in range(options.repeat):
                mine.append(run(command))
                other.append(run([THEIRS, str(source), str(theirs), str(file_type(name).number), threads]))
            if not filecmp.cmp(ours, theirs, shallow=False):
                sys.exit(f"{name}: the files differ")
            seconds, reference = min(s for s, _ in mine), min(s for s, _ in other)
            memory, reference_memory = max(m for _, m in mine), max(m for _, m in other)
            rows.append(
                [
                    name,
                    f"{seconds:.2f}",
                    f"{reference:.2f}",
                    f"{reference / seconds:.2f}",
                    f"{memory:.0f}",
                    f"{reference_memory:.0f}",
                    f"{first:.2f}",
                ]
            )
    headers = "type | quantkit s | llama-quantize s | times faster | quantkit MB | llama-quantize MB | first run s"
    print(table(headers.split(" | "), rows))


if __name__ == "__main__":
    main()
