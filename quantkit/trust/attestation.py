"""Attestations: in-toto statements that say what a GGUF file was made of, and by what, for others to check.

The statement is SLSA provenance (version 1) about the file's SHA-256. It can be checked by deriving the file again, and
signed by the usual tools; nothing here signs.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors import read_json
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.hub import repo_id_of
from quantkit.sources.source import GGUFSource, TensorSource
from quantkit.trust.derivation import Derivation
from quantkit.trust.digest import file_digests, model_digests

PREDICATE = "https://slsa.dev/provenance/v1"
# The kind of build, which says how to read the parameters: deriving a GGUF file as `derivation.derive` does.
BUILD = "urn:quantkit:gguf-quantization:v1"
BUILDER = "urn:quantkit"
# llama.cpp as llama-cpp-python builds it, whose bytes on x86-64 the derivation writes.
REFERENCE = "llama-cpp-python 0.3.36 (x86-64)"
_DECIDING = ("numpy", "numba", "llvmlite", "gguf", "tokenizers", "safetensors", "sentencepiece")
MAX_STATEMENT = 16 << 20


def attestation(
    file: GGUFSource, source: TensorSource, derivation: Derivation, imatrix: Path | None = None, command: str = ""
) -> dict[str, Any]:
    """The statement that `file` is what `derivation` found it to be: a dict to write as JSON.

    Raises QuantkitError when the derivation is not exact and complete, and without the package in-toto-attestation.
    """
    if not derivation.exact or not derivation.complete or derivation.quick:
        raise QuantkitError(f"{file.label}: nothing to attest: {str(derivation).splitlines()[-1]}")
    resource, statement = _library()
    digests = model_digests(file)
    subjects = [
        resource(name=path.name, digest={"sha256": digest}, annotations={"model": digests.model}).pb
        for path, digest in file_digests(file.files).items()
    ]
    seen_as = {"outtype": derivation.seen_as} if derivation.seen_as else {}
    with_matrix = {"imatrix": imatrix.name} if imatrix is not None else {}
    predicate = {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": {
                "source": source.label,
                **seen_as,
                **with_matrix,
                "types": {name: info.type.name for name, info in file.tensors.items()},
            },
            "internalParameters": {"command": command, "reference": REFERENCE, "versions": versions()},
            "resolvedDependencies": _dependencies(source, imatrix),
        },
        "runDetails": {"builder": {"id": BUILDER, "version": {"quantkit": quantkit.__version__}}},
    }
    made = statement(subjects, PREDICATE, predicate)
    made.validate()
    return _as_dict(made)


def versions() -> dict[str, str]:
    """What the bytes of a derivation could depend on, as it is here."""
    found = {"quantkit": quantkit.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in _DECIDING:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _dependencies(source: TensorSource, imatrix: Path | None) -> list[dict[str, Any]]:
    """The files of the source, with the hub's revision where they are a snapshot of it, and the importance matrix."""
    hub = _hub_uri(source)
    entries = []
    for path, digest in file_digests(list(source.files)).items():
        entry: dict[str, Any] = {"name": _name(path, source), "digest": {"sha256": digest}}
        entries.append({**entry, "uri": hub} if hub else entry)
    if imatrix is not None:
        entries.append({"name": imatrix.name, "digest": {"sha256": file_digests([imatrix])[imatrix]}})
    return entries


def _name(path: Path, source: TensorSource) -> str:
    root = source.directory if isinstance(source, CheckpointSource) else path.parent
    return path.relative_to(root).as_posix()


def _hub_uri(source: TensorSource) -> str | None:
    """The package URL of a snapshot in the hub's cache, which names the commit."""
    if not isinstance(source, CheckpointSource):
        return None
    repo_id = repo_id_of(source.directory)
    return None if repo_id is None else f"pkg:huggingface/{repo_id}@{source.directory.name}"


@dataclass
class Replay:
    """What checking a statement found: `problems`, and what deriving the file again said."""

    statement: str
    problems: list[str] = field(default_factory=list)
    derivation: Derivation | None = None

    @property
    def holds(self) -> bool:
        """Whether the statement is true as far as it was checked."""
        return not self.problems and self.derivation is not None and self.derivation.exact

    def __str__(self) -> str:
        """What is wrong, the derivation, and the verdict in the last line."""
        lines = [*self.problems, *([str(self.derivation)] if self.derivation is not None else [])]
        return "\n".join([*lines, f"{self.statement}: {'holds' if self.holds else 'does not hold'}"])

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        derivation = None if self.derivation is None else self.derivation.as_dict()
        return {**asdict(self), "derivation": derivation, "holds": self.holds}


def check_statement(path: Path, file: GGUFSource, source: TensorSource, imatrix: Path | None = None) -> Replay:
    """Hold the statement in `path` against the files that it names; the derivation is the caller's to add.

    Raises QuantkitError for a file that is no statement of this kind.
    """
    found = Replay(str(path))
    content = _read_statement(path)
    definition = content["predicate"]["buildDefinition"]
    said = {entry["name"]: entry["digest"].get("sha256") for entry in content["subject"]}
    actual = {name.name: digest for name, digest in file_digests(file.files).items()}
    found.problems += _different("file", said, actual)
    said = {entry["name"]: entry["digest"].get("sha256") for entry in definition["resolvedDependencies"]}
    actual = {_name(name, source): digest for name, digest in file_digests(list(source.files)).items()}
    if imatrix is not None:
        actual[imatrix.name] = file_digests([imatrix])[imatrix]
    found.problems += _different("source", said, actual)
    types = {name: info.type.name for name, info in file.tensors.items()}
    if definition["externalParameters"].get("types") != types:
        found.problems.append("the file's tensors have other types than the statement says")
    return found


def _different(what: str, said: Mapping[str, Any], actual: Mapping[str, str]) -> list[str]:
    problems = [f"{what} {name}: the statement does not name it" for name in actual if name not in said]
    for name, digest in said.items():
        if name not in actual:
            problems.append(f"{what} {name}: named by the statement, and not there")
        elif actual[name] != digest:
            problems.append(f"{what} {name}: its SHA-256 is not the one in the statement")
    return problems


def _read_statement(path: Path) -> dict[str, Any]:
    from google.protobuf.json_format import ParseDict, ParseError

    _, statement = _library()
    wrong = QuantkitError(f"{path}: not a statement of how a GGUF file was quantized")
    content = read_json(path, MAX_STATEMENT)
    made = statement([], "", {})
    try:
        made.pb.Clear()
        ParseDict(content, made.pb)
        made.validate()
        content = _as_dict(made)
        definition = content["predicate"]["buildDefinition"]
        entries: Sequence[Any] = [*content["subject"], *definition["resolvedDependencies"]]
        fine = all(isinstance(entry["name"], str) and isinstance(entry["digest"], dict) for entry in entries)
        fine = fine and isinstance(definition["externalParameters"], dict)
    except (ParseError, ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    if not fine or content["predicateType"] != PREDICATE or definition["buildType"] != BUILD:
        raise wrong
    return content


def _as_dict(statement: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    content: dict[str, Any] = MessageToDict(statement.pb)
    return content


def _library() -> tuple[Any, Any]:
    try:
        from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
        from in_toto_attestation.v1.statement import Statement
    except ImportError:
        raise QuantkitError("attestations need the package in-toto-attestation: pip install quantkit[attest]") from None
    return ResourceDescriptor, Statement
