"""`quantkit quantize` with a calibration text, as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from test_cli import error, run

from quantkit.sources.source import GGUFSource

CALIBRATION = ROOT / "fixtures" / "tinylm-calib.txt"
TEXT = ("--calibration", CALIBRATION, "--n-ctx", 128, "--chunks", 24)
FEEDBACK = (*TEXT, "--rounding", "gptq")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    told = run("quantize", TINYLM, "--type", "Q4_K_M,Q5_K_S", *FEEDBACK, "-o", f"{folder}/").stderr
    assert "22 tensors with feedback, their errors" in told
    assert "no moments: token_embd.weight" in told
    return folder


def test_files_are_named_by_rounding_and_type(rounded: Path) -> None:
    names = sorted(path.name for path in rounded.iterdir())
    assert names == ["Tinylm-3.4M-gptq-Q4_K_M.gguf", "Tinylm-3.4M-gptq-Q5_K_S.gguf"]
    metadata = GGUFSource(rounded / names[0]).metadata
    assert metadata.string("quantkit.calibration.text") == "tinylm-calib.txt"


def test_goes_on_after_it_was_killed(rounded: Path, tmp_path: Path) -> None:
    arguments = ("quantize", TINYLM, "--type", "Q4_K_M,Q5_K_S", *FEEDBACK, "-o", f"{tmp_path}/")
    command = [sys.executable, "-c", "from quantkit.cli.main import main; main()", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    work = tmp_path / "Tinylm-3.4M-gptq-Q4_K_M.gguf.unfinished"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if (work / "progress.json").is_file() and json.loads((work / "progress.json").read_text())["layers"]:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [work.name]
    problem = error(*arguments)
    assert "holds the work of a run that was stopped" in problem
    assert "--resume" in problem
    run(*arguments, "--resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in rounded.iterdir())
    for path in rounded.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_types_chosen_for_a_size(tmp_path: Path) -> None:
    bounds = ("--min-type", "Q3_K", "--max-type", "Q5_K")
    plan = tmp_path / "plan.json"
    told = run(
        "quantize", TINYLM, *TEXT, "--target-size", "Q4_K_M", *bounds, "--save-plan", plan, "-o", f"{tmp_path}/"
    ).stderr
    path = tmp_path / "Tinylm-3.4M-gptq-chosen-Q4_K_M.gguf"
    assert f"{path}: 2.2 MB" in told
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, plan.name]
    types = {name: info.type.name for name, info in GGUFSource(path).tensors.items()}
    saved = json.loads(plan.read_text())
    assert saved["tensors"] == types
    shown = run("quantize", TINYLM, "--plan", plan, "--dry-run").stdout
    assert f"predicted mean divergence {saved['divergence']:.5f}" in shown
    smaller = run("quantize", TINYLM, "--plan", plan, "--target-bpw", 4, *bounds, *TEXT, "--dry-run", "--json").stdout
    (other,) = json.loads(smaller)["files"]
    assert other["bits_per_weight"] <= 4
    assert other["chosen"]["divergence"] > saved["divergence"]
    model = tmp_path / "model.gguf"
    run("quantize", TINYLM, "--type", "Q8_0", "-o", model)
    assert "is a plan for another model" in error("quantize", model, "--plan", plan, "--dry-run", "--allow-requantize")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--type", "Q4_K_M", "--rounding", "gptq"), "--rounding gptq needs a text"),
        (("--target-size", "Q4_K_M"), "a choice of types needs a text"),
        (("--type", "Q4_K_M", "--tie", "attn"), "--tie needs a --target-size"),
        (("--type", "Q4_K_M", "--target-size", "2MB"), "not both"),
        (("--target-size", "2MB,3MB", "--save-plan", "p.json", *TEXT), "--save-plan needs one --target-size"),
        (("--type", "Q4_K_M", "--imatrix", "x.gguf", *TEXT), "takes the place of --imatrix"),
        (("--type", "Q4_K_M", "--prune-layers", "1", *TEXT), "prune layers first"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[object, ...], problem: str) -> None:
    assert problem in " ".join(run("quantize", TINYLM, *arguments, code=2).stderr.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--target-size", "10KB", *TEXT), "cannot be reached: the smallest types take"),
        (("--target-size", "10GB", *TEXT), "is more than that of"),
        (("--target-size", "large", *TEXT), "not a size: 'large'"),
        (("--target-size", "2MB", "--for", "x", *TEXT), "unknown engine 'x'"),
        (("--target-size", "2MB", "--tie", "(", *TEXT), "not a regular expression"),
        (("--type", "Q4_K_M", "--calibration", "missing.txt", "--rounding", "gptq"), "missing.txt: No such file"),
        (("--type", "Q4_K_M", *TEXT[:2], "--n-ctx", 64, "--chunks", 1, "--rounding", "gptq"), "64 tokens are too few"),
        (("--plan", "missing.json", "--dry-run"), "missing.json: No such file"),
    ],
)
def test_problems_come_in_one_line(arguments: tuple[object, ...], problem: str, tmp_path: Path) -> None:
    assert problem in error("quantize", TINYLM, *arguments, "-o", f"{tmp_path}/out/")
    assert not list(tmp_path.iterdir())
