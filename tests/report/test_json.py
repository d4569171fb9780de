"""Every command's --json against the schema, and results that JSON has no words for."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import jsonschema
import pytest
import typer.main
from conftest import ROOT, TINYLM
from support.program import call

from quantkit.cli.main import COMMANDS, app
from quantkit.report.json_data import json_data, json_text

FOLDER = ROOT / "quantkit" / "report"
SCHEMA = json.loads((FOLDER / "schema.json").read_text("utf-8"))
TEXT = ROOT / "fixtures" / "tinylm-test.txt"
SOME = ("--text", TEXT, "--n-ctx", 64, "--chunks", 2)


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def valid(printed: str, name: str) -> dict[str, object]:
    """`printed` as JSON, which is what the schema says of `name`."""
    assert printed.isascii()
    data = json.loads(printed, parse_constant=refuse)
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"}).validate(data)
    return data  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json") / "q-Q4_0.gguf"
    call("quantize", TINYLM, path, "Q4_0")
    return path


def tasks_file(path: Path) -> Path:
    path.write_text("The sky\n0\n is blue\n is seven\n runs of\n the the\n" * 3, "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("architectures", ["architectures"]),
        ("types", ["types"]),
        ("types", ["types", "MODEL"]),
        ("inspect", ["inspect", "MODEL"]),
        ("inspect", ["inspect", TINYLM, "--full"]),
        ("quantize", ["quantize", TINYLM, "Q8_0,IQ1_S", "--dry-run"]),
        ("quantize", ["quantize", TINYLM, "OUT/", "Q8_0,F16"]),
        ("perplexity", ["perplexity", "MODEL", *SOME]),
        ("divergence", ["perplexity", "MODEL", "--base", TINYLM, *SOME]),
        ("report", ["report", TINYLM, "--types", "Q8_0", "--prompts", 1, *SOME, "-o", "OUT/"]),
        ("recommend", ["recommend", TINYLM, "--memory", "1GB"]),
        ("lint", ["lint", "MODEL"]),
        ("tasks", ["tasks", "MODEL", "--hellaswag", "TASKS"]),
        ("generate", ["generate", "MODEL", "--model2", TINYLM, "-p", "a", "-n", "3"]),
        ("imatrix", ["imatrix", "MODEL", *SOME, "-o", "OUT.gguf"]),
        ("imatrix", ["imatrix", "MODEL", *SOME, "-o", "OUT.gguf", "--show-statistics"]),
        ("compare", ["compare", TINYLM, "MODEL"]),
        ("hash", ["hash", "MODEL"]),
        ("embed", ["embed", "MODEL", "--pooling", "last", "-p", "a"]),
        ("verify", ["verify", "MODEL", "--source", TINYLM]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_commands(model: Path, tmp_path: Path, name: str, args: list[object]) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "TASKS": str(tasks_file(tmp_path / "tasks.txt"))}
    words = [re.sub("MODEL|OUT|TASKS", lambda match: places[match[0]], str(word)) for word in args]
    printed = call(*words, "--json").stdout
    data = valid(printed, name)
    if name == "report":
        written = (tmp_path / "out" / "report.json").read_text("utf-8")
        assert valid(written, "report") == data


def test_every_command_with_json_has_a_definition() -> None:
    with_json = set()
    group = typer.main.get_command(app)
    for name in COMMANDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["quantkit", name])
            command = group.get_command(None, name)  # type: ignore[attr-defined]
        if any("--json" in param.opts for param in command.params):
            with_json.add(name)
    # A statement is in-toto's, whose own schema it follows.
    assert with_json - {"attest"} <= SCHEMA["$defs"].keys()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def properties(schema: object) -> dict[str, list[object]]:
    """The names of all properties in `schema`, with what each is."""
    found: dict[str, list[object]] = {}
    if isinstance(schema, dict):
        for name, shape in schema.get("properties", {}).items():
            found.setdefault(name, []).append(shape)
        for part in schema.values():
            for name, shapes in properties(part).items():
                found.setdefault(name, []).extend(shapes)
    return found


def test_the_table_names_what_the_schema_has() -> None:
    """Each name in the README is one of the schema's; estimates there are estimates here."""
    names = properties(SCHEMA["$defs"])
    lines = (FOLDER / "README.md").read_text("utf-8").splitlines()
    for _, named, shape, *_ in [line.split("|") for line in lines if line.startswith("| `")]:
        for name in re.findall(r"`(\w+)`", named):
            assert name in names
            if "stderr" in shape:
                assert all(each == {"$ref": "#/$defs/estimate"} for each in names[name]), name


class Colour(Enum):
    RED = 1


@dataclass
class Result:
    path: Path
    values: tuple[float, ...]
    by: dict[float, float]
    colour: Colour
    inner: Result | None = None


def test_results_become_json() -> None:
    result = Result(
        Path("a/b"), (1.0, math.nan, -math.inf), {99.9: 0.5}, Colour.RED, Result(Path("ü"), (), {}, Colour.RED)
    )
    assert json_data(result) == {
        "path": "a/b",
        "values": [1.0, None, None],
        "by": {"99.9": 0.5},
        "colour": "RED",
        "inner": {"path": "ü", "values": [], "by": {}, "colour": "RED", "inner": None},
    }
    assert json_text(result).isascii() and json.loads(json_text(result)) == json_data(result)
