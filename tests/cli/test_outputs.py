"""What commands write where, and what they refuse to write over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call, listing, refusal

TEXT = ROOT / "fixtures" / "tinylm-test.txt"
QUANTKIT = [sys.executable, "-c", "from quantkit.cli.main import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "tinylm-BF16.gguf"
    call("convert", TINYLM, "-o", path)
    return path


def test_nothing_is_overwritten_unless_forced(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    shutil.copy(model, own)
    some = ("--text", TEXT, "--chunks", 1, "--n-ctx", 64)
    commands = [
        ("convert", TINYLM, "-o"),
        ("quantize", own, "--type", "F16", "-o"),
        ("dequantize", own, "-o"),
        ("merge", own, "-o"),
        ("imatrix", TINYLM, *some, "-o"),
        ("perplexity", TINYLM, *some, "--save-logits"),
    ]
    for command in commands:
        precious = tmp_path / "precious"
        precious.write_text("precious")
        (tmp_path / "link").symlink_to(precious)
        os.mkfifo(tmp_path / "pipe")
        before = sorted(tmp_path.iterdir())
        assert refusal(*command, precious).endswith("precious: exists already; --force replaces it"), command
        for name in ("link", "pipe"):
            assert "never replaced" in refusal(*command, tmp_path / name, "--force")
        assert "is the input" in refusal(*command, own if own in command else command[1] / "config.json", "--force")
        assert precious.read_text() == "precious" and sorted(tmp_path.iterdir()) == before
        call(*command, precious, "--force")
        assert precious.read_bytes() != b"precious" and sorted(tmp_path.iterdir()) == before
        for name in ("precious", "link", "pipe"):
            (tmp_path / name).unlink()


def test_sources_know_their_files(tmp_path: Path) -> None:
    """A checkpoint's shards, configs and tokenizer are never an output, nor are a command's other inputs."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINYLM, checkpoint)
    matrix = tmp_path / "imatrix.gguf"
    some = ("--text", TEXT, "--chunks", 1, "--n-ctx", 64)
    call("imatrix", TINYLM, *some, "-o", matrix)
    before = listing(tmp_path)
    for file in sorted(checkpoint.iterdir()):
        if file.name != "LICENSE":
            assert "is the input" in refusal("convert", checkpoint, "-o", file, "--force")
    assert "is the input" in refusal(
        "quantize", checkpoint, "--type", "F16", "--imatrix", matrix, "-o", matrix, "--force"
    )
    assert "is the input" in refusal("imatrix", "--in-file", matrix, "-o", matrix, "--force")
    text = tmp_path / "text.txt"
    shutil.copy(TEXT, text)
    assert "is the input" in refusal("perplexity", checkpoint, "--text", text, "--save-logits", text, "--force")
    assert "is the input" in refusal("imatrix", checkpoint, "--text", text, "-o", text, "--force")
    assert listing(tmp_path) == before | {"text.txt": text.read_bytes()}


def test_default_names_meet_no_other_file(model: Path, tmp_path: Path) -> None:
    """`dequantize model-Q4_0.gguf --type F16` once replaced the original, model-F16.gguf."""
    original, quantized = tmp_path / "model-F16.gguf", tmp_path / "model-Q4_0.gguf"
    call("quantize", model, "--type", "F16", "-o", original)
    call("quantize", original, "--type", "Q4_0")
    before = listing(tmp_path)
    assert set(before) == {"model-F16.gguf", "model-Q4_0.gguf"}
    call("dequantize", quantized, "--type", "F16")
    assert listing(tmp_path).keys() - before.keys() == {"model-Q4_0-F16.gguf"}
    assert "exists already" in refusal("dequantize", quantized, "--type", "F16")
    assert "is the input" in refusal("quantize", original, "--type", "F16", "--force")
    call("split", original, "--split-max-tensors", 20)
    shard = sorted(tmp_path.glob("model-F16-00001-of-*.gguf"))[0]
    assert "is the input" in refusal("split", shard, "--split-max-tensors", 20, "--force")
    call("merge", shard, "-o", f"{tmp_path}/new/")
    assert (tmp_path / "new" / "model-F16.gguf").read_bytes() == before["model-F16.gguf"]
    assert original.read_bytes() == before["model-F16.gguf"] and quantized.read_bytes() == before["model-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("convert", TINYLM), "Tinylm-3.4M-BF16.gguf"),
        (("quantize", None, "--type", "F16"), "tinylm-F16.gguf"),
        (("dequantize", None), "tinylm-BF16-F32.gguf"),
        (("merge", None), "tinylm-BF16.gguf"),
        (("split", None), "tinylm-BF16-00001-of-00001.gguf"),
        (("imatrix", TINYLM, "--text", TEXT, "--chunks", 1, "--n-ctx", 64), "imatrix.gguf"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_output_means_the_same_everywhere(command: tuple[object, ...], name: str, model: Path, tmp_path: Path) -> None:
    """An existing directory, or a name that ends in a slash, is a directory; any other name is a file."""
    command = tuple(model if word is None else word for word in command)
    (tmp_path / "there").mkdir()
    call(*command, "-o", tmp_path / "there")
    call(*command, "-o", f"{tmp_path}/new.gguf/")
    call(*command, "-o", tmp_path / "file")
    shard = "file-00001-of-00001.gguf" if command[0] == "split" else "file"
    assert set(listing(tmp_path)) == {"there", f"there/{name}", "new.gguf", f"new.gguf/{name}", shard}
    assert "there is no directory" in refusal(*command, "-o", tmp_path / "nowhere" / "file")
    assert "name of the output is empty" in refusal(*command, "-o", "")


def test_several_types_need_a_directory(model: Path, tmp_path: Path) -> None:
    types = ("--type", "F16,F32")
    assert "name a directory: " in refusal("quantize", model, *types, "-o", tmp_path / "new")
    assert "name a directory: " in refusal("report", model, *types, "-o", tmp_path / "new")
    call("quantize", model, *types, "-o", f"{tmp_path}/new/", "--dry-run")
    call("quantize", model, "--type", "F16", "-o", f"{tmp_path}/new/", "--dry-run")
    assert listing(tmp_path) == {}
    call("quantize", model, *types, "-o", f"{tmp_path}/a/b/")
    assert set(listing(tmp_path)) == {"a", "a/b", "a/b/tinylm-F16.gguf", "a/b/tinylm-F32.gguf"}


def test_directories_made_for_nothing_are_removed(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refusal("report", TINYLM, "--types", "F16", "--text", short, "-o", f"{tmp_path}/a/b/")
    assert set(listing(tmp_path)) == {"short.txt"}


def test_two_runs_to_one_output(model: Path, tmp_path: Path) -> None:
    """One wins, the others say so: a corrupt file under the final name came of it once."""
    commands = [[*QUANTKIT, "quantize", str(model), "--type", kind, "-o", "out.gguf"] for kind in ("F16", "F32") * 2]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for command in commands]
    told = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1, 1], told
    assert sum("exists already" in each for each in told) == 3
    winner = next(command for run, command in zip(runs, commands, strict=True) if run.returncode == 0)
    call("quantize", model, "--type", winner[winner.index("--type") + 1], "-o", tmp_path / "alone.gguf")
    assert set(listing(tmp_path)) == {"out.gguf", "alone.gguf"}
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [*QUANTKIT, "perplexity", str(TINYLM), "--text", str(TEXT), "--save-logits", "x"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob("*.partial")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        process.send_signal(number)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert listing(tmp_path) == {}


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As nohup wants it."""
    probe = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[1:] = ['--version']\n"
        "from quantkit.cli.main import main\n"
        "try: main()\nexcept SystemExit: print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.endswith("True\n")
