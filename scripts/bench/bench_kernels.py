"""Speed of the block kernels against ggml's own, per thread, in the same run: a markdown table.

Ours and the reference take turns on the same arrays; each number is from the repetition that took the least processor
time, so that programs which share the machine disturb little. Needs llama_cpp, whose libggml-base is the reference.
Example: scripts/bench/bench_kernels.py --types Q4_K,Q6_K --rows 1024
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.block_reference import Ggml  # noqa: E402

from quantkit import GGMLType, blocks  # noqa: E402

N_PER_ROW = 4096
BUDGET = 0.1  # seconds of the reference in one repetition: slow formats get fewer rows, the same for both


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def fastest(ours: Callable[[], Any], theirs: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """The shortest time of each, taken in turns."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeat)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def measure(ggml: Ggml, kind: GGMLType, rows: np.ndarray, weights: np.ndarray, repeat: int) -> dict[str, Any]:
    """Millions of weights a second, ours and ggml's: encode, encode with importance weights, decode."""
    result: dict[str, Any] = {"type": kind.name}
    data = blocks.encode(rows, kind, weights)
    cases: dict[str, tuple[Callable[[np.ndarray], Any], Callable[[np.ndarray], Any], np.ndarray]] = {}
    if not ggml.requires_weights(kind):
        cases["encode"] = (lambda r: blocks.encode(r, kind), lambda r: ggml.encode(r, kind), rows)
    cases["weighted"] = (lambda r: blocks.encode(r, kind, weights), lambda r: ggml.encode(r, kind, weights), rows)
    cases["decode"] = (lambda r: blocks.decode(r, kind), lambda r: ggml.decode(r, kind), data)
    for name, (ours, theirs, array) in cases.items():
        start = time.thread_time()
        ours(array[:1])  # compiled, or loaded from the cache
        result[f"{name}_ready"] = time.thread_time() - start
        once = seconds(lambda theirs=theirs, array=array: theirs(array[:16])) / 16  # type: ignore[misc]
        some = array[: max(16, min(len(array), int(BUDGET / once)))]
        a, b = fastest(lambda: ours(some), lambda: theirs(some), repeat)  # noqa: B023
        n = len(some) * N_PER_ROW / 1e6
        result[name] = {"ours": n / a, "ggml": n / b, "ratio": b / a}
    return result


def cell(pair: dict[str, float] | None) -> str:
    """Three columns of the table."""
    if pair is None:
        return "- | - | -"
    return f"{pair['ours']:.4g} | {pair['ggml']:.4g} | {pair['ratio']:.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="comma-separated; all that have kernels if left out")
    parser.add_argument("--rows", type=int, default=512, help=f"rows of {N_PER_ROW} weights")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="numbers as JSON instead of a table")
    options = parser.parse_args()
    kinds = [GGMLType.parse(name) for name in options.types.split(",")] if options.types else blocks.encodable()
    random = np.random.default_rng(0)
    rows = random.standard_normal((options.rows, N_PER_ROW), np.float32) * np.float32(0.02)
    weights = np.exp(random.standard_normal(N_PER_ROW, np.float32))
    ggml = Ggml()
    results = []
    if not options.json:
        print("Million weights a second on one thread: ours | ggml's | ratio\n")
        print("| type | encode | ggml | x | with importance | ggml | x | decode | ggml | x |")
        print("|---|" + "---:|" * 9)
    for kind in kinds:
        result = measure(ggml, kind, rows, weights, options.repeat)
        results.append(result)
        if not options.json:
            cells = [cell(result.get(case)) for case in ("encode", "weighted", "decode")]
            print(f"| {kind.name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
