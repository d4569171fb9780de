"""`quantkit report`: the files that it writes, what it takes from quantize, and that a failure leaves nothing."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINYLM
from support.program import call, listing, refusal

from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.settings import Chunking
from quantkit.formats.imatrix import ImportanceMatrix
from quantkit.pipeline.run import quantize

TEXT, CALIBRATION = (ROOT / "fixtures" / f"tinylm-{name}.txt" for name in ("test", "calib"))
SOME = ("--text", TEXT, "--n-ctx", 64, "--chunks", 2, "--prompts", 0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_are_listed_with_sizes_and_digests(tmp_path: Path) -> None:
    told = call("report", TINYLM, "--types", "Q8_0,F16", *SOME, "-o", f"{tmp_path}/out/").stderr
    out = tmp_path / "out"
    wrote = dict(re.findall(r"^wrote (\S+): [\d.]+ (?:[kM]B|bytes), sha256 ([0-9a-f]{64})$", told, re.M))
    assert wrote == {str(path): sha256(path) for path in out.iterdir() if path.is_file()}
    assert {Path(path).name for path in wrote} >= {"report.md", "report.json", "report.html", "README.md"} and len(
        wrote
    ) == 6
    report = json.loads((out / "report.json").read_text())
    for row in report["files"]:
        (part,) = row["parts"]
        assert part == {"path": row["path"], "size": row["size"], "sha256": sha256(out / row["path"])}
        assert row["size"] == (out / row["path"]).stat().st_size
    assert report["imatrix"] is None


def test_importance_matrices(tmp_path: Path) -> None:
    """From a file, or computed from a text and written beside the models; the files are quantize's."""
    text = CALIBRATION.read_text("utf-8")
    matrix = importance_matrix(TINYLM, text, chunking=Chunking(n_ctx=64, chunks=128), dataset=str(CALIBRATION))
    matrix.save(tmp_path / "m.gguf")
    call("report", TINYLM, "--types", "IQ2_XS", *SOME, "--imatrix", tmp_path / "m.gguf", "-o", f"{tmp_path}/a/")
    call("report", TINYLM, "--types", "IQ2_XS", *SOME, "--calibration", CALIBRATION, "-o", f"{tmp_path}/b/")
    a, b = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    size = (tmp_path / "m.gguf").stat().st_size
    assert a["imatrix"] == {"path": "m.gguf", "size": size, "sha256": sha256(tmp_path / "m.gguf")}
    own = tmp_path / "b" / "Tinylm-3.4M.imatrix.gguf"
    assert b["imatrix"] is None and b["calibration"]["text"] == CALIBRATION.name
    assert ImportanceMatrix.load(own).entries.keys() == matrix.entries.keys()
    for report, given in ((a, tmp_path / "m.gguf"), (b, own)):
        (plain,) = quantize(TINYLM, tmp_path / "plain.gguf", type="IQ2_XS", imatrix=given, force=True)
        assert report["files"][0]["parts"][0]["sha256"] == sha256(plain)
    both = ("--imatrix", tmp_path / "m.gguf", "--calibration", CALIBRATION)
    assert "use one of them" in call("report", TINYLM, *both, code=2).stderr


def test_quantized_sources(tmp_path: Path) -> None:
    q8 = tmp_path / "q8.gguf"
    call("quantize", TINYLM, "--type", "Q8_0", "-o", q8)
    command = ("report", q8, "--types", "Q4_0", *SOME, "-o", f"{tmp_path}/out/")
    assert refusal(*command).endswith("--allow-requantize does it anyway")
    call(*command, "--allow-requantize")
    assert (tmp_path / "out" / "q8-Q4_0.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--types", "Q8_0,IQ1_S"), "pass it with --imatrix"),
        (("--types", "Q8_0", "--text", "SHORT"), "the text has"),
        (("--types", "Q8_0", "--calibration", "SHORT"), "the text has"),
        (("--types", "Q8_0,Q8_0"), "named twice"),
    ],
)
def test_a_failure_leaves_nothing(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    options = tuple(str(short) if word == "SHORT" else word for word in options)
    assert message in refusal("report", TINYLM, *SOME, *options, "-o", f"{tmp_path}/new/out/")
    assert set(listing(tmp_path)) == {"short.txt"}


def test_nothing_is_replaced_and_nothing_computed_for_it(tmp_path: Path) -> None:
    for name in ("report.json", "report.md", "Tinylm-3.4M-Q8_0.gguf", "Tinylm-3.4M.imatrix.gguf"):
        (tmp_path / name).write_text("precious")
        line = refusal("report", TINYLM, "--types", "Q8_0", *SOME, "--calibration", CALIBRATION, "-o", tmp_path)
        assert line.endswith(f"{name}: exists already; --force replaces it")
        assert listing(tmp_path) == {name: b"precious"}
        (tmp_path / name).unlink()
