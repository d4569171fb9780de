"""What error feedback and the choice of types cost: seconds and peak memory, each command a process of its own.

    python scripts/bench/bench_feedback.py --shared ../shared [--threads 2] [--what feedback,yaqa,chosen,large]
        [--layers 22] [--chunks 16] [--directory DIR]

`feedback` quantizes docs-llama-45m to Q4_K_M with error feedback, `yaqa` with gradients too, `chosen` chooses types for
the size of Q4_K_M (a dry run: choosing alone), all with the default chunks of the calibration text. `large` quantizes a
synthetic Llama of 1.1 billion weights, or so many of its layers, to Q4_K_M with error feedback from `--chunks` chunks
of random tokens, and says what the layers of one with 8 billion weights would take by that. Kernels are compiled in a
run before. Prints seconds, seconds of the processor, and peak memory; `large` needs 4 GB of free disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_quantize

from quantkit.report.tables import table

ROOT = Path(__file__).resolve().parents[2]
OURS = "from quantkit.cli.main import main; main()"
# Quantizes token ids: the synthetic model has no vocabulary.
LARGE = """
import sys, numpy as np, quantkit
from pathlib import Path
source, out, chunks, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokens = np.random.default_rng(0).integers(0, 32000, 512 * chunks)
quantkit.quantize(source, out, type="Q4_K_M", rounding="gptq", calibration=tokens, threads=threads, force=True,
    chunking=quantkit.Chunking(chunks=chunks))
"""


def run(command: list[str]) -> tuple[float, float, float]:
    """Run a process; returns its seconds, those of the processor, and its peak memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[1:]} failed with exit code {process.returncode}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def work_of_layers(n_layer: int, n_embd: int, n_ff: int, n_kv: int, n_tokens: int) -> float:
    """Multiplications of a run with feedback: the pass, the moments, and the rounding, by weights and columns."""
    square, wide = n_embd * (2 * n_embd + 2 * n_kv), n_embd * n_ff
    passes = n_tokens * (square + 3 * wide + (3 * n_embd**2 + n_ff**2) / 2)
    return n_layer * (passes + 6 * (n_embd * (square + 2 * wide) + n_ff * wide))


def main() -> None:
    """Run what is wanted and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--what", default="feedback,yaqa,chosen,large")
    parser.add_argument("--layers", type=int, default=bench_quantize.LAYERS)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    what, threads = options.what.split(","), str(options.threads)
    model, text = options.shared / "models" / "docs-llama-45m", options.shared / "data" / "docs-calib.txt"
    rows, note = [], ""
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        home = Path(temporary)

        def measure(name: str, command: list[str]) -> tuple[float, float, float]:
            seconds, processor, memory = run(command)
            rows.append([name, f"{seconds:.0f}", f"{processor:.0f}", f"{memory:.0f}"])
            return seconds, processor, memory

        common = ["--calibration", str(text), "--threads", threads, "-q"]
        feedback = [OURS, "quantize", str(model), "Q4_K_M", "--rounding", "gptq", "-o", str(home / "q.gguf"), *common]
        chosen = [OURS, "quantize", str(model), "--target-size", "Q4_K_M", "--dry-run", *common]
        yaqa = ["yaqa" if word == "gptq" else word for word in feedback]
        for name, command in (("feedback", feedback), ("yaqa", yaqa), ("chosen", chosen)):
            if name in what:
                run([*command, "--force", "--chunks", "4"])
                measure(f"docs-llama-45m, {name}", [*command, "--force"])
        if "large" in what:
            tokens = [f"<{i}>" for i in range(bench_quantize.VOCAB)]
            bench_quantize.make_model(home / "large.gguf", tokens, bench_quantize.Shape(options.layers))
            command = [LARGE, str(home / "large.gguf"), str(home / "large-q.gguf"), str(options.chunks), threads]
            _, processor, _ = measure(
                f"synthetic Llama, {options.layers} layers of 1.1B, {options.chunks} chunks", command
            )
            b = bench_quantize
            small = work_of_layers(options.layers, b.EMBD, b.FF, b.EMBD // b.HEADS * b.HEADS_KV, 512 * options.chunks)
            large = work_of_layers(32, 4096, 14336, 1024, 512 * 128)
            hours = processor / options.threads * large / small / 3600
            note = f"By the processor's seconds, 32 layers of 8B with 128 chunks: about {hours:.1f} hours"
    print(table(["run", "seconds", "processor seconds", "peak memory, MB"], rows))
    print(note)


if __name__ == "__main__":
    main()
