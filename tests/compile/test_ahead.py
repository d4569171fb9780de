"""Helper processes of a first run, as the commands start them: each test begins with an empty cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM

from quantkit import GGMLType, blocks
from quantkit.compile.ahead import _HELPER

TEXT = ROOT / "fixtures" / "tinylm-test.txt"
REPORT = ("report", TINYLM, "--types", "Q4_K_M,Q4_0", "--text", TEXT, "--n-ctx", 64, "--chunks", 2)
PERPLEXITY = ("perplexity", TINYLM, "--text", TEXT, "--n-ctx", 64, "--chunks", 2)
QUANTIZE = ("quantize", TINYLM, "--type", "Q4_K_M")
CALIBRATED = (*QUANTIZE, "--calibration", TEXT, "--n-ctx", 64, "--chunks", 2)

# The command line, which tells at the end of the processes that it started and of the kernels that it compiled.
COMMAND = """
import sys
started, lost, compiled = [], [], []
def helper(name, args): name == "subprocess.Popen" and "serve()" in str(args[1]) and started.append(args[0])
sys.addaudithook(helper)
{before}
from quantkit.cli.main import main
try:
    main()
finally:
    import numba.core.event
    print(len(started), "started", *lost, file=sys.stderr)
"""
# Compiles one job after the other in this process.
ONE_BY_ONE = """
import sys
from pathlib import Path
from quantkit.pipeline.mixtures import file_type
from quantkit.sources.source import open_model
from quantkit.evaluate import needed_kernels
from quantkit.calibration.run import CalibratedRun, Calibration
from quantkit.pipeline.options import QuantizeOptions
from quantkit.report import ladder
source = open_model(sys.argv[1])
wanted = ladder.ladder_kernels(source, [file_type("Q4_K_M"), file_type("Q4_0")])
calibrated = CalibratedRun(source, Calibration(text=""), QuantizeOptions(), types=["Q4_K_M"]).kernels()
for job in [*wanted, *needed_kernels.measuring_kernels(source), *calibrated]:
    job.kernel.compile(job.signature)
"""
# Counts the kernels, pieces of kernels aside, that this process compiles.
COUNT = """
from numba.core import event
class Counter(event.Listener):
    depth = 0
    def on_start(self, event):
        if not self.depth: compiled.append(event.data["dispatcher"].py_func.__qualname__)
        self.depth += 1
    def on_end(self, event): self.depth -= 1
event.register("numba:compile", Counter())
import atexit
atexit.register(lambda: print("compiled:", *compiled, file=sys.stderr))
"""
# Has helpers started as another program; processes that read vocabularies start as always.
HELPER_IS = """
import shutil
from types import SimpleNamespace
from quantkit.compile import ahead
ahead.sys = SimpleNamespace(executable={}, path=sys.path)
"""
# Waits for a helper to be at work, and does something about it.
WHEN_AT_WORK = """
import threading, time
from quantkit.compile import cache as kernel_cache
def watch():
    while kernel_cache.before_compiling is None: time.sleep(0.01)
    helpers = kernel_cache.before_compiling.__self__
    while not helpers._under_way: time.sleep(0.01)
    {then}
threading.Thread(target=watch, daemon=True).start()
"""


def start(cache: Path, *args: object, before: str = "") -> subprocess.Popen[str]:
    """Start a command with two threads and its cache of kernels in `cache`; see `COMMAND` for `before`."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(before=before), *map(str, args), "-t", "2"],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(cache: Path, *args: object, before: str = "") -> str:
    """Run such a command, which must do its work; returns what it said."""
    process = start(cache, *args, before=before)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return said


def test_a_helper_the_first_time_only(tmp_path: Path) -> None:
    first = run(tmp_path / "cache", *QUANTIZE, "-o", tmp_path / "a.gguf")
    assert "1 started" in first and first.count("Compiling kernels for this machine; later runs skip this.") == 1
    second = run(tmp_path / "cache", *QUANTIZE, "-o", tmp_path / "b.gguf", before=COUNT)
    assert "0 started" in second and "compiled:\n" in second and "Compiling" not in second
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_jobs_are_what_the_commands_compile(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", ONE_BY_ONE, str(TINYLM)], env=environment, cwd=ROOT, check=True)
    for command in ((*REPORT, "-o", f"{tmp_path}/out/"), PERPLEXITY, (*CALIBRATED, "-o", tmp_path / "a.gguf")):
        said = run(cache, *command, before=COUNT)
        assert "0 started" in said and "compiled:\n" in said, said


def test_a_format_with_a_grid_compiles_once() -> None:
    """With importance weights or without, it is the same kernel: both take seconds."""
    jobs = blocks.codec_kernels([(GGMLType.IQ3_S, weighted) for weighted in (True, False)])
    assert [job.kernel for job in jobs].count(blocks.block(GGMLType.IQ3_S).encode_kernel()[0]) == 1


def test_one_thread_has_no_helper(tmp_path: Path) -> None:
    said = run(tmp_path / "cache", *QUANTIZE, "-o", tmp_path / "a.gguf", "-t", 1, before="sys.argv[-2:] = []")
    assert "0 started" in said


def test_no_cache_no_helper(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run(tmp_path / "file", *QUANTIZE, "-o", tmp_path / "a.gguf")
    assert "0 started" in said and "so will later runs, since no cache can be written" in said


@pytest.mark.parametrize(
    "before",
    [
        HELPER_IS.format("shutil.which('false') or shutil.which('where')"),
        HELPER_IS.format("sys.executable + '-that-is-not'"),
        WHEN_AT_WORK.format(then="helpers._processes[0].kill(); lost.append('killed')"),
    ],
    ids=["fails", "is missing", "is killed"],
)
def test_a_helper_that_fails_fails_nothing(tmp_path: Path, before: str) -> None:
    said = run(tmp_path / "cache", *QUANTIZE, "-o", tmp_path / "a.gguf", before=before)
    assert "1 started" in said
    assert "is killed" not in os.environ["PYTEST_CURRENT_TEST"] or "killed" in said
    run(tmp_path / "cache", *QUANTIZE, "-o", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to one process")
def test_ctrl_c_leaves_no_helper(tmp_path: Path) -> None:
    # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    before += WHEN_AT_WORK.format(then="print('pid', helpers._processes[0].pid, file=sys.stderr, flush=True)")
    process = start(tmp_path / "cache", *REPORT, "-o", f"{tmp_path}/out/", before=before)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("pid "))
    helper = int(line.split()[1])
    os.kill(helper, 0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(ProcessLookupError):
        os.kill(helper, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to one process")
def test_ctrl_c_is_not_lost_where_nothing_can_be_raised(tmp_path: Path) -> None:
    """As in a callback of numba's compiler: Python reports the exception there, and goes on."""
    before = """
class Lost:
    def __del__(self): raise KeyboardInterrupt
sys.addaudithook(lambda name, args: name == "open" and str(args[0]).endswith(".safetensors") and bool(Lost()))
"""
    process = start(tmp_path / "cache", *REPORT, "-o", f"{tmp_path}/out/", before=before)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "KeyboardInterrupt" not in said
    assert not list((tmp_path / "out").glob("*"))


def test_a_helper_ends_with_its_parent() -> None:
    """The parent's end, however sudden, is the end of the helper's input."""
    command = [sys.executable, "-c", _HELPER, *sys.path]
    helper = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert helper.stdout is not None and helper.stdin is not None
    assert helper.stdout.read(1) == b"."
    helper.stdin.close()
    assert helper.wait(timeout=60) == 0
    assert helper.stdout.read() == b""
    helper.stdout.close()
