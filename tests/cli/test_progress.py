"""Progress on a terminal and elsewhere, and what -v tells."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call

from quantkit.cli import progress as module
from quantkit.cli.progress import Progress
from quantkit.compile.observers import observers, tell

TEXT = ROOT / "fixtures" / "tinylm-test.txt"


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def at(clock: Clock, seconds: float) -> None:
    clock.now = 1000.0 + seconds


def test_time_left_comes_with_the_first_batch(clock: Clock) -> None:
    progress = Progress("measure", "chunk")
    at(clock, 5)
    assert progress.seconds_left() is None and progress.state() == "measure: running, 5 s so far"
    at(clock, 10)
    for done in range(1, 9):  # a batch of eight chunks, told one by one
        progress.update(done, 80, "PPL = 7.0")
    assert progress.seconds_left() == pytest.approx(90)
    at(clock, 12)  # it counts down
    assert progress.seconds_left() == pytest.approx(88)
    assert progress.state() == "measure: 8 of 80 chunks, 88 s left, PPL = 7.0"
    at(clock, 14)  # the second batch took less: the first had to load the weights
    for done in range(9, 17):
        progress.update(done, 80, "")
    assert progress.seconds_left() == pytest.approx(64 * 4 / 8)


def test_compiling_says_nothing_about_speed(clock: Clock) -> None:
    with Progress("quantize", "B", 10_000_000) as progress:
        at(clock, 1)
        tell("Q6_K.encode")
        at(clock, 21)
        assert progress.state() == "quantize: compiling Q6_K.encode, 21 s so far"
        tell("")
        at(clock, 22)
        progress.advance(1_000_000, "output.weight")
        assert progress.seconds_left() == pytest.approx(18)  # 2 s for a tenth, without the 20 s of compilation
        tell("Q4_K.encode")
        at(clock, 30)
        assert progress.seconds_left() is None
        assert progress.state() == "quantize: 1.0 MB of 10.0 MB, compiling Q4_K.encode, output.weight"
        tell("")
        assert progress.seconds_left() == pytest.approx(18)
    assert observers == []


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "REFRESH", 0.01)
    with Progress("split", "B", 1000):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""  # short commands are silent
    monkeypatch.setattr(module, "FIRST_LINE", 0.02)
    monkeypatch.setattr(module, "LINES", 0.05)
    with Progress("split", "B", 1000) as progress:
        progress.advance(500)
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 7 and all(line.startswith("split: 500 bytes of 1.0 kB") for line in lines)
    with Progress("split", "B", 1000, hidden=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_v_tells_what_was_decided(tmp_path: Path) -> None:
    """The source, what is written, threads; and what computes. Twice, debug messages too, but no other library's."""
    out = tmp_path / "out.gguf"
    said = call("quantize", TINYLM, out, "Q4_K_M", "-v", "-t", 2).stderr
    assert f"{TINYLM}: checkpoint, 30 tensors, matrices as BF16\n" in said
    assert f"{out}: Q4_K_M, 2.2 MB (20 Q4_K, 7 F32, 3 Q6_K)\n" in said
    assert f"{TINYLM}: read once, on 2 threads\n" in said
    said = call("perplexity", out, "--text", TEXT, "--n-ctx", 64, "--chunks", 2, "-v", "-t", 1).stderr
    assert f"{out}: GGUF, 1 shard, 30 tensors\n" in said
    assert re.search(rf"{re.escape(str(out))}: .*numpy.*1 thread.*products by \S", said)
    assert "debug: quantkit." not in said
    said = call("dequantize", out, "-o", tmp_path / "a.gguf", "-vv").stderr
    assert not re.search(r"debug: (?!quantkit\.)", said)
    assert "GGUF, 1 shard" not in call("dequantize", out, "-o", tmp_path / "b.gguf").stderr
    assert call("dequantize", out, "-o", tmp_path / "c.gguf", "-q").stderr == ""


def on_a_terminal(*args: object) -> str:
    """All that `quantkit ARGS` prints on a terminal of 100 columns."""
    import fcntl
    import pty
    import struct
    import termios

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "quantkit", *map(str, args)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    printed = b""
    while True:
        try:
            some = os.read(terminal, 65536)
        except OSError:  # how Linux tells the end
            some = b""
        if not some:
            break
        printed += some
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, printed
    return printed.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_bar_on_a_terminal() -> None:
    shown = on_a_terminal("perplexity", TINYLM, "--text", TEXT, "--n-ctx", 512)
    bars = [line for line in shown.split("\r") if line.startswith("perplexity:")]
    assert "| 0/? chunk [00:00" in bars[0]
    done = [bar for bar in bars if re.search(r"\| \d+/70 chunk \[\d\d:\d\d, \d+ s left, PPL = ", bar)]
    assert done and "PPL = 15.3374 ±" in shown
    assert "perplexity:" not in on_a_terminal("perplexity", TINYLM, "--text", TEXT, "--chunks", 4, "-q")


def test_a_batch_under_way_counts_in_part(clock: Clock) -> None:
    progress = Progress("perplexity", "chunk")
    at(clock, 4)
    progress.update(0.5, 10)  # half of the layers of the first batch
    at(clock, 6)
    progress.update(1.5, 10)
    assert progress.seconds_left() == pytest.approx(17)
    assert progress.state() == "perplexity: 1 of 10 chunks, 17 s left"
