"""The packages are layers: each imports only from those below it."""

from __future__ import annotations

import ast

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
