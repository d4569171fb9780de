"""Quantizing by the workers of real Dask schedulers: the same bytes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_dask
from support.conversion import convert
from support.program import call, listing, refusal

pytestmark = requires_dask

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
TYPES = "Q4_K_M,Q8_0"


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start a `dask` process; returns it, and the address that it tells."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if (found := re.search(r"(?:Scheduler at|Start worker at):\s+(tcp://\S+)", line)) is not None:
                return process, found[1]
        raise AssertionError("the process ended")

    yield begin
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def scheduler(start: Callable[..., tuple[subprocess.Popen[str], str]]) -> str:
    return start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")[1]


def worker(start: Callable[..., tuple[subprocess.Popen[str], str]], address: str) -> subprocess.Popen[str]:
    return start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    call("quantize", TINYLM, "--type", TYPES, "-o", f"{folder}/")
    return listing(folder)


def test_the_same_bytes(start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path,
                        alone: dict[str, bytes]) -> None:  # fmt: skip
    address = scheduler(start)
    for _ in range(2):
        worker(start, address)
    call("quantize", TINYLM, "--type", TYPES, "-o", f"{tmp_path}/out/", "--cluster", address)
    assert listing(tmp_path / "out") == alone
    # A GGUF file as the source, and shards.
    f16 = convert(TINYLM, tmp_path / "f16.gguf", "f16")
    for name, more in (("here", []), ("there", ["--cluster", address])):
        call("quantize", f16, "Q5_0", "-o", tmp_path / f"{name}.gguf", "--split-max-tensors", 9, *more)
    here, there = ({p.name[-21:]: p.read_bytes() for p in tmp_path.glob(f"{name}-*")} for name in ("here", "there"))
    assert here == there and len(here) > 1


def test_a_worker_is_killed_and_another_joins(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path, alone: dict[str, bytes]
) -> None:
    address = scheduler(start)
    first = worker(start, address)
    command = [sys.executable, "-m", "quantkit", "quantize", str(TINYLM), "--type", TYPES]
    process = subprocess.Popen([*command, "-o", f"{tmp_path}/out/", "--cluster", address], env=ENVIRONMENT)
    while process.poll() is None and not list(tmp_path.glob("out/*.partial")):
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    worker(start, address)
    assert process.wait() == 0
    assert listing(tmp_path / "out") == alone


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    some = ["the", "and", "of", "tensor", "quick", "brown", "scale", "row", "weight", "is", "not"]
    words = np.random.default_rng(0).choice(some, 6000)
    path.write_text(" ".join(words))
    return path


def numbers(*args: object) -> dict[str, Any]:
    """What a measurement printed, without what says how long it took and where."""
    found: dict[str, Any] = json.loads(call(*args, "--json").stdout)
    return {k: v for k, v in found.items() if k not in ("seconds", "tokens_per_second", "batch", "memory")}


def test_measurements_are_the_same_to_the_last_digit(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path, text: Path
) -> None:
    address = scheduler(start)
    worker(start, address)
    start("worker", address, "--nthreads", "2", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
    there = ["--cluster", address]
    q4 = tmp_path / "q4.gguf"
    call("quantize", TINYLM, "Q4_0", "-o", q4)
    common = ["-f", text, "-c", 64]
    assert numbers("perplexity", q4, *common) == numbers("perplexity", q4, *common, *there)
    against = ["perplexity", q4, *common, "--base", TINYLM, "--save-logits"]
    found = [numbers(*against, tmp_path / "here"), numbers(*against, tmp_path / "there", *there)]
    assert found[0] == found[1]
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    stored = ["perplexity", q4, "--base-logits", tmp_path / "here"]
    assert numbers(*stored) == numbers(*stored, *there)
    for name, more in (("a", []), ("b", there)):
        call("imatrix", TINYLM, *common, "--process-output", "--output-frequency", 40, "-o", tmp_path / name, *more)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_worker_is_killed_while_measuring(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path, text: Path
) -> None:
    common = ["imatrix", TINYLM, "-f", text, "-c", 128, "--batch", 16]
    call(*common, "-o", tmp_path / "here.gguf")
    address = scheduler(start)
    first = worker(start, address)
    command = [sys.executable, "-m", "quantkit", *map(str, common), "-o", f"{tmp_path}/there.gguf"]
    process = subprocess.Popen([*command, "--cluster", address], env=ENVIRONMENT)
    from distributed import Client

    with Client(address) as client:
        while process.poll() is None and not any(client.processing().values()):
            time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    worker(start, address)
    assert process.wait() == 0
    assert (tmp_path / "here.gguf").read_bytes() == (tmp_path / "there.gguf").read_bytes()


def test_a_report_is_the_same(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, more in (("here", []), ("there", ["--cluster", "local:2"])):
        home = tmp_path / name
        home.mkdir()
        monkeypatch.chdir(home)  # files say where their importance matrix was
        options = ["--types", TYPES, "--calibration", text, "--calibration-chunks", 20, "-f", text, "-c", 64]
        told = call("report", TINYLM, *options, "--prompts", 2, "-o", "out/", "--json", *more).stdout
        files = {path.name: path.read_bytes() for path in (home / "out").glob("*.gguf")}
        rows = [
            {k: v for k, v in file.items() if "seconds" not in k and k not in ("measurements", "made")}
            for file in json.loads(told)["files"]
        ]
        found.append((files, rows))
    assert found[0] == found[1]
    assert len(found[0][0]) == 3


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_scheduler_goes_away_and_a_run_goes_on(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path, text: Path, rounding: str
) -> None:
    common = ["quantize", str(TINYLM), "--type", TYPES]
    if rounding == "gptq":
        common += ["--rounding", rounding, "--calibration", str(text), "--n-ctx", "64", "--chunks", "150"]
    call(*common, "-o", f"{tmp_path}/here/")
    lost, address = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    worker(start, address)
    common += ["-o", f"{tmp_path}/out/", "--resume", "--cluster"]
    command = [sys.executable, "-m", "quantkit", *common, address]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    begun = "out/*/*.partial" if rounding == "nearest" else "out/*/inputs-1.f32"
    while process.poll() is None and not list(tmp_path.glob(begun)):
        time.sleep(0.01)
    os.killpg(lost.pid, signal.SIGKILL)
    told = process.communicate(timeout=300)[1]
    if process.returncode:
        assert "scheduler has gone away; start it and run this again" in told and "Traceback" not in told
        assert not list(tmp_path.glob("out/*.gguf")) and not list(tmp_path.glob("out/*/inputs-*"))
        call(*common, "local:1")
    assert listing(tmp_path / "here") == listing(tmp_path / "out")


@pytest.mark.parametrize("rounding", ["gptq", "nearest", "chosen"])
def test_a_calibration_gives_the_same_bytes(
    start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path, text: Path, rounding: str
) -> None:
    common = ["quantize", TINYLM, "--calibration", text, "--n-ctx", 64, "--chunks", 150]
    if rounding == "chosen":
        common += ["--target-size", "2.5MB,2MB", "--min-type", "Q3_K", "--max-type", "Q5_K"]
    else:
        common += ["--type", TYPES, "--rounding", rounding]
    call(*common, "-o", f"{tmp_path}/here/")
    address = scheduler(start)
    first, _ = worker(start, address), worker(start, address)
    command = [sys.executable, "-m", "quantkit", *map(str, common), "-o", f"{tmp_path}/there/", "--cluster", address]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    while process.poll() is None and not list(tmp_path.glob("there/*/inputs-1.f32")) and rounding == "gptq":
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    assert process.wait() == 0
    assert listing(tmp_path / "here") == listing(tmp_path / "there")


def test_what_a_cluster_does_not_share_out(tmp_path: Path, text: Path) -> None:
    common = ["quantize", TINYLM, "-o", tmp_path / "o.gguf", "--calibration", text, "--n-ctx", 64, "--chunks", 20]
    common += ["--cluster", "local:1"]
    assert "gradients" in refusal(*common, "Q4_K_M", "--rounding", "yaqa")
    assert listing(tmp_path) == {}


def test_processes_here(tmp_path: Path, alone: dict[str, bytes]) -> None:
    call("quantize", TINYLM, "--type", TYPES, "-o", f"{tmp_path}/out/", "--cluster", "local:2")
    assert listing(tmp_path / "out") == alone


def test_errors_are_one_line(start: Callable[..., tuple[subprocess.Popen[str], str]], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for address, told in (
        ("localhost", "not a cluster"), ("local:0", "not a cluster"), ("tcp://127.0.0.1:9", "no Dask scheduler"),
    ):  # fmt: skip
        assert told in refusal("quantize", TINYLM, "Q4_0", "-o", out, "--cluster", address)
    lost, address = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    command = [sys.executable, "-m", "quantkit", "quantize", str(TINYLM), "Q4_0", "-o", str(out), "--cluster", address]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("*.partial")):
        time.sleep(0.01)
    os.killpg(lost.pid, signal.SIGKILL)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "scheduler has gone away" in told and "Traceback" not in told
    assert listing(tmp_path) == {}
