"""Coverage-guided fuzzing of every reader, by atheris (pip install atheris; Linux and macOS).

Usage: python scripts/fuzz/fuzz.py [TARGET ...] [--seconds 60] [--work FOLDER]

Each target runs in a process of its own for so many seconds, from the corpus that corpus.py makes and what earlier runs
added to it in FOLDER. An input takes at most 5 s and 1 GB. What breaks a target is kept in FOLDER/crashes. Prints a
line for each target: executions, branches reached, and what was found.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLOWEST, LARGEST, MEMORY = 5, 1 << 16, 1024

# Runs in the process of one target.
RUN = """
import logging
import pathlib
import sys
import atheris

logging.disable()

sys.path[:0] = {path!r}
# Kernels are compiled from their bytecode, so nothing may be put into it.
kernels = ["quantkit.blocks", "quantkit.compile", *{kernels!r}]
with atheris.instrument_imports(include=["quantkit"], exclude=kernels, enable_loader_override=False):
    import targets
from quantkit.errors import QuantkitError

target = targets.TARGETS[{name!r}]


def one(data):
    try:
        target(data)
    except QuantkitError as problem:
        assert "\\n" not in str(problem) and len(str(problem)) <= 2000


# Compile the kernels before anything is timed.
for path in pathlib.Path(sys.argv[-1]).iterdir():
    try:
        one(path.read_bytes())
    except Exception:
        pass  # it will come again
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


def modules_with_kernels() -> list[str]:
    """The modules outside of quantkit.blocks that have a kernel."""
    paths = [path for path in (ROOT / "quantkit").rglob("*.py") if "quantkit.compile.kernel import" in path.read_text()]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


def fuzz(name: str, seconds: int, work: Path) -> str:
    """Fuzz one target; returns its line of the table."""
    corpus, crashes = work / "corpus" / name, work / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(exist_ok=True)
    options = [
        f"-max_total_time={seconds}", f"-max_len={LARGEST}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY * 2}",
        f"-malloc_limit_mb={MEMORY}", f"-artifact_prefix={crashes}/{name}-", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN.format(name=name, path=[str(HERE), str(ROOT)], kernels=modules_with_kernels()),
            *options,
            str(corpus),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=work,
    )
    log = done.stderr + done.stdout
    (work / f"{name}.log").write_text(log)
    runs = re.search(r"number_of_executed_units: (\d+)", log)
    reached = re.findall(r"cov: (\d+)", log)
    found = "nothing" if done.returncode == 0 else _found(log)
    return f"| {name} | {int(runs[1]) if runs else 0:,} | {reached[-1] if reached else '?'} | {found} |"


def _found(log: str) -> str:
    error = re.search(r"=== Uncaught Python exception: ===\n(.*)", log)
    return (
        error[1][:100] if error else next((line for line in log.splitlines() if "ERROR" in line), "ended early")[:100]
    )


def main() -> None:
    """Fuzz what the command line names."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    import corpus
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="which; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"), help="corpus, logs and crashes")
    args = parser.parse_args()
    corpus.make(args.work / "corpus")
    print("| reader | executions | branches | found |\n| --- | ---: | ---: | --- |")
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no target {unknown.pop()}; there are {', '.join(TARGETS)}")
    for name in args.targets or TARGETS:
        print(fuzz(name, args.seconds, args.work), flush=True)


if __name__ == "__main__":
    main()
