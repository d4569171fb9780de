"""How long quantkit takes before it works: start-up, a large vocabulary, and the first run's compilation.

    python scripts/bench_startup.py [--types Q8_0,Q4_K_M]

Every run is a process of its own, the fastest of three. A first run has an empty cache of kernels.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from bench_quantize import OURS, run

from quantkit.formats.gguf import Metadata, ValueType
from quantkit.formats.output import GGUFOutput
from quantkit.report.tables import table

TINYLM = Path(__file__).resolve().parent.parent / "fixtures" / "tinylm"


def main() -> None:
    """Time the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="Q8_0,Q4_K_M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        metadata = Metadata()
        metadata.set("general.architecture", ValueType.STRING, "llama")
        metadata.set("tokenizer.ggml.tokens", ValueType.ARRAY, [f"token {i}" for i in range(256_000)], ValueType.STRING)
        with GGUFOutput(home / "tokens.gguf", metadata, []):
            pass
        silent = f"import os, sys; sys.stdout = open(os.devnull, 'w'); {OURS}"
        rows = []
        for name, command in (
            ("--help", ["--help"]),
            ("inspect, 256,000 tokens", ["inspect", str(home / "tokens.gguf")]),
        ):
            rows.append([name, f"{min(run([silent, *command])[0] for _ in range(3)):.2f}", ""])
        for kind in options.types.split(","):
            os.environ["NUMBA_CACHE_DIR"] = str(home / kind)
            command = [silent, "quantize", str(TINYLM), "--type", kind, "-q", "-o", str(home / "out.gguf")]
            first = run(command)[0]
            rows.append([f"quantize tinylm, {kind}", f"{min(run(command)[0] for _ in range(3)):.2f}", f"{first:.2f}"])
    print(table(["command", "s", "first run s"], rows))


if __name__ == "__main__":
    main()
