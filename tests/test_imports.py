"""The packages are layers: each imports only from those below it, and only the command line knows its options."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

# From the top. Packages of one line do not import from each other.
LAYERS = [
    {"cli"},
    {"report"},
    {"calibration", "trust"},
    {"evaluate"},
    {"pipeline"},
    {"sources"},
    {"architectures", "vocabulary"},
    {"formats"},
    {"blocks"},
    {"compile"},
    {"errors", "machine", "wording"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = [path for path in sorted((ROOT / "quantkit").rglob("*.py")) if path.parent != ROOT / "quantkit"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    package = path.relative_to(ROOT / "quantkit").parts[0]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "quantkit":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantkit."):
            imported.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("quantkit.")}
    above = [name for name in imported & LEVEL.keys() if name != package and LEVEL[name] <= LEVEL[package]]
    assert not above, f"{package} imports from {above}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name != "cli"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_errors_of_the_library_name_no_option_of_the_command_line(path):
    """They name a keyword argument, as QuantkitError's `option`, and the command line adds its own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "QuantkitError":
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            named = [word for word in words if isinstance(word, str) and re.search(r"(^|\W)--[a-z]", word)]
            assert not named, f"line {node.lineno}"
