"""What tests of conversion share: checkpoints with changes, and files against the reference converter's records."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from quantkit.pipeline.execute import execute
from quantkit.pipeline.plan import plan_copy
from quantkit.sources.checkpoint import CheckpointSource, output_name

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "convert"
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def golden(name: str) -> dict[str, Any]:
    """What scripts/goldens/record_goldens.py recorded of a checkpoint, by outtype."""
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(source: CheckpointSource, path: Path) -> Path:
    """The source as one GGUF file."""
    execute(source, [(plan_copy(source), path)])
    return path


def convert(checkpoint: Path, path: Path, outtype: str = "auto") -> Path:
    """A checkpoint as one GGUF file."""
    return write(CheckpointSource(checkpoint, outtype), path)


def changed_copy(checkpoint: Path, target: Path, **changes: Any) -> Path:
    """A checkpoint with changes to its config.json; the value "absent" takes a key away."""
    directory = Path(shutil.copytree(checkpoint, target))
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return directory


def assert_recorded(source: CheckpointSource, wanted: dict[str, Any], path: Path) -> None:
    """The file made of `source`, at `path`, is the one that the record is of."""
    if "tensors" in wanted:  # first what is told record by record, so that a difference is named
        records = metadata_records(source)
        assert [key for key, _ in records] == [key for key, *_ in wanted["metadata"]]
        assert records == [(key, digest) for key, _, digest, _ in wanted["metadata"]]
        assert tensor_records(source) == wanted["tensors"]
    assert output_name(source.metadata, source.kind) == wanted["file"]
    assert sha256(write(source, path).read_bytes()) == wanted["sha256"]


def metadata_records(source: CheckpointSource) -> list[tuple[str, str]]:
    """The metadata of a source, each key with a digest of its record."""
    records = []
    for key, value in source.metadata.items():
        kind = int(value.type).to_bytes(4, "little")
        raw = len(key.encode()).to_bytes(8, "little") + key.encode() + kind + bytes(value.raw)
        records.append((key, sha256(raw)[:16]))
    return records


def tensor_records(source: CheckpointSource) -> list[list[Any]]:
    """The tensors of a source: name, type, shape, and a digest of their bytes."""
    return [
        [t.name, t.type.name, list(t.shape), sha256(source.read(t.name).tobytes())[:16]]
        for t in source.tensors.values()
    ]
