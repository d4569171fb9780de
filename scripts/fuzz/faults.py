"""Faults while commands run: kills, reads and writes that fail, a disk that is full (Linux; needs strace).

    python scripts/fuzz/faults.py [--kills 50] [--work FOLDER]

Every command runs once undisturbed; what it writes is what must come. Then it is killed by SIGKILL at random moments:
no name may hold anything but those bytes, and the command run again must end with them. Then strace makes a system call
fail, of reading the source, or of writing, syncing and naming the output, once at every few calls: the command must end
with exit code 1 and one line, or with the right bytes where the call did not matter, and leave nothing half-written.
Last, where this process may mount one, outputs go to a tmpfs of 1 MB. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from quantkit.report.tables import table

ROOT = Path(__file__).resolve().parents[2]
TINYLM = ROOT / "fixtures" / "tinylm"
TEXT = ROOT / "fixtures" / "tinylm-test.txt"
CUT = ("--text", str(TEXT), "--n-ctx", "64", "--chunks", "4")
# What runs, with the folder of its outputs to follow; each writes something of another kind.
COMMANDS: dict[str, list[str]] = {
    "convert": ["convert", str(TINYLM)],
    "quantize": ["quantize", str(TINYLM), "--type", "Q8_0,Q4_0"],
    "imatrix": ["imatrix", str(TINYLM), *CUT],
    "perplexity": ["perplexity", str(TINYLM), *CUT, "--save-logits"],
    "report": ["report", str(TINYLM), "--types", "Q8_0,Q4_0", *CUT, "--prompts", "0"],
}
# System calls, the error each meets, and whether only those on the source's file are meant.
FAULTS = [
    ("pread64", "EIO", True),
    ("openat", "EACCES", True),
    ("pwrite64", "ENOSPC", False),
    ("pwrite64", "EDQUOT", False),
    ("pwrite64", "EIO", False),
    ("fsync", "EIO", False),
    ("link,linkat", "EROFS", False),
    ("rename,renameat,renameat2", "EACCES", False),
]
# The calls of a kind that fail: these, each in a run of its own.
MOMENTS = (1, 3, 8)


def command(name: str, out: Path) -> list[str]:
    """The command line of `name` that writes into `out`."""
    target = f"{out}/" if name in ("quantize", "report", "convert") else f"{out}/file"
    place = [target] if name == "perplexity" else ["-o", target]
    return [sys.executable, "-m", "quantkit", *COMMANDS[name], *place, "-t", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, but for what a stopped report keeps for its resumption, and temporary files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".quantkit/") and not name.endswith(".partial"):
            found[name] = path.read_bytes()
    return found


def comparable(name: str, data: bytes) -> bytes:
    """A file's bytes without the times and the moments that a report tells."""
    if not name.endswith((".json", ".html", ".md")):
        return data
    data = re.sub(rb"[0-9a-f]{16,}|\b\d+(\.\d+)? (s|seconds)\b", b"", data)
    return re.sub(rb'"(seconds|peak_memory|tokens_per_second|date|created)":\s*[^,}\n]+', b"", data)


class Wrong(Exception):
    """Something that must not be."""


def check_names(folder: Path, whole: dict[str, bytes]) -> None:
    """Nothing stands under a name but what belongs there, whole."""
    for name, data in contents(folder).items():
        if name not in whole:
            raise Wrong(f"{name} should not be there")
        if name.endswith((".json", ".html", ".md")):
            if len(data) < len(whole[name]) // 2:
                raise Wrong(f"{name} is not whole")
        elif data != whole[name]:
            raise Wrong(f"{name} is not whole")


def run(words: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, **options)  # type: ignore[call-overload,no-any-return]


def check_error(ended: subprocess.CompletedProcess[str], folder: Path, whole: dict[str, bytes]) -> bool:
    """A run that met a fault ended well, or with one line and nothing left; returns whether the fault mattered."""
    if ended.returncode == 0:
        check_names(folder, whole)
        return False
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.returncode != 1 or len(errors) != 1 or "Traceback" in ended.stderr:
        raise Wrong(f"exit code {ended.returncode}: {ended.stderr[-400:]}")
    if left := [path for path in folder.rglob("*") if path.is_file()]:
        raise Wrong(f"left: {left}")
    return True


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="in all, shared out among the commands")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="which, with commas")
    parser.add_argument("--work", type=Path, help="where to work; a temporary folder otherwise")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(dir=args.work) as name_of_folder:
        home = Path(name_of_folder)

        def fresh() -> Path:
            folder = home / f"out{rng.getrandbits(64):x}"
            folder.mkdir()
            return folder

        chosen = args.commands.split(",")
        for name in chosen:
            folder = fresh()
            run(command(name, folder), check=True)  # compiles
            shutil.rmtree(folder)
            folder.mkdir()
            began = time.perf_counter()
            run(command(name, folder), check=True)
            seconds, whole = time.perf_counter() - began, contents(folder)
            killed = 0
            for _ in range(-(-args.kills // len(chosen))):
                folder = fresh()
                process = subprocess.Popen(
                    command(name, folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                time.sleep(rng.uniform(0, 1.05 * seconds))
                process.kill()
                killed += process.wait() != 0
                try:
                    check_names(folder, whole)
                    if not contents(folder).keys() >= whole.keys():
                        for each in contents(folder) if name != "report" else ():
                            (folder / each).unlink()
                        again = run(command(name, folder))
                        if again.returncode or contents(folder).keys() != whole.keys():
                            raise Wrong(f"run again: {again.stderr[-400:]}")
                        check_names(folder, whole)
                except Wrong as problem:
                    wrong.append(f"{name} killed: {problem}")
                shutil.rmtree(folder)
            rows.append([name, "SIGKILL at a random moment", str(killed), "", ""])
            for calls, error, of_source in FAULTS:
                met = mattered = 0
                for moment in MOMENTS:
                    folder = fresh()
                    only = [word for path in sorted(TINYLM.glob("*.safetensors")) for word in ("-P", str(path))]
                    trace = ["strace", "-f", "-qq", "-o", str(home / "trace"), "-e", f"trace={calls}"]
                    trace += ["-e", f"inject={calls}:error={error}:when={moment}", *(only if of_source else [])]
                    ended = run([*trace, *command(name, folder)])
                    injected = "(INJECTED)" in (home / "trace").read_text(errors="replace")
                    met += injected
                    try:
                        mattered += check_error(ended, folder, whole)
                    except Wrong as problem:
                        wrong.append(f"{name} {calls} {error} at call {moment}: {problem}")
                    shutil.rmtree(folder)
                    if not injected:
                        break  # there are not so many calls
                if met:
                    rows.append([name, f"{calls.split(',')[0]}: {error}", "", str(met), str(mattered)])
            small = home / "small"
            small.mkdir()
            if os.path.ismount(small) or run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]).returncode:
                rows.append([name, "tmpfs of 1 MB", "", "not allowed here", ""])
            else:
                try:
                    folder = small / "out"
                    folder.mkdir()
                    mattered = check_error(run(command(name, folder)), folder, whole)
                    rows.append([name, "tmpfs of 1 MB", "", "1", str(int(mattered))])
                except Wrong as problem:
                    wrong.append(f"{name} on a small tmpfs: {problem}")
                finally:
                    run(["umount", str(small)])
            small.rmdir()
    print(table(["command", "fault", "kills", "runs that met it", "ended with one line"], rows))
    for each in wrong:
        print("WRONG:", each)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
