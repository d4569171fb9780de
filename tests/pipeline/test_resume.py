"""A quantization that is killed goes on after the last whole tensor, and ends with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call, listing, refusal

from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputGroup
from quantkit.formats.unfinished import WorkDirectory
from quantkit.pipeline import execute as module
from quantkit.pipeline.execute import execute
from quantkit.pipeline.run import plan
from quantkit.sources.source import open_model


def whole(tmp_path: Path, *kinds: str) -> dict[str, bytes]:
    folder = tmp_path / "whole"
    call("quantize", TINYLM, "--type", ",".join(kinds), "-o", f"{folder}/")
    return listing(folder)


def test_a_run_that_fails_goes_on_after_the_last_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVED", 0.0)
    source, out = open_model(TINYLM), tmp_path / "out.gguf"
    seen: list[str] = []

    def stop(tensor: str, nbytes: int) -> None:
        seen.append(tensor)
        if len(seen) == 12:
            raise KeyboardInterrupt

    def run(progress: object) -> None:
        with OutputGroup() as group:
            execute(source, [(plan(source, "Q4_0"), out)], progress=progress, group=group,  # type: ignore[arg-type]
                    work=WorkDirectory(out, True))  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert not out.exists()
    kept = tmp_path / "out.gguf.unfinished"
    record = json.loads((kept / "progress.json").read_text())["tensors"]
    assert len(record) == 12
    again: list[str] = []
    encoded: list[str] = []
    original = module._encode_piece
    monkeypatch.setattr(
        module, "_encode_piece", lambda s, lines, *rest: encoded.append(lines[0].info.name) or original(s, lines, *rest)
    )
    run(lambda tensor, nbytes: again.append(tensor))
    assert set(again) == set(source.tensors) and not set(encoded) & set(record)
    assert listing(tmp_path) == {"out.gguf": out.read_bytes()}
    call("quantize", TINYLM, "Q4_0", "-o", tmp_path / "plain.gguf")
    assert out.read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    expected = whole(tmp_path, "Q4_K_M", "Q8_0")
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, "-c", "import quantkit.pipeline.execute as e; e.SAVED = 0.0\n"
               "from quantkit.cli.main import main; main()", "quantize", str(TINYLM), "--type", "Q4_K_M,Q8_0", "-o",
               f"{folder}/", "--resume", "-t", "1"]  # fmt: skip
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not list(folder.glob("*.unfinished/*.partial")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.02 * kills)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert not list(folder.glob("*.gguf"))
        kills += 1
    if kills:
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert listing(folder) == expected


def test_the_work_of_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    source = open_model(TINYLM)

    def run(kind: str, fails: bool) -> None:
        def progress(tensor: str, nbytes: int) -> None:
            if fails:
                raise QuantkitError("stopped")

        with OutputGroup() as group:
            execute(source, [(plan(source, kind), out)], progress=progress, group=group, work=WorkDirectory(out, True))

    with pytest.raises(QuantkitError, match="stopped"):
        run("Q4_0", True)
    with pytest.raises(QuantkitError, match="another model, text, types or options"):
        run("Q8_0", False)
    record = tmp_path / "out.gguf.unfinished" / "progress.json"
    record.write_text("{")
    with pytest.raises(QuantkitError, match="missing or damaged; remove"):
        run("Q4_0", False)


def test_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.gguf.unfinished").mkdir()
    assert "in the way" in refusal("quantize", TINYLM, "Q4_0", "-o", tmp_path / "a.gguf", "--resume")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "b.gguf.unfinished").symlink_to(elsewhere)
    assert "in the way" in refusal("quantize", TINYLM, "Q4_0", "-o", tmp_path / "b.gguf", "--resume")
    work = WorkDirectory(tmp_path / "c.gguf").make()
    target = tmp_path / "precious"
    target.write_text("precious")
    (work / "c.gguf.partial").hardlink_to(target)
    assert "not an unfinished file" in refusal("quantize", TINYLM, "Q4_0", "-o", tmp_path / "c.gguf", "--resume")
    assert target.read_text() == "precious"
