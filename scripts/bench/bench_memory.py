"""Peak memory of quantizing a model of experts whose one tensor is larger than the buffer it is given.

    python scripts/bench/bench_memory.py [--gigabytes 2] [--max-buffer-size 64] [--type Q4_K_M]

Makes an F16 model with one stacked tensor of that size, quantizes it in a process of its own with
`--max-buffer-size` MiB, and prints the process's peak resident memory, and that of an empty model for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from bench_quantize import OURS, run

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.report.tables import table


def make_model(path: Path, n_expert: int) -> int:
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


def main() -> None:
    """Make both models, quantize them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--max-buffer-size", type=int, default=64)
    parser.add_argument("--type", default="Q4_K_M")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "experts.gguf", Path(temporary) / "out.gguf"
        for n_expert in (2, max(3, int(options.gigabytes * 1e9 / (4096 * 2048 * 2)))):
            nbytes = make_model(source, n_expert)
            limit = ["--max-buffer-size", str(options.max_buffer_size)]
            command = [
                OURS,
                "quantize",
                str(source),
                "--type",
                options.type,
                "-o",
                str(target),
                "-q",
                "--force",
                *limit,
            ]
            run(command)  # compiles the kernels
            seconds, memory = run(command)
            rows.append([f"{nbytes / 2**20:.0f}", str(options.max_buffer_size), f"{memory:.0f}", f"{seconds:.2f}"])
    print(table(["largest tensor MiB", "--max-buffer-size MiB", "peak memory MB", "s"], rows))


if __name__ == "__main__":
    main()
