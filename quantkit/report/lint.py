"""What hubs and engines will make of a GGUF file, or of a directory of them, found before anyone downloads it.

The rules are those of the Hugging Face hub (labels of files), of vLLM's GGUF plugin (how it looks for a file) and of
Ollama (what it accepts and pulls).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf import Metadata, Value, ValueType
from quantkit.pipeline.mixtures import FILE_TYPES
from quantkit.sources.source import GGUFSource, TensorSource

ERROR, WARNING, NOTE = "error", "warning", "note"
# What the hub takes for a type in a file's name: the last one counts.
_LABELS = sorted({*FILE_TYPES, "Q3_K", "Q4_K", "Q5_K", "MXFP4", "Q8_K"}, key=len, reverse=True)
_LABEL = re.compile(rf"(UD-)?({'|'.join(_LABELS)})(_[A-Z]+)?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BY_NUMBER = {file.number: name for name, file in FILE_TYPES.items()}
# Ollama's limits.
_MOST_DIMENSIONS, _LONGEST_STRING, _LONGEST_ARRAY = 4, 16 << 20, 64 << 20
# Files above this are cut into shards by publishers: the hub takes files of 50 GB.
_LARGEST_FILE = 50 * 10**9
_SPECIAL_TOKENS = ("bos", "eos", "eot", "eom", "unknown", "padding", "separator", "mask")


@dataclass(frozen=True)
class Finding:
    """One thing that an engine or the hub will stumble on: how bad, in which file, what, and what to do."""

    level: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.level}: {self.file}: {self.problem}"


def hub_label(name: str) -> str | None:
    """The type that the hub shows for a file of this name: the last known one in it; None when it finds none."""
    found = [match[0] for match in _LABEL.finditer(name.upper())]
    return found[-1] if found else None


def lint(path: Path, source: TensorSource | None = None) -> list[Finding]:
    """Everything found in a GGUF file, or in the GGUF files of a directory and its folders, the worst first.

    `source` is the model that they were made from, where it is at hand. Raises QuantkitError when there is no file.
    """
    files = (
        [p for p in sorted(path.rglob("*.gguf")) if not p.name.endswith(".imatrix.gguf")] if path.is_dir() else [path]
    )
    if not files:
        raise QuantkitError(f"{path}: holds no GGUF files")
    root = path if path.is_dir() else path.parent
    findings = list(_shards(files, root))
    broken = {finding.file for finding in findings if finding.level == ERROR}
    for file in files:
        shown = str(file.relative_to(root))
        match = _SHARD.fullmatch(file.name)
        if match is not None and (int(match["number"]) > 1 or shown in broken):
            continue
        try:
            model = GGUFSource(file)
            findings += [Finding(level, shown, problem) for level, problem in _file(file, model, source)]
        except QuantkitError as error:
            findings.append(Finding(ERROR, shown, f"cannot be read: {error}"))
    order = (ERROR, WARNING, NOTE)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _shards(files: Sequence[Path], root: Path) -> Iterator[Finding]:
    """Shards that are missing, and what cannot be done with shards."""
    sets: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            sets[file.parent, match["stem"], int(match["count"])].add(int(match["number"]))
    for (folder, stem, count), numbers in sorted(sets.items()):
        first = str((folder / f"{stem}-{min(numbers):05d}-of-{count:05d}.gguf").relative_to(root))
        missing = sorted(set(range(1, count + 1)) - numbers)
        if missing:
            listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            yield Finding(ERROR, first, f"{len(missing)} of {count} shards are missing: {listed}")
        yield Finding(NOTE, first, "Ollama cannot pull shards from the hub: its users need to merge them first")
        if folder == root and len(sets) > 1:
            yield Finding(NOTE, first, f"put its shards into a folder of their own: {stem}/")


def _file(path: Path, model: GGUFSource, source: TensorSource | None) -> Iterator[tuple[str, str]]:
    yield from _names(path, model.metadata)
    yield from _limits(model)
    yield from _special_tokens(model.metadata)
    yield from _template(model.metadata, source)
    yield from _origin(model.metadata)
    if any(info.type.name.startswith("TQ") for info in model.tensors.values()):
        yield NOTE, "vLLM has no kernels for TQ1_0 and TQ2_0"
    if path.stat().st_size > _LARGEST_FILE:
        yield WARNING, "larger than 50 GB: split it, the hub takes no larger files"


def _names(path: Path, metadata: Metadata) -> Iterator[tuple[str, str]]:
    number = metadata.scalar("general.file_type")
    kind = _BY_NUMBER.get(number) if isinstance(number, int) else None
    if kind is None:
        yield WARNING, "general.file_type is missing or unknown: no tool can tell what type it is"
        return
    label = hub_label(path.name)
    if label is None:
        yield ERROR, f"the hub finds no type in its name: name it {path.stem}-{kind}.gguf"
    elif label.removeprefix("UD-") != kind:
        yield WARNING, f"the hub will show it as {label}, the last type in its name, but it is {kind}"
    stem = path.name.removesuffix(".gguf")
    if not (stem.endswith(f"-{kind}") or f"-{kind}-" in stem):
        yield WARNING, f"vLLM looks for *-{kind}.gguf, in exactly these letters, and will not find it by its type"


def _limits(model: GGUFSource) -> Iterator[tuple[str, str]]:
    for key, value in model.metadata.items():
        size, is_array = _length(value)
        if is_array and size > _LONGEST_ARRAY:
            yield ERROR, f"{key} has {size} elements: Ollama takes {_LONGEST_ARRAY} at most"
        elif not is_array and size > _LONGEST_STRING:
            yield ERROR, f"{key} has {size} bytes: Ollama takes {_LONGEST_STRING} at most"
    for name, info in model.tensors.items():
        if len(info.shape) > _MOST_DIMENSIONS:
            yield ERROR, f"tensor {name} has {len(info.shape)} dimensions: engines take {_MOST_DIMENSIONS} at most"


def _length(value: Value) -> tuple[int, bool]:
    """How long a value is (0 for numbers), and whether it is an array."""
    if value.type == ValueType.ARRAY:
        return len(value), True
    return (len(str(value.value).encode("utf-8", "surrogateescape")) if value.type == ValueType.STRING else 0), False


def _special_tokens(metadata: Metadata) -> Iterator[tuple[str, str]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        yield ERROR, "there is no vocabulary (tokenizer.ggml.tokens)"
        return
    count, ids = len(tokens), {}
    for name in _SPECIAL_TOKENS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.scalar(key)
        if value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < count:
            yield ERROR, f"{key} is {value}: not one of {count} tokens"
        else:
            ids[name] = value
    if "eos" not in ids and "eot" not in ids:
        yield WARNING, "no token ends an answer (eos_token_id, eot_token_id): engines will not know when to stop"
    if "bos" in ids and ids["bos"] == ids.get("eos"):
        yield NOTE, "BOS and EOS are the same token"
    adds = metadata.scalar("tokenizer.ggml.add_bos_token")
    if adds and "bos" not in ids:
        yield ERROR, "add_bos_token is set, but there is no bos_token_id"


def _template(metadata: Metadata, source: TensorSource | None) -> Iterator[tuple[str, str]]:
    template = metadata.scalar("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        yield WARNING, "no chat template (tokenizer.chat_template): engines guess one, or treat it as a base model"
    if source is None:
        return
    original = source.metadata.scalar("tokenizer.chat_template")
    if original != template:
        yield WARNING, f"its chat template differs from that of {source.label}"
    for name in _SPECIAL_TOKENS:
        key = f"tokenizer.ggml.{name}_token_id"
        ours, theirs = metadata.scalar(key), source.metadata.scalar(key)
        if ours != theirs:
            yield WARNING, f"{key} is {ours}, but {theirs} in {source.label}"


def _origin(metadata: Metadata) -> Iterator[tuple[str, str]]:
    if metadata.scalar("general.base_model.0.repo_url") is None and metadata.scalar("general.repo_url") is None:
        yield (
            NOTE,
            (
                "general.base_model.0.repo_url is missing: vLLM then needs config.json beside the file, "
                "and the hub's page cannot link the original"
            ),
        )
    for key in ("general.name", "general.license"):
        if metadata.scalar(key) is None:
            yield NOTE, f"{key} is missing"


def as_dict(findings: Sequence[Finding]) -> Mapping[str, Any]:
    """The findings for programs."""
    return {"findings": [{"level": e.level, "path": e.file, "problem": e.problem} for e in findings]}
