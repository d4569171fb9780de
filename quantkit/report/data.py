"""What a report holds, as data: report.json, which the page and the card are made from.

`schema.json` says how it is built; `SCHEMA` is its version, raised when a field changes its
meaning or is removed.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.evaluate.divergence import DELTA_P_EDGES, DivergenceResult
from quantkit.evaluate.generate import Generation
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.gguf import Metadata
from quantkit.pipeline.plan import Plan, plan_copy
from quantkit.report.json_data import json_data
from quantkit.report.memory import memory_needed
from quantkit.report.publish import sha256
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import Vocabulary
from quantkit.vocabulary.chat import render

SCHEMA = 1
# Texts rarely share so many consecutive words by chance: papers use 13 to find test text in training data.
_SHARED_WORDS = 13
_GIB = 2**30
_MEMORIES = tuple(n * _GIB for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 512))
_CONTEXT, _CACHE = 8192, "f16"


@dataclass(frozen=True)
class NamedText:
    """A text and its name; `dataset` is its dataset's id on the hub, if it has one."""

    name: str
    text: str
    dataset: str | None = None

    def digest(self) -> dict[str, Any]:
        """Its name, size in bytes and SHA-256."""
        data = self.text.encode("utf-8", "surrogatepass")
        return {"text": self.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class MadeFile:
    """A file of a ladder: its plan, path (of the first shard) and name, and the seconds that it took.

    `parts` are its shards, or itself: path, size in bytes and SHA-256 of each.
    """

    plan: Plan
    path: Path
    name: str
    parts: Sequence[Mapping[str, Any]]
    seconds: float

    @property
    def digests(self) -> list[str]:
        """The SHA-256 of its parts."""
        return [part["sha256"] for part in self.parts]


def shared_words(text: str, other: str) -> float:
    """The share of `text`'s runs of 13 words that `other` has too: 0 if the two have nothing in common."""
    runs = _runs(text)
    return len(runs & _runs(other)) / len(runs) if runs else 0.0


def _runs(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[at : at + _SHARED_WORDS])) for at in range(len(words) - _SHARED_WORDS + 1)}


def prompts_of(text: str, count: int = 8, length: int = 160) -> list[str]:
    """`count` prompts from all over `text`, each from the start of a word, about `length` characters long."""
    words = [match.start() for match in re.finditer(r"(?<=\s)\S", text)]
    if len(words) < 2 * count:
        return []
    found = []
    for i in range(count):
        start = words[i * len(words) // count]
        end = next((at for at in words if at >= start + length), len(text))
        found.append(text[start:end].rstrip())
    return found


def measurement(text: str, result: DivergenceResult) -> dict[str, Any]:
    """A divergence as a report has it: `result`, what it says of the file, `text`, of the text, and `compute`."""
    held = asdict(result)
    names = ("ppl", "ratio", "kld", "delta_p", "delta_p_rms", "delta_p_histogram", "same_top", "same_top5",
             "correlation", "by_position", "by_class")  # fmt: skip
    percentiles = {
        name: {str(per_cent): value for per_cent, value in held[name].items()}
        for name in ("kld_percentiles", "delta_p_percentiles")
    }
    top = {"top_disagreement": 1.0 - result.same_top.value}
    shared = {name: held[name] for name in ("n_ctx", "n_chunks", "n_tokens")}
    return {
        "result": {"text": text, **{name: held[name] for name in names}, **percentiles, **top},
        "text": {**shared, "ppl": held["ppl_base"]},
        "compute": {name: held[name] for name in ("backend", "precision", "blas")},
    }


def continuation(vocabulary: Vocabulary, source: Generation, other: Generation) -> dict[str, Any]:
    """Where `other` diverges from what `source` said: the common part, the first different token, and the rest."""
    pairs = zip(source.tokens, other.tokens, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(source.tokens), len(other.tokens)))
    whole = vocabulary.decode(other.tokens, special=False)
    kept = vocabulary.decode(other.tokens[:same], special=False)
    first = vocabulary.decode(other.tokens[: same + 1], special=False)
    identical = same == len(source.tokens) == len(other.tokens)
    return {
        "n_same": same,
        "identical": identical,
        "same": kept,
        "first": "" if identical else first[len(kept) :],
        "rest": whole[len(first) :],
    }


def assemble(
    source: TensorSource,
    files: Sequence[MadeFile],
    texts: Sequence[NamedText],
    measurements: Sequence[Sequence[Mapping[str, Any]]],
    errors: Sequence[Mapping[str, float]],
    *,
    source_digests: Mapping[str, str],
    compute: Compute,
    chunking: Chunking,
    command: str,
    base_model: str | None = None,
    rounding: str = "nearest",
    calibration: NamedText | None = None,
    calibration_chunking: Chunking | None = None,
    imatrix: Path | None = None,
    prompts: Sequence[str] = (),
    generations: Sequence[Sequence[Generation]] = (),
) -> dict[str, Any]:
    """The whole report. `measurements[t][f]` is what file `f` lost on text `t`, `errors[f]` what its tensors did.

    `source_digests` are the SHA-256 of the source's files by name. `generations[0]` are the source's continuations of
    `prompts`, those after it each file's. Everything is finite: a number that is not is null.
    """
    if not files or not texts:
        raise QuantkitError("a report needs a file and a text")
    copy = plan_copy(source)
    kinds = {t.info.type.name: t.info.n_elements for t in copy if len(t.info.shape) > 1}
    made = []
    for f, file in enumerate(files):
        made.append(
            {
                "type": file.plan.name,
                "path": file.name,
                "size": sum(part["size"] for part in file.parts),
                "parts": list(file.parts),
                "bits_per_weight": file.plan.bits_per_weight,
                "seconds": file.seconds,
                "measurements": [measurements[t][f]["result"] for t in range(len(texts))],
                "tensors": list(_tensors(file.plan, errors[f])),
                "memory": _memory(file.plan),
                "continuations": None,
            }
        )
    report = {
        "schema": SCHEMA,
        "quantkit": quantkit.__version__,
        "model": describe(source, base_model),
        "source": {
            "name": Path(source.label).name,
            "type": max(kinds, key=lambda name: kinds[name]),
            "size": copy.file_size,
            "bits_per_weight": copy.bits_per_weight,
            "files": [
                {"path": path.name, "size": path.stat().st_size, "sha256": source_digests[path.name]}
                for path in source.files
            ],
        },
        "rounding": rounding,
        "calibration": _calibration(calibration, calibration_chunking),
        "imatrix": None if imatrix is None else _file(imatrix),
        "texts": [
            {
                **text.digest(),
                **measurements[t][0]["text"],
                "shared_with_calibration": shared_words(text.text, calibration.text) if calibration else None,
            }
            for t, text in enumerate(texts)
        ],
        "compute": {**measurements[0][0]["compute"], "device": compute.device},
        "delta_p_edges": list(DELTA_P_EDGES),
        "files": made,
        "prompts": [],
        "continuation_tokens": 0,
        "recommendations": recommendations(made),
        "reproduce": {
            "command": command,
            "versions": {"quantkit": quantkit.__version__, "python": platform.python_version(), **_versions()},
        },
    }
    if generations:
        _add_continuations(report, source, prompts, generations)
    whole: dict[str, Any] = json_data(report)
    return whole


def describe(source: TensorSource, base_model: str | None) -> dict[str, Any]:
    """What the hub and readers want to know about a model, from its metadata."""
    metadata = source.metadata

    def text(key: str) -> str | None:
        value = metadata.scalar(key)
        return value if isinstance(value, str) and value else None

    return {
        "name": text("general.name") or Path(source.label).name,
        "architecture": metadata.architecture,
        "n_weights": sum(info.n_elements for info in source.tensors.values()),
        "n_ctx_train": metadata.scalar(f"{metadata.architecture}.context_length"),
        "base_model": base_model or _hub_id(text("general.source.huggingface.repository") or text("general.repo_url")),
        "license": text("general.license"),
        "license_name": text("general.license.name"),
        "license_link": text("general.license.link"),
        "languages": _strings(metadata, "general.languages"),
        "tags": [tag for tag in _strings(metadata, "general.tags") if tag not in _TASKS],
        "datasets": _strings(metadata, "general.datasets"),
        "pipeline_tag": next((tag for tag in _strings(metadata, "general.tags") if tag in _TASKS), "text-generation"),
        "prompt_format": _prompt_format(metadata),
    }


_TASKS = ("text-generation", "feature-extraction", "sentence-similarity", "text-ranking", "image-text-to-text")


def _hub_id(address: str | None) -> str | None:
    match = re.fullmatch(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)/?", address or "")
    return match[1] if match else None


def _strings(metadata: Metadata, key: str) -> list[str]:
    try:
        return metadata.strings(key, ())
    except QuantkitError:
        return []


def _prompt_format(metadata: Metadata) -> str | None:
    """The chat template rendered with placeholders; None for a model without one, or one that does not render."""
    for messages in (
        [{"role": "system", "content": "{system_prompt}"}, {"role": "user", "content": "{prompt}"}],
        [{"role": "user", "content": "{prompt}"}],
    ):
        try:
            return render(metadata, messages)  # type: ignore[arg-type]
        except QuantkitError:
            continue
    return None


def _tensors(plan: Plan, errors: Mapping[str, float]) -> Iterable[dict[str, Any]]:
    for t in plan:
        name = t.info.name
        match = re.match(r"blk\.(\d+)\.(.+)", name)
        yield {
            "name": name,
            "layer": int(match[1]) if match else None,
            "kind": (match[2] if match else name).removesuffix(".weight"),
            "source_type": t.source_type.name,
            "type": t.info.type.name,
            "size": t.info.nbytes,
            "error": errors.get(name, 0.0) if len(t.info.shape) > 1 else None,
        }


def _memory(plan: Plan) -> dict[str, int] | None:
    """The memory for running a file at a usual context; None if its metadata do not say."""
    tensors = {t.info.name: t.info for t in plan}
    try:
        need = memory_needed(plan.metadata, tensors, n_ctx=_CONTEXT, kv=_CACHE)
    except QuantkitError:
        return None
    return {"weights": need.weights, "cache": need.cache, "compute": need.compute, "total": need.total}


def recommendations(files: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Which file to use with how much memory, as sentences; None if their needs are not known."""
    known = [file for file in files if file["memory"] is not None]
    if len(known) < len(files):
        return None
    advice, last = [], None
    smallest = min(file["memory"]["total"] for file in files)
    largest = max(file["memory"]["total"] for file in files)
    for memory in _MEMORIES:
        fitting = [file for file in files if file["memory"]["total"] <= memory]
        if not fitting or memory < smallest:
            continue
        best = min(fitting, key=lambda file: file["measurements"][0]["kld"]["value"])
        if best["type"] != last:
            used = best["memory"]["total"] / _GIB
            advice.append(f"{memory // _GIB} GiB: {best['type']} ({used:.2f} GiB with {_CONTEXT} tokens of context)")
            last = best["type"]
        if memory >= largest:
            break
    return {"n_ctx": _CONTEXT, "kv": _CACHE, "advice": advice}


def _calibration(text: NamedText | None, chunking: Chunking | None) -> dict[str, Any] | None:
    if text is None:
        return None
    used = chunking or Chunking()
    return {**text.digest(), "dataset": text.dataset, "n_chunks": used.chunks, "n_ctx": used.n_ctx}


def _file(path: Path) -> dict[str, Any]:
    return {"path": path.name, "size": path.stat().st_size, "sha256": sha256(path)}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "numba", "gguf")}


def _add_continuations(
    report: dict[str, Any], source: TensorSource, prompts: Sequence[str], generations: Sequence[Sequence[Generation]]
) -> None:
    vocabulary = Vocabulary.from_metadata(source.metadata)
    said: list[dict[str, Any]] = [
        {"prompt": prompt, "source": vocabulary.decode(g.tokens, special=False), "files": {}}
        for prompt, g in zip(prompts, generations[0], strict=True)
    ]
    for file, own in zip(report["files"], generations[1:], strict=True):
        each = [continuation(vocabulary, a, b) for a, b in zip(generations[0], own, strict=True)]
        for entry, found in zip(said, each, strict=True):
            entry["files"][file["type"]] = found
        file["continuations"] = {
            "identical": sum(found["identical"] for found in each),
            "mean_same": sum(found["n_same"] for found in each) / len(each),
        }
    report["prompts"] = said
    report["continuation_tokens"] = max(len(g.tokens) for g in generations[0])
