"""How long each block format's kernels take to compile where nothing is cached: a markdown table of processor seconds.

    python scripts/bench/bench_compile.py [--types IQ3_XXS,Q4_K]

Each case is the first call in a process of its own with an empty cache, so that nothing is shared with another type.
Processor time is counted, which other programs on the machine disturb little.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quantkit import GGMLType, blocks  # noqa: E402
from quantkit.report.tables import table  # noqa: E402

CASES = ("encode", "weighted", "decode")
# Prints the processor seconds of one first call. numba and the tables of gguf are imported before.
FIRST_CALL = """
import sys, time
import numpy as np
from quantkit import GGMLType, blocks
kind, case = GGMLType.parse(sys.argv[1]), sys.argv[2]
blocks.encodable()
from gguf import quants
rows, weights = np.ones((1, 1024), np.float32), np.ones(1024, np.float32)
data = np.zeros((1, kind.row_nbytes(1024)), np.uint8)
start = time.process_time()
if case == "decode":
    blocks.decode(data, kind)
else:
    blocks.encode(rows, kind, weights if case == "weighted" else None)
print(time.process_time() - start)
"""


def first_call(kind: GGMLType, case: str) -> str:
    """The processor seconds of the first `case` of `kind`; "-" where ggml needs weights."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FIRST_CALL, kind.name, case]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0 and "without importance weights" in result.stderr:
        return "-"
    result.check_returncode()
    return f"{float(result.stdout):.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="comma-separated; all that have kernels if left out")
    options = parser.parse_args()
    kinds = [GGMLType.parse(name) for name in options.types.split(",")] if options.types else blocks.encodable()
    print(table(["type", *CASES], [[kind.name, *(first_call(kind, case) for case in CASES)] for kind in kinds]))


if __name__ == "__main__":
    main()
