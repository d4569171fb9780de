"""The lists of what quantkit is installed with say what pyproject.toml allows."""

from __future__ import annotations

import json
import re

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [Requirement(each) for each in re.findall(r'"([^"]+)"', block[1])]


def test_the_lists_agree_with_what_is_declared() -> None:
    lock = dict(line.split("==") for line in (ROOT / ".ci" / "lock.txt").read_text("utf-8").split())
    locked = {canonicalize_name(name): version for name, version in lock.items()}
    sbom = json.loads((ROOT / ".ci" / "sbom.cdx.json").read_text("utf-8"))
    assert sbom["bomFormat"] == "CycloneDX" and sbom["metadata"]["component"]["name"] == "quantkit"
    assert {canonicalize_name(each["name"]): each["version"] for each in sbom["components"]} == locked
    for wanted in requirements():
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)], prereleases=True), wanted
