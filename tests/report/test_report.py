"""Reports of a real model: the data, the page, the card, the gate, and a run that is killed and continues."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, TINYLM

import quantkit
from quantkit.errors import QuantkitError
from quantkit.evaluate.settings import Chunking
from quantkit.report import card, page, summary
from quantkit.report.data import NamedText, prompts_of, shared_words
from quantkit.report.ladder import Ladder, LadderOptions, ladder_types
from quantkit.report.plots import frontier
from quantkit.sources.source import open_model

TEST, CALIBRATION = (ROOT / "fixtures" / f"tinylm-{name}.txt" for name in ("test", "calib"))
TYPES = ("Q8_0", "Q4_K_M", "Q2_K")


def options(**changes) -> LadderOptions:
    whole = TEST.read_text("utf-8")
    texts = [NamedText("first.txt", whole[:12_000]), NamedText("second.txt", whole[-12_000:])]
    calibration = NamedText("calibration.txt", CALIBRATION.read_text("utf-8"))
    made = {
        "types": TYPES,
        "texts": texts,
        "calibration": calibration,
        "calibration_chunking": Chunking(n_ctx=128, chunks=4),
        "chunking": Chunking(n_ctx=128, chunks=6),
        "n_prompts": 2,
        "command": "quantkit report fixtures/tinylm",
    }
    return LadderOptions(**{**made, **changes})


def make(directory: Path, given: LadderOptions) -> tuple[Ladder, dict]:
    run = Ladder(open_model(TINYLM), directory, given)
    run.calibrate()
    run.quantize()
    run.measure()
    run.say()
    return run, run.write()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ladder") / "out"
    run, report = make(directory, options())
    return directory, run, report


def test_data_follows_its_schema(made):
    directory, _, report = made
    schema = json.loads((files("quantkit.report") / "schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    written = json.loads((directory / "report.json").read_text("utf-8"))
    jsonschema.Draft202012Validator({**schema, "$ref": "#/$defs/report"}).validate(written)
    assert written == json.loads(json.dumps(report))
    assert [f["type"] for f in written["files"]] == list(TYPES)


def test_numbers_computed_another_way(made):
    directory, _, report = made
    first = report["files"][1]
    path = directory / first["path"]
    assert first["size"] == path.stat().st_size
    given = options()
    source, model = open_model(TINYLM), open_model(path)
    # Perplexity alone, divergence of this file alone, the error of a tensor from its weights.
    alone = quantkit.perplexity(model, given.texts[1].text, chunking=given.chunking)
    measured = first["measurements"][1]
    assert measured["ppl"]["value"] == pytest.approx(alone.ppl.value, rel=1e-6)
    single = quantkit.divergence(model, source, given.texts[1].text, chunking=given.chunking)
    assert measured["kld"]["value"] == pytest.approx(single.kld.value, rel=1e-6)
    assert measured["kld_percentiles"]["99.9"] == pytest.approx(single.kld_percentiles[99.9], rel=1e-6)
    assert sum(measured["delta_p_histogram"]) == pytest.approx(1.0)
    name = "blk.1.ffn_down.weight"
    weights = [quantkit.dequantize_rows(m.read(name), m.tensors[name].type) for m in (source, model)]
    error = np.sqrt(np.mean(np.square(weights[1] - weights[0])) / np.mean(np.square(weights[0])))
    tensor = next(t for t in first["tensors"] if t["name"] == name)
    assert tensor["error"] == pytest.approx(float(error), rel=1e-4)
    assert (
        report["source"]["files"][0]["sha256"]
        in subprocess.run(["sha256sum", *source.files], capture_output=True, text=True, check=True).stdout
    )


def test_texts_are_told_apart_from_the_calibration(made):
    _, _, report = made
    assert all(text["shared_with_calibration"] < 0.01 for text in report["texts"])
    words = " ".join(f"word{i}" for i in range(100))
    assert shared_words(words, words) == 1.0
    assert shared_words(words, "nothing of it") == 0.0
    assert 0 < shared_words(words, " ".join(words.split()[:50])) < 1


class _Page(HTMLParser):
    """What a page loads, its ids and its figures."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.ids, self.described, self.stack = [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [found[key] for key in ("src",) if key in found]
        if tag == "link":
            self.loads.append(found.get("href"))
        self.ids += [found["id"]] if "id" in found else []
        if tag == "svg":
            self.described.append(found.get("aria-labelledby"))


def test_page_stands_alone(made):
    directory, _, report = made
    html = (directory / "report.html").read_text("utf-8")
    assert len(html) < 2_000_000
    seen = _Page()
    seen.feed(html)
    assert seen.loads == []
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.described and all(seen.described)
    for labels in seen.described:
        assert set(labels.split()) <= set(seen.ids)
    for file in report["files"]:
        assert file["path"] in html and file["parts"][0]["sha256"] in html
    assert page.render(report) == html  # drawn from the data alone, the same each time


def test_page_escapes_what_a_file_says(made):
    _, _, report = made
    hostile = json.loads(json.dumps(report))
    hostile["model"]["name"] = "<script>alert(1)</script>"
    hostile["prompts"][0]["prompt"] = "</summary><img src=x onerror=alert(1)>"
    html = page.render(hostile)
    assert "<script>alert" not in html and "<img" not in html


def test_card(made):
    directory, _, report = made
    text = (directory / "README.md").read_text("utf-8")
    assert text.startswith("---\n") and "quantized_by: quantkit" in text
    assert all(file["path"] in text for file in report["files"])
    mine = text.replace("---\n\n<!--", "---\n\nMy own words.\n\n<!--") + "\nMore of them.\n"
    mine = mine.replace("quantized_by: quantkit\n", "quantized_by: quantkit\nthumbnail: me.png\n")
    again = card.render(report, "me/tiny-GGUF", mine)
    assert "My own words." in again and "More of them." in again and "thumbnail: me.png" in again
    assert "ollama run hf.co/me/tiny-GGUF:Q4_K_M" in again
    assert card.render(report, "me/tiny-GGUF", again) == again
    with pytest.raises(QuantkitError, match="quantkit:end"):
        card.render(report, None, "---\n---\n<!-- quantkit:begin -->\n")
    with pytest.raises(QuantkitError, match="front matter"):
        card.render(report, None, "---\n{ a: [\n---\n")
    with pytest.raises(QuantkitError, match="front matter"):
        card.render(report, None, f"---\na: {'[' * 50_000}\n---\n")


def test_requirements(made):
    _, _, report = made
    assert summary.failures(report, ["kld<=10", "ppl_ratio <= 3"]) == []
    failed = summary.failures(report, ["Q2_K:kld<=0.0001"])
    assert len(failed) == 2 and all("Q2_K on" in line for line in failed)
    for wrong, problem in (("kld", "cannot be read"), ("q<=1", "cannot be read"), ("IQ1_S:kld<=1", "has no IQ1_S")):
        with pytest.raises(QuantkitError, match=problem):
            summary.failures(report, [wrong])


def test_frontier():
    assert frontier([(3, 1.0), (1, 4.0), (2, 5.0), (2, 2.0)]) == [1, 3, 0]


def test_prompts_start_with_words():
    text = "alpha beta gamma delta " * 200
    found = prompts_of(text, 4, 40)
    assert len(found) == 4 and all(prompt.split()[0] in text.split() for prompt in found)
    assert prompts_of("too short", 4) == []


def test_ladders():
    assert ladder_types(["small"]) == ["Q8_0", "Q5_K_M", "Q4_K_M"]
    assert ladder_types(["q4_k_m", "small"])[0] == "Q4_K_M" and len(ladder_types(["full"])) == 12
    with pytest.raises(QuantkitError, match="Q9"):
        ladder_types(["Q9"])


def test_large_files_become_shards(tmp_path):
    given = options(types=("Q8_0",), texts=options().texts[:1], largest_file=1_500_000, n_prompts=0, calibration=None)
    _, report = make(tmp_path / "out", given)
    parts = report["files"][0]["parts"]
    assert len(parts) == 3
    assert all(re.fullmatch(r"(.+-Q8_0)/\1-0000[123]-of-00003\.gguf", part["path"]) for part in parts)
    assert all((tmp_path / "out" / part["path"]).stat().st_size == part["size"] for part in parts)


def test_error_feedback(made, tmp_path):
    _, _, nearest = made
    given = options(rounding="gptq", types=("Q4_K_M", "Q2_K"), n_prompts=0, calibration_chunking=Chunking(chunks=24))
    _, report = make(tmp_path / "out", given)
    assert report["rounding"] == "gptq" and report["imatrix"] is None
    for file in report["files"]:
        plain = next(each for each in nearest["files"] if each["type"] == file["type"])
        assert file["size"] - plain["size"] < 1000  # metadata
        assert file["measurements"][0]["kld"]["value"] < plain["measurements"][0]["kld"]["value"]
    with pytest.raises(QuantkitError, match="calibration text"):
        Ladder(open_model(TINYLM), tmp_path / "none", options(rounding="gptq", calibration=None))


def test_finished_does_nothing_and_what_changed_is_made_again(made, tmp_path):
    directory, _, _ = made
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.gguf")}
    contents = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    make(directory, options())
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*.gguf")} == before
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == contents
    other = Ladder(open_model(TINYLM), directory, options(calibration_chunking=Chunking(n_ctx=128, chunks=5)))
    with pytest.raises(QuantkitError, match="exists"):
        other.calibrate()


COMMAND = ("report", str(TINYLM), "--types", "Q8_0,Q4_K_M", "--text", str(TEST), "--n-ctx", "128", "--chunks", "12",
           "--prompts", "1", "-q")  # fmt: skip


def start(directory: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "quantkit", *COMMAND, "-o", f"{directory}/"], cwd=ROOT)


def results(directory: Path) -> dict[str, bytes]:
    """The files, but for the seconds that the report tells."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".gguf":
            found[path.name] = path.read_bytes()
    report = json.loads((directory / "report.json").read_text("utf-8"))
    for file in report["files"]:
        file["seconds"] = 0
    report["reproduce"]["command"] = ""
    return {**found, "report": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "out"
    assert start(directory).wait() == 0
    return results(directory)


@pytest.mark.parametrize("moment", ["begun", "quantized", "measured"])
def test_killed_and_started_again(moment, whole, tmp_path):
    killed = tmp_path / "killed"
    process = start(killed)
    state = killed / ".quantkit" / "report.json"
    reached = {
        "begun": lambda: killed.is_dir(),
        "quantized": state.is_file,
        "measured": lambda: state.is_file() and '"kld"' in state.read_text("utf-8"),
    }[moment]
    while process.poll() is None and not reached():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(killed).wait() == 0
    assert results(killed) == whole


def test_an_error_leaves_nothing(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quantkit", "report", str(TINYLM), "--text", str(short), "-o", f"{out}/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "tokens" in done.stderr
    assert not out.exists()
