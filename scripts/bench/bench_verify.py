"""`quantkit verify` against reading the file, and deriving a file again against quantizing it.

    python scripts/bench/bench_verify.py [--gigabytes 1] [--type Q4_K_M] [--threads N] [--rounds 5]

Makes a model of random F16 weights and its quantization. Reading is done by as many threads, each with one buffer. All
measures are taken in one process, after a round that compiles and fills the cache; the fastest of each counts. "From
disk" is after the system was told to forget the file (Linux), as one is read that was not read lately.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from quantkit.blocks.types import GGMLType
from quantkit.formats.gguf import Metadata, TensorInfo, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.formats.reading import InputFile
from quantkit.machine import default_threads
from quantkit.pipeline.execute import execute
from quantkit.pipeline.run import plan
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource
from quantkit.trust.derivation import derive
from quantkit.trust.verify import verify

READ = 1 << 19


def make_model(path: Path, gigabytes: float) -> None:
    """Matrices of 4096 x 4096 random weights."""
    count = max(1, round(gigabytes * 1e9 / 2 / 4096 / 4096))
    metadata = Metadata()
    metadata.set("general.architecture", ValueType.STRING, "bench")
    for key in ("context_length", "embedding_length", "block_count"):
        metadata.set(f"bench.{key}", ValueType.UINT32, count)
    infos = [TensorInfo(f"blk.{i}.ffn_up.weight", (4096, 4096), GGMLType.F16) for i in range(count)]
    rng = np.random.default_rng(0)
    with GGUFOutput(path, metadata, infos) as output:
        for _ in infos:
            output.write((rng.standard_normal((4096, 4096), np.float32) * 0.02).astype(np.float16))


def read_all(path: Path, threads: int) -> None:
    """Read a file by pieces on `threads` threads."""
    file = InputFile(path)

    def share(first: int) -> None:
        buffer = np.empty(READ, np.uint8)
        for at in range(first * READ, file.nbytes, threads * READ):
            file.read_into(at, buffer[: min(READ, file.nbytes - at)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def forget(path: Path) -> None:
    """Take a file's pages out of the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(task: Callable[[], object], forgotten: Path | None = None) -> float:
    """How long `task` takes, once `forgotten` has left the cache."""
    if forgotten is not None:
        forget(forgotten)
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def main() -> None:
    """Make the files, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    try:
        source, path, again = home / "f16.gguf", home / "quantized.gguf", home / "again.gguf"
        make_model(source, args.gigabytes)
        model = GGUFSource(source)

        def quantize() -> None:
            again.unlink(missing_ok=True)
            execute(model, [(plan(model, args.type), again)], threads=args.threads)

        execute(model, [(plan(model, args.type), path)], threads=args.threads)
        assert verify(source, args.threads).sound and verify(path, args.threads).sound
        assert derive(GGUFSource(path), model, threads=args.threads).exact
        tasks: dict[str, Callable[[], object]] = {
            "read F16": lambda: read_all(source, args.threads),
            "verify F16": lambda: verify(source, args.threads),
            f"read {args.type}": lambda: read_all(path, args.threads),
            f"verify {args.type}": lambda: verify(path, args.threads),
            "read F16 from disk": lambda: read_all(source, args.threads),
            "verify F16 from disk": lambda: verify(source, args.threads),
            f"quantize to {args.type}": quantize,
            f"derive {args.type} again": lambda: derive(GGUFSource(path), model, threads=args.threads),
        }
        best = {
            name: min(seconds(task, source if "disk" in name else None) for _ in range(args.rounds))
            for name, task in tasks.items()
        }
        sizes = [source.stat().st_size] * 2 + [path.stat().st_size] * 2 + [source.stat().st_size] * 4
        rows = []
        for i, (name, size) in enumerate(zip(best, sizes, strict=True)):
            against = best[list(best)[i - i % 2]]
            share = "" if i % 2 == 0 else f"{against / best[name]:.0%} of the line above"
            rows.append([name, f"{best[name]:.3f}", f"{size / best[name] / 1e9:.2f}", share])
        print(table(["", "s", "GB/s", "speed"], rows))
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
