"""Lists what quantkit is installed with: .ci/lock.txt, exact versions, and .ci/sbom.cdx.json, CycloneDX with licenses.

    python scripts/sbom.py

Installs the project in a fresh virtual environment, with the newest dependencies that it allows, and asks
cyclonedx-bom, from another, what is there. Links are left out. Run it before a release; a test holds the lists against
pyproject.toml.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK, SBOM = ROOT / ".ci" / "lock.txt", ROOT / ".ci" / "sbom.cdx.json"


def without_links(value: Any) -> Any:
    """`value` without external references, which are advertising and change often."""
    if isinstance(value, dict):
        return {key: without_links(each) for key, each in value.items() if key != "externalReferences"}
    return [without_links(each) for each in value] if isinstance(value, list) else value


def environment(folder: Path, *packages: str) -> Path:
    """A fresh virtual environment with `packages`; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def main() -> None:
    """Write both lists."""
    with tempfile.TemporaryDirectory() as name:
        python = environment(Path(name) / "project", str(ROOT))
        freeze = [python, "-m", "pip", "freeze", "--exclude", "quantkit"]
        LOCK.write_text(subprocess.run(freeze, check=True, capture_output=True, text=True).stdout)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", "pip"], check=True)
        lister = environment(Path(name) / "lister", "cyclonedx-bom")
        command = [lister, "-m", "cyclonedx_py", "environment", "--pyproject", ROOT / "pyproject.toml"]
        command += ["--output-reproducible", "--short-PURLs", python]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        listed = json.loads(done.stdout)
        listed["components"] = [each for each in listed["components"] if each["name"] != "quantkit"]
        listed["dependencies"] = [each for each in listed["dependencies"] if not each["ref"].startswith("quantkit==")]
        SBOM.write_text(json.dumps(without_links(listed), indent=1) + "\n")


if __name__ == "__main__":
    main()
