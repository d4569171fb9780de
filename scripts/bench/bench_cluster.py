"""Workers of one thread on this machine against one process of as many threads, and what bounds many workers.

    python scripts/bench/bench_cluster.py [--layers 22] [--type Q4_K_M] [--workers 1,2,4] [--chunks 16] [--repeat 2] \\
        [--directory DIR]

Makes an F16 Llama (1.1 billion weights with 22 layers, less with fewer), which is removed at the end, and starts a real
`dask scheduler` and `dask worker` processes on the loopback interface. For each number of workers, quantizes it and
measures the perplexity of random tokens, on the cluster and in one process of as many threads, in turn; start-up of the
command counts, that of the workers does not. Checks that bytes and digits are the same, and prints Markdown tables.

The last table is an estimate on paper, from the figures measured here: how long 64 such workers take to quantize a
model of 671 billion weights, by what bounds them: arithmetic, the disk, a network, the scheduler, the largest piece.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_quantize import OURS, VOCAB, Shape, make_model, run

from quantkit.pipeline.cluster import Cluster, Task
from quantkit.pipeline.execute import PART
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource

# The model that is estimated: weights, bytes of each where they are read, and workers.
WEIGHTS, READ, WORKERS = 671e9, 2.0, 64
# A network that each worker has to itself, and one that all share: bytes a second.
NETWORKS = {"10 Gbit/s for each worker": 1.25e9 * WORKERS, "one server of 25 Gbit/s for all": 3.1e9}
MEASURE = """
import sys, numpy as np
from contextlib import nullcontext
from quantkit.evaluate.perplexity import perplexity
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.pipeline.cluster import Cluster
path, chunks, threads, address, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
ids = np.random.default_rng(0).integers(0, 1000, 512 * chunks)
with Cluster(address) if address else nullcontext() as cluster:
    result = perplexity(path, ids, chunking=Chunking(), compute=Compute(threads=threads), cluster=cluster)
open(out, "w").write(repr((result.ppl, result.chunk_nll)))
"""


@contextmanager
def cluster_of(n_workers: int, home: Path) -> Iterator[str]:
    """The address of a scheduler with so many workers of one thread, each a process."""
    processes = []

    def start(*words: str) -> str:
        command = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:], "--host", "127.0.0.1"]
        command += ["--no-dashboard"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=home)
        processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"(?:Scheduler at|Start worker at):\s+(tcp://\S+)", line)
            if found is not None:
                return found[1]
        sys.exit(f"dask {words[0]} did not start")

    try:
        address = start("scheduler", "--port", "0")
        for _ in range(n_workers):
            start("worker", address, "--nthreads", "1", "--no-nanny", "--memory-limit", "0")
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()


def task_seconds(address: str, n: int = 500) -> float:
    """What a task that does nothing takes."""
    with Cluster(address) as cluster:
        began = time.perf_counter()
        for _ in cluster.run([Task(f"nothing {i}", os.getpid, ()) for i in range(n)]):
            pass
        return (time.perf_counter() - began) / n


def disk_rates(path: Path) -> tuple[float, float]:
    """Bytes a second that are read from, and written beside, the file `path`, whose pages are dropped before."""
    block, most = 1 << 24, 1 << 30
    copy = path.with_name("copy")
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, nbytes = time.perf_counter(), 0
        while nbytes < most and (data := file.read(block)):
            nbytes += len(data)
        read = nbytes / (time.perf_counter() - began)
    with open(copy, "wb", buffering=0) as file:
        data, began = os.urandom(block), time.perf_counter()
        for _ in range(nbytes // block):
            file.write(data)
        os.fsync(file.fileno())
        written = (nbytes // block) * block / (time.perf_counter() - began)
    copy.unlink()
    return read, written


def main() -> None:
    """Make the model, run both in turn, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    rows, alone = [], 0.0
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        home = Path(temporary)
        source, here, there = home / "model-F16.gguf", home / "here", home / "there"
        make_model(source, [f"t{i}" for i in range(VOCAB)], Shape(args.layers))
        n_weights = sum(info.n_elements for info in GGUFSource(source).tensors.values())
        quantized = 0
        for n in map(int, args.workers.split(",")):
            common = ["quantize", str(source), "-q", "--force", "--type", args.type]
            measured = [MEASURE, str(source), str(args.chunks), str(n)]
            with cluster_of(n, home) as address:
                for what, one, many in (
                    (f"quantize {args.type}", [OURS, *common, "--threads", str(n), "-o", f"{here}.gguf"],
                     [OURS, *common, "--cluster", address, "-o", f"{there}.gguf"]),
                    ("perplexity", [*measured, "", f"{here}.txt"],
                     [MEASURE, str(source), str(args.chunks), "1", address, f"{there}.txt"]),
                ):  # fmt: skip
                    end = ".txt" if what == "perplexity" else ".gguf"
                    for command in (one, many):
                        run(command)  # compiles the kernels, and has workers load theirs
                    seconds = [(run(one)[0], run(many)[0]) for _ in range(args.repeat)]
                    if not filecmp.cmp(f"{here}{end}", f"{there}{end}", shallow=False):
                        sys.exit(f"{what}: the results differ")
                    a, b = (min(each) for each in zip(*seconds, strict=True))
                    rows.append([what, str(n), f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.1%}"])
                    if what != "perplexity" and n == 1:
                        alone = b
                overhead = task_seconds(address)
            quantized = Path(f"{there}.gguf").stat().st_size
        read, written = disk_rates(source)
        size = source.stat().st_size
    print(f"{n_weights / 1e9:.2f} billion weights, {size / 1e9:.2f} GB\n")
    print(table(["what", "workers", "one process s", "workers s", "overhead"], rows))
    if alone:
        estimate(n_weights / alone, overhead, read, written, quantized / n_weights)


def estimate(rate: float, overhead: float, read: float, written: float, write: float) -> None:
    """Print what bounds the workers: `rate` in weights a second of one, `overhead` in seconds a task.

    `read` and `written` are the disk's bytes a second, `write` the bytes of a quantized weight.
    """
    nbytes_in, nbytes_out = WEIGHTS * READ, WEIGHTS * write
    bounds = [
        (f"arithmetic: {rate / 1e6:.0f} million weights a second and worker", WEIGHTS / rate / WORKERS),
        (f"a disk like this for each worker: {read / 1e9:.2f} GB/s, writing {written / 1e9:.2f} GB/s",
         (nbytes_in / read + nbytes_out / written) / WORKERS),
        ("a disk like this for all", nbytes_in / read + nbytes_out / written),
        *((name, (nbytes_in + nbytes_out) / speed) for name, speed in NETWORKS.items()),
        (f"the scheduler: {WEIGHTS / PART:.0f} tasks of {overhead * 1e3:.1f} ms", WEIGHTS / PART * overhead),
        (f"the largest piece, {PART / 1e6:.0f} million weights, which the last worker may begin last", PART / rate),
    ]  # fmt: skip
    print(f"\nOn paper: {WORKERS} workers of one thread, {WEIGHTS / 1e9:.0f} billion weights\n")
    print(table(["bound by", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in bounds]))


if __name__ == "__main__":
    main()
