"""The command line as a user meets it: the installed program, in processes of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM

from quantkit.cli.main import COMMANDS

TEXT = ROOT / "fixtures" / "tinylm-test.txt"


def run(*args: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `quantkit` and check its exit code; nothing may ever print a traceback."""
    command = [sys.executable, "-c", "from quantkit.cli.main import main; main()", *map(str, args)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def error(*args: object, cwd: Path | None = None) -> str:
    """Run a command that must fail with exit code 1 and one line; returns the line."""
    result = run(*args, cwd=cwd, code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tinylm-BF16.gguf"
    run("convert", TINYLM, "-o", path)
    return path


def test_help_loads_nothing_heavy() -> None:
    """The help answers at once because nothing heavy is imported."""
    probe = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from quantkit.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'numba', 'numpy', 'gguf', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


def test_inspect_does_not_load_numba(model: Path) -> None:
    probe = (
        f"import sys; sys.argv[1:] = ['inspect', {str(model)!r}]\n"
        "from quantkit.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'numba', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        assert "--quiet" in run(name, "--help").stdout
    assert "LlamaForCausalLM" in run("architectures").stdout
    assert run("--version").stdout.startswith("quantkit ")


@pytest.mark.parametrize(
    "args", [["nosuch"], ["quantize"], ["quantize", "x"], ["convert", "x", "--outtype", "f8"], ["inspect", "a", "b"]]
)
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    run(*args, code=2)


def test_inspect(model: Path) -> None:
    text = run("inspect", model).stdout
    assert "general.architecture" in text and "token_embd.weight" in text and "bits per weight" in text
    data = json.loads(run("inspect", model, "--json").stdout)
    assert data["metadata"]["general.architecture"] == "llama"
    assert {t["type"] for t in data["tensors"]} == {"BF16", "F32"}


def test_quantize_names_and_plan(model: Path, tmp_path: Path) -> None:
    plan = json.loads(run("quantize", model, "--type", "q4_k_m,Q8_0", "--dry-run", "--json").stdout)["files"]
    assert [p["type"] for p in plan] == ["Q4_K_M", "Q8_0"]
    run("quantize", model, "--type", "q4_k_m", "--type", "Q8_0", "-o", tmp_path)
    for p in plan:
        assert (tmp_path / f"tinylm-{p['type']}.gguf").stat().st_size == p["size"]


def test_checkpoint_from_elsewhere(tmp_path: Path) -> None:
    checkpoint = tmp_path / "my-model"
    shutil.copytree(TINYLM, checkpoint)
    run("quantize", "my-model", "--type", "Q4_0", "-q", cwd=tmp_path)
    written = [p.name for p in checkpoint.iterdir() if p.suffix == ".gguf"]
    assert len(written) == 1 and written[0].endswith("-Q4_0.gguf")


def test_perplexity_and_report(tmp_path: Path) -> None:
    result = json.loads(run("perplexity", TINYLM, "--text", TEXT, "--chunks", 4, "--n-ctx", 128, "--json").stdout)
    out = tmp_path / "out"
    out.mkdir()
    args = ("--types", "Q8_0,Q4_0", "--text", TEXT, "--chunks", 4, "--n-ctx", 128, "--prompts", 0, "-o", out)
    text = run("report", TINYLM, *args).stdout
    report = json.loads((out / "report.json").read_text())
    assert [f["type"] for f in report["files"]] == ["Q8_0", "Q4_0"]
    assert report["texts"][0]["ppl"] == pytest.approx(result["ppl"], rel=1e-6)
    assert all((out / f["path"]).stat().st_size == f["size"] for f in report["files"])
    assert text.splitlines()[0] in (out / "report.md").read_text()


def test_bad_input_is_one_line(model: Path, tmp_path: Path) -> None:
    assert "no such file" in error("inspect", tmp_path / "none.gguf").lower()
    assert "not a GGUF file" in error("inspect", TINYLM / "config.json")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:100_000])
    assert "truncated" in error("quantize", cut, "--type", "Q8_0")
    assert "unknown file type 'Q9'" in error("quantize", model, "--type", "Q9")
    assert "not UTF-8" in error("perplexity", model, "--text", model)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "tokens" in error("perplexity", model, "--text", short)
    assert "no such directory" in error("convert", tmp_path / "nothing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "short.txt"]


def test_damaged_checkpoints(tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(TINYLM, tmp_path / name))

    missing = copy("missing-shard")
    shard = sorted(missing.glob("*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in error("convert", missing)
    stranger = copy("stranger")
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(config | {"architectures": ["StrangerForCausalLM"]}))
    line = error("convert", stranger)
    assert "StrangerForCausalLM" in line and "quantkit architectures" in line
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in error("convert", empty)
