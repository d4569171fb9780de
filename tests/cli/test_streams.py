"""Results and messages on streams that are closed, full, left by their reader, or of an old encoding."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from test_cli import run

TEXT = ROOT / "fixtures" / "tinylm-test.txt"
MEASURE = ("perplexity", TINYLM, "--text", TEXT, "--chunks", 2, "--n-ctx", 64)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="redirections of a POSIX shell")


def shell(*args: object, redirect: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    """Run `quantkit ARGS` with a shell's redirections."""
    words = " ".join(shlex.quote(str(word)) for word in (sys.executable, "-m", "quantkit", *args))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(["bash", "-c", f"{words} {redirect}"], capture_output=True, env=environment, check=False)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_results_in_old_encodings(encoding: str) -> None:
    """What an encoding lacks is written in ASCII; what it has stays."""
    result = shell(*MEASURE, redirect="", encoding=encoding)
    assert result.returncode == 0, result.stderr
    mark = "+/-" if encoding == "ascii" else "±"
    assert f" {mark} " in result.stdout.decode(encoding)
    compared = shell(*MEASURE, "--base", TINYLM, redirect="", encoding=encoding)
    assert compared.returncode == 0 and "(delta p)" in compared.stdout.decode(encoding)
    assert b"Traceback" not in compared.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_messages_in_old_encodings(tmp_path: Path, encoding: str) -> None:
    """A name that the terminal cannot show is still an error of one line."""
    result = shell("inspect", tmp_path / "模型.gguf", redirect="", encoding=encoding)
    assert result.returncode == 1
    assert result.stderr.decode(encoding).count("\n") == 1
    assert "\\u6a21\\u578b.gguf" in result.stderr.decode(encoding)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """File names are bytes, and those that are not UTF-8 are shown escaped: a terminal may obey them."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    result = shell("inspect", os.fsdecode(name), redirect="")
    assert result.returncode == 1 and name.replace(b"\xe9", rb"\xe9") in result.stderr


def test_help_is_ascii() -> None:
    for name in ("quantize", "perplexity", "imatrix", "report"):
        assert run(name, "-h").stdout.isascii()


def test_closed_stderr(tmp_path: Path) -> None:
    """Nothing else takes the place of a closed stderr: the file that is written is whole, and messages are lost."""
    out = tmp_path / "out.gguf"
    assert shell("quantize", TINYLM, "Q8_0", "-o", out, redirect="2>&-").returncode == 0
    run("quantize", TINYLM, "Q8_0", "-o", tmp_path / "same.gguf")
    assert out.read_bytes() == (tmp_path / "same.gguf").read_bytes()
    measured = shell(*MEASURE, redirect="2>&-")
    assert measured.returncode == 0 and b"PPL = " in measured.stdout
    assert shell("inspect", tmp_path / "none.gguf", redirect="2>&-").returncode == 1


def test_all_streams_closed() -> None:
    assert shell("types", redirect="<&- >&- 2>&-").returncode == 0


def test_readers_that_leave() -> None:
    """No traceback, and no complaint of Python's as it ends."""
    result = shell("types", redirect="| head -n 1")
    assert result.stdout.startswith(b"type ") and result.stderr == b""
    result = shell("inspect", TINYLM, redirect="2>&1 | head -n 1")
    assert result.returncode == 0 and b"Traceback" not in result.stdout + result.stderr


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    """A file for stdout that may not grow: the result is lost, and the command says so."""
    result = shell("types", redirect=f"> {shlex.quote(str(tmp_path / 'full'))}; echo $?", encoding="utf-8")
    assert result.stdout == b"0\n"
    limited = f"ulimit -f 0; {shlex.quote(sys.executable)} -m quantkit types > {shlex.quote(str(tmp_path / 'full'))}"
    refused = subprocess.run(["bash", "-c", limited], capture_output=True, check=False)
    assert refused.returncode == 1 and refused.stderr == b"error: File too large\n"
