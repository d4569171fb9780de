"""Unfinished work that a long run keeps beside its output, so that it can go on after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

# The directory's own file, so that no other directory is taken for one.
_MARK = "quantkit-unfinished"
_COSTS = "costs.json"
RECORD = "progress.json"


class WorkDirectory:
    """The directory of unfinished work beside the file `output`; made when it is first needed.

    With `resume` what is there is used. Raises QuantkitError when something is there and `resume` is not asked for.
    """

    def __init__(self, output: Path, resume: bool = False) -> None:
        self.path = output.with_name(output.name + ".unfinished")
        if self.path.exists() or self.path.is_symlink():
            if self.path.is_symlink() or not (self.path / _MARK).is_file():
                raise QuantkitError(f"{self.path}: is in the way: its name is needed for unfinished work; move it")
            if not resume:
                raise QuantkitError(
                    f"{self.path}: holds the work of a run that was stopped: remove the directory, or resume the run",
                    option="resume",
                )

    def make(self) -> Path:
        """See that the directory is there; returns its path."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _MARK).touch()
        return self.path

    def load_costs(self, digest: str) -> Any:
        """What `save_costs` kept, None if nothing. Raises QuantkitError when that was for another run."""
        path = self.path / _COSTS
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            same, costs = found["digest"] == digest, found["costs"]
        except (ValueError, KeyError, TypeError):
            raise self.damaged(path) from None
        if not same:
            raise self.another()
        return costs

    def save_costs(self, digest: str, costs: Any) -> None:
        """Keep what types would cost."""
        write_json(self.make() / _COSTS, {"digest": digest, "costs": costs})

    def load_record(self, digest: str) -> dict[str, Any]:
        """What `save_record` kept, empty if nothing. Raises QuantkitError when that was for another run."""
        path = self.path / RECORD
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text("utf-8"))
            same = found["digest"] == digest
        except (OSError, ValueError, KeyError, TypeError):
            raise self.damaged(path) from None
        if not same:
            raise self.another()
        return dict(found)

    def save_record(self, digest: str, record: Mapping[str, Any]) -> None:
        """Keep what has been done."""
        write_json(self.make() / RECORD, {**record, "digest": digest})

    def damaged(self, path: Path) -> QuantkitError:
        """What to say of a file that is not as it was written."""
        return QuantkitError(f"{path}: missing or damaged; remove {self.path}, to begin anew")

    def another(self) -> QuantkitError:
        """What to say where the work is another run's."""
        return QuantkitError(
            f"{self.path}: belongs to a run with another model, text, types or options: repeat these to resume it, "
            "or remove the directory"
        )

    def remove(self) -> None:
        """Remove the directory: everything has been written where it belongs."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_json(target: Path, data: Any) -> None:
    """Write or replace a file in one step."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(data), "utf-8")
    partial.replace(target)
