"""How long quantkit takes before it works: start-up, a large vocabulary, and the first run's compilation.

    python scripts/bench/bench_startup.py [--types Q8_0,Q4_K_M] [--repeat 3]

Every run is a process of its own, the fastest of three. A first run has an empty cache of kernels, new each time. The
report is that of the README's first lines.
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

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TINYLM, TEXT = FIXTURES / "tinylm", FIXTURES / "tinylm-test.txt"


def main() -> None:
    """Time the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="Q8_0,Q4_K_M")
    parser.add_argument("--repeat", type=int, default=3)
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

        def fastest(command: list[str], first: bool = False) -> str:
            """Seconds of the fastest run of `command`; with `first`, each with a new cache, else all with the last."""
            times = []
            for _ in range(options.repeat):
                if first:
                    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(dir=home)
                times.append(run([silent, *command])[0])
            return f"{min(times):.2f}"

        for name, command in (
            ("--help", ["--help"]),
            ("inspect, 256,000 tokens", ["inspect", str(home / "tokens.gguf")]),
        ):
            rows.append([name, fastest(command), ""])
        out = ["-q", "--force", "-o", str(home / "out.gguf")]
        report = ["report", str(TINYLM), "--types", "Q8_0,Q4_K_M,Q4_0", "--text", str(TEXT), *out[:3], str(home)]
        commands = {
            f"quantize tinylm, {kind}": ["quantize", str(TINYLM), "--type", kind, *out]
            for kind in options.types.split(",")
        }
        calibrated = ["--calibration", str(FIXTURES / "tinylm-calib.txt"), *out]
        for kind, rounding in (("IQ3_XXS", "nearest"), ("Q4_K_M", "gptq"), ("IQ2_M", "gptq")):
            name = f"quantize tinylm, {kind}, with a calibration, {rounding}"
            commands[name] = ["quantize", str(TINYLM), "--type", kind, "--rounding", rounding, *calibrated]
        commands["perplexity of tinylm"] = ["perplexity", str(TINYLM), "--text", str(TEXT), "-q"]
        commands["report on tinylm, three types"] = report
        for name, command in commands.items():
            first = fastest(command, first=True)
            rows.append([name, fastest(command), first])
    print(table(["command", "s", "first run s"], rows))


if __name__ == "__main__":
    main()
