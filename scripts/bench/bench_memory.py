"""Peak memory: quantizing a tensor larger than the buffer, and a model larger than the memory, evaluated and quantized.

    python scripts/bench/bench_memory.py [--gigabytes 2] [--max-buffer-size 64] [--type Q4_K_M]
    python scripts/bench/bench_memory.py --long [--memory 1G] [--directory DIR]
    python scripts/bench/bench_memory.py --model 4 [--memory 1G] [--chunks 16] [--n-ctx 512] [--directory DIR]

The first makes an F16 model with one stacked tensor of experts of that size, quantizes it in a process of its own with
`--max-buffer-size` MiB, and prints the process's peak resident memory, and that of a small model for comparison. The
second makes an F16 Llama of so many gigabytes, quantizes it to a ladder of three types, and takes its perplexity,
importance matrix and divergence from one of those, each in a process of its own with `--memory`. With
`--long` the model is small, but has a vocabulary of 128,000, and the context 32,768 tokens: its logits would take 8.4
GB; log-probabilities are saved (4.2 GB of disk) and compared with. The files are removed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from bench_quantize import EMBD, FF, HEADS, HEADS_KV, OURS, VOCAB, Shape, make_model, run

from quantkit.blocks.types import GGMLType
from quantkit.cli.parsing import parse_size
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.report.tables import table

MEASURE = """
import sys, numpy as np
from quantkit.evaluate.divergence import divergence
from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Chunking, Compute
what, path, other, n_ctx, chunks, memory = sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
ids = np.random.default_rng(0).integers(0, 1000, n_ctx * chunks)
how = {"chunking": Chunking(n_ctx=n_ctx, chunks=1 if n_ctx > 4096 else None), "compute": Compute(memory=memory)}
if what == "perplexity":
    perplexity(path, ids, **how)
elif what == "importance matrix":
    importance_matrix(path, ids, **how)
elif what == "saved":
    divergence(other, path, ids, save_logits=path + ".logits", **how)
elif what == "stored":
    divergence(other, path + ".logits", **how)
else:
    divergence(other, path, ids, **how)
"""


def make_experts(path: Path, n_expert: int) -> int:
    """Write a model of one layer with `n_expert` experts; returns the bytes of its largest tensor."""
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "llama")
    for key, value in {"block_count": 1, "embedding_length": 2048, "expert_count": n_expert}.items():
        metadata.set(f"llama.{key}", ValueType.UINT32, value)
    info = TensorInfo("blk.0.ffn_up_exps.weight", (2048, 4096, n_expert), GGMLType.F16)
    expert = (np.random.default_rng(0).standard_normal((4096, 2048)) * 0.02).astype(np.float16)
    with GGUFOutput(path, metadata, [info]) as output:
        for _ in range(n_expert):
            output.write(expert)
    return info.nbytes


def experts(options: argparse.Namespace) -> None:
    """Quantize a large stacked tensor and a small one."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        source, target = Path(temporary) / "experts.gguf", Path(temporary) / "out.gguf"
        for n_expert in (2, max(3, int(options.gigabytes * 1e9 / (4096 * 2048 * 2)))):
            nbytes = make_experts(source, n_expert)
            limit = ["--max-buffer-size", str(options.max_buffer_size)]
            command = [OURS, "quantize", str(source), "--type", options.type, "-o", str(target), "-q", "--force"]
            run([*command, *limit])  # compiles the kernels
            seconds, memory = run([*command, *limit])
            rows.append([f"{nbytes / 2**20:.0f}", str(options.max_buffer_size), f"{memory:.0f}", f"{seconds:.2f}"])
    print(table(["largest tensor MiB", "--max-buffer-size MiB", "peak memory MB", "s"], rows))


def whole(options: argparse.Namespace) -> None:
    """Quantize and evaluate a model that is larger than the memory it is given."""
    per_layer = 2 * EMBD * EMBD + 2 * EMBD * EMBD // HEADS * HEADS_KV + 3 * EMBD * FF
    layers = max(1, round((options.model * 1e9 / 2 - 2 * EMBD * VOCAB) / per_layer))
    memory, rows = parse_size(options.memory), []
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        home = Path(temporary)
        source, ladder = home / "model-F16.gguf", f"{home}/out/"
        make_model(source, [f"t{i}" for i in range(VOCAB)], Shape(layers))
        types = ["Q8_0", "Q4_K_M", "Q4_0"]
        quantize = [OURS, "quantize", str(source), "--type", ",".join(types), "-o", ladder, "-q", "--force"]
        commands = {f"quantize {', '.join(types)}": [*quantize, "--memory", options.memory]}
        for what in ("perplexity", "importance matrix", "divergence"):
            sizes = [str(options.n_ctx), str(options.chunks), str(memory)]
            commands[what] = [MEASURE, what, str(source), f"{ladder}model-Q4_K_M.gguf", *sizes]
        for what, command in commands.items():
            seconds, peak = run(command)
            rows.append([what, f"{peak:.0f}", f"{seconds:.1f}"])
        size = source.stat().st_size
    print(f"{size / 1e9:.2f} GB, --memory {options.memory}, {options.chunks} chunks of {options.n_ctx} tokens\n")
    print(table(["what", "peak memory MB", "s"], rows))


def long(options: argparse.Namespace) -> None:
    """Compare models of a large vocabulary at a long context."""
    shape, n_ctx, rows = Shape(2, 256, 512, 4, 4, 128_000), 32_768, []
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        source, other = Path(temporary) / "model-F16.gguf", Path(temporary) / "model-Q8_0.gguf"
        make_model(source, [f"t{i}" for i in range(shape.vocab)], shape)
        run([OURS, "quantize", str(source), "-q", "--type", "Q8_0", "-o", str(other)])
        for what in ("divergence", "saved", "stored"):
            sizes = [str(n_ctx), "2", str(parse_size(options.memory))]
            seconds, peak = run([MEASURE, what, str(source), str(other), *sizes])
            rows.append([what, f"{peak:.0f}", f"{seconds:.1f}"])
    print(f"--memory {options.memory}, {n_ctx:,} tokens of context, a vocabulary of {shape.vocab:,}\n")
    print(table(["divergence", "peak memory MB", "s"], rows))


def main() -> None:
    """Do what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--max-buffer-size", type=int, default=64)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--model", type=float, help="gigabytes of a whole model, evaluated and quantized instead")
    parser.add_argument("--long", action="store_true", help="a long context and a large vocabulary instead")
    parser.add_argument("--memory", default="1G")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if options.long:
        long(options)
    elif options.model is None:
        experts(options)
    else:
        whole(options)


if __name__ == "__main__":
    main()
