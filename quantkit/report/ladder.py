"""A ladder: one model quantized to several types, each measured against it, in one directory with its report.

The work goes in steps (quantize, measure, say, write), and each leaves what it found in a state file in the directory.
An interrupted run continues with what is there: files and measurements are identified by hashes of everything that
they were made from, so nothing stale is reused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantkit
from quantkit.calibration.rounding import execute_with_feedback
from quantkit.calibration.roundings import check_rounding
from quantkit.calibration.text import CalibrationText
from quantkit.compile.ahead import KernelJob
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.divergence import divergences
from quantkit.evaluate.generate import Generation, continuations
from quantkit.evaluate.importance import importance_matrix
from quantkit.evaluate.needed_kernels import measuring_kernels
from quantkit.evaluate.perplexity import chunked, tokenize
from quantkit.evaluate.settings import Chunking, Compute, Progress
from quantkit.formats.atomic import OutputGroup, write_whole
from quantkit.formats.unfinished import WorkDirectory
from quantkit.pipeline.execute import execute, quantizing_kernels
from quantkit.pipeline.mixtures import FileType, file_type
from quantkit.pipeline.naming import stem
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, plan_all
from quantkit.report import card, data, page, summary
from quantkit.report.comparison import compare
from quantkit.report.data import MadeFile, NamedText
from quantkit.report.json_data import json_data, json_text
from quantkit.report.publish import sha256
from quantkit.sources.source import GGUFSource, TensorSource
from quantkit.vocabulary import Vocabulary

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

# Ladders by name, from large to small.
LADDERS = {
    "small": ("Q8_0", "Q5_K_M", "Q4_K_M"),
    "standard": ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"),
    "full": ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S",
             "Q2_K"),
}  # fmt: skip
# The hub takes files up to this size; larger ones go as shards into a folder of their own.
LARGEST_FILE = 50 * 10**9
CONTINUED_TOKENS = 32
_STATE = ".quantkit/report.json"
# Files of an earlier report that are written anew; a README.md is kept, but for the card in it.
_REPORTS = ("report.json", "report.html", "report.md")


@dataclass(frozen=True, kw_only=True)
class LadderOptions:
    """What to make and how to measure it.

    `types` are file types; `imatrix` is a file, `calibration` a text to compute an importance matrix from, in
    `calibration_chunking`, or to round with error feedback by, where `rounding` is gptq or yaqa instead of nearest.
    `texts` are what the files are measured on, and `n_prompts` prompts from the first are continued by all of them.
    `base_model` is the hub id of the original, `repo` that of the repository to be, for the card. Files above
    `largest_file` bytes become shards. `command` is what the report says made it.
    """

    types: Sequence[str]
    texts: Sequence[NamedText]
    imatrix: Path | None = None
    calibration: NamedText | None = None
    calibration_chunking: Chunking = field(default_factory=lambda: Chunking(chunks=128))
    rounding: str = "nearest"
    allow_requantize: bool = False
    chunking: Chunking = field(default_factory=Chunking)
    compute: Compute = field(default_factory=Compute)
    n_prompts: int = 8
    base_model: str | None = None
    repo: str | None = None
    largest_file: int = LARGEST_FILE
    command: str = "quantkit report"


def ladder_types(names: Sequence[str]) -> list[str]:
    """File types by their names or the names of ladders (small, standard, full), each once."""
    direct = [file_type(name).name for name in names if name.lower() not in LADDERS]
    if len(set(direct)) < len(direct):
        raise QuantkitError(f"a type is named twice: {', '.join(direct)}")
    found: dict[str, None] = {}
    for name in names:
        for each in LADDERS.get(name.lower(), (name,)):
            found[file_type(each).name] = None
    if not found:
        raise QuantkitError("name at least one file type")
    return list(found)


def ladder_kernels(source: TensorSource, files: Sequence[FileType], backend: str = "numpy") -> list[KernelJob]:
    """The kernels that a ladder will need, to be compiled ahead."""
    plans = plan_all(source, files, QuantizeOptions(allow_requantize=True))
    outputs = [t.info.type for plan in plans for t in plan]
    measuring = measuring_kernels(source, outputs, comparing=True) if backend == "numpy" else []
    return [*quantizing_kernels(plans), *measuring]


class Ladder:
    """Makes a ladder in `directory`, step by step. `force` replaces existing files.

    On `cluster`'s workers, where that is given: all but the continuations.

    Raises QuantkitError for texts that are too short to measure and requests that cannot be met, before a file is
    written, and for a file in the way that is not from an earlier run of the same.
    """

    def __init__(
        self,
        source: TensorSource,
        directory: Path,
        options: LadderOptions,
        force: bool = False,
        cluster: Cluster | None = None,
    ) -> None:
        if not options.texts:
            raise QuantkitError("name at least one text to measure on")
        check_rounding(options.rounding)
        if options.rounding != "nearest" and options.calibration is None:
            raise QuantkitError(f"rounding {options.rounding} needs a calibration text", option="calibration")
        self.source, self.directory, self.options, self._force = source, directory, options, force
        self._cluster = cluster
        self._files: list[MadeFile] = []
        self._reports: list[Path] = []
        vocabulary = Vocabulary.from_metadata(source.metadata)
        for text in options.texts:
            ids, _ = tokenize(vocabulary, text.text)
            chunked(ids, options.chunking, None, source.label)
        if options.calibration is not None:
            ids, _ = tokenize(vocabulary, options.calibration.text)
            chunked(ids, options.calibration_chunking, None, source.label, least=1)
        self._inputs = {path.name: sha256(path) for path in source.files}
        self._state = _State(directory / _STATE)
        self._made: list[Path] = []
        self._new = [home for home in (directory, *directory.parents) if not home.exists()]
        self.matrix: Path | None = options.imatrix
        self._refuse()

    # -- the steps

    def plans(self) -> list[Plan]:
        """A plan for each type, cut into shards where its file would be too large for the hub."""
        o = self.options
        wanted = QuantizeOptions(
            imatrix=self.matrix, calibrated=o.rounding != "nearest", allow_requantize=o.allow_requantize
        )
        plans = plan_all(self.source, o.types, wanted)
        for plan in plans:
            if o.rounding == "nearest":
                plan.check()
            if plan.file_size > o.largest_file:
                plan.split_by(o.largest_file)
        return plans

    def calibrate(self, progress: Progress | None = None) -> None:
        """Compute the importance matrix from the calibration text, and keep it beside the files."""
        o = self.options
        if o.calibration is None or o.rounding != "nearest":
            return
        path = self._matrix_path
        key = self._key("imatrix", o.calibration.digest(), asdict(o.calibration_chunking))
        self.matrix = path
        if self._state.holds(path.name, key, [path]):
            return
        matrix = importance_matrix(
            self.source,
            o.calibration.text,
            chunking=o.calibration_chunking,
            compute=o.compute,
            dataset=o.calibration.name,
            progress=progress,
            cluster=self._cluster,
        )
        with self._group() as group:
            matrix.save(group.add(path))
            self._state.put({path.name: (key, [sha256(group.place(path))])})
        self._made.append(path)

    def quantize(self, progress: Callable[[float, str], None] | None = None) -> None:
        """Write every file that is not there yet, in one reading of the source.

        `progress(share done, what is being done)` is called along the way.
        """
        o = self.options
        plans = self.plans()
        targets = [self._target(plan) for plan in plans]
        digest = sha256(o.imatrix) if o.imatrix is not None else None
        calibrated = None if o.calibration is None else [o.calibration.digest(), asdict(o.calibration_chunking)]
        how = [digest, calibrated, o.rounding, o.allow_requantize, o.largest_file]
        keys = [self._key(plan.name, how) for plan in plans]
        paths = [[path for path, _, _ in plan.files(target)] for plan, target in zip(plans, targets, strict=True)]
        missing = [
            i for i, (plan, key) in enumerate(zip(plans, keys, strict=True))
            if not self._state.holds(plan.name, key, paths[i])
        ]  # fmt: skip
        if missing:
            began = time.perf_counter()
            with self._group() as group:
                for i in missing:
                    group.make_directory(targets[i].parent)
                outputs = [(plans[i], targets[i]) for i in missing]
                self._execute(outputs, group, progress)
                seconds = (time.perf_counter() - began) / len(missing)
                digests = {plans[i].name: [sha256(group.place(path)) for path in paths[i]] for i in missing}
                self._state.put({plans[i].name: (keys[i], digests[plans[i].name]) for i in missing}, seconds)
            for i in missing:
                self._made += paths[i]
        self._files = []
        for plan, own in zip(plans, paths, strict=True):
            shown = own[0].relative_to(self.directory).as_posix()
            parts = [
                {"path": p.relative_to(self.directory).as_posix(), "size": p.stat().st_size, "sha256": digest}
                for p, digest in zip(own, self._state.digests(plan.name), strict=True)
            ]
            self._files.append(MadeFile(plan, own[0], shown, parts, self._state.seconds(plan.name)))

    def _execute(
        self, outputs: list[tuple[Plan, Path]], group: OutputGroup, progress: Callable[[float, str], None] | None
    ) -> None:
        """Write `outputs` into `group`, rounded as the options say."""
        o = self.options
        tell = progress or (lambda share, what: None)
        if o.rounding != "nearest" and o.calibration is not None:
            words = o.calibration
            text = CalibrationText.of(self.source, words.text, o.calibration_chunking, words.name)
            for plan, _ in outputs:
                text.describe(plan.metadata, o.rounding)
            model = load(self.source, o.compute, keep=False)
            execute_with_feedback(
                model,
                outputs,
                text,
                rounding=o.rounding,
                work=WorkDirectory(outputs[0][1], resume=True),
                threads=o.compute.threads,
                max_buffer_size=o.compute.buffer_size,
                progress=lambda step: tell(step.done / step.total, step.tensor),
                group=group,
                cluster=self._cluster,
            )
            return
        total, done = sum(info.nbytes for info in self.source.tensors.values()), 0

        def advance(tensor: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            tell(done / total, tensor)

        execute(
            self.source,
            outputs,
            threads=o.compute.threads,
            max_buffer_size=o.compute.buffer_size,
            progress=advance,
            group=group,
            cluster=self._cluster,
        )

    def measure(self, progress: Progress | None = None) -> None:
        """What each file lost on each text, and of each tensor, where it is not known yet."""
        o = self.options
        for text in o.texts:
            missing = [file for file in self._files if self._measured(file, text) is None]
            if not missing:
                continue
            models = [GGUFSource(file.path) for file in missing]
            results = divergences(
                models,
                self.source,
                text.text,
                chunking=o.chunking,
                compute=o.compute,
                progress=progress,
                cluster=self._cluster,
            )
            for file, result in zip(missing, results, strict=True):
                found = data.measurement(text.name, result)
                self._state.note(self._measure_key(file, text), found)
        for file in self._files:
            key = self._key("errors", file.digests)
            if self._state.noted(key) is None:
                compared = compare(self.source, GGUFSource(file.path), cluster=self._cluster)
                self._state.note(key, {error.name: error.relative_rmse for error in compared.tensors})

    def say(self, progress: Callable[[int, int], None] | None = None) -> None:
        """The continuations of prompts from the first text, by the source and by every file."""
        o = self.options
        prompts = data.prompts_of(o.texts[0].text, o.n_prompts) if o.n_prompts else []
        compute = Compute(threads=o.compute.threads, memory=o.compute.memory)
        todo: list[tuple[str, TensorSource | Path]] = [("source", self.source)]
        todo += [(file.plan.name, file.path) for file in self._files]
        for done, (name, model) in enumerate(todo):
            key = self._said_key(name, prompts)
            if prompts and self._state.noted(key) is None:
                said = continuations(model, prompts, n_tokens=CONTINUED_TOKENS, compute=compute)
                self._state.note(key, [asdict(each) for each in said])
            if progress is not None:
                progress(done + 1, len(todo))

    def write(self) -> dict[str, Any]:
        """Write report.json, report.html, report.md and the card; returns what report.json holds."""
        o = self.options
        prompts = data.prompts_of(o.texts[0].text, o.n_prompts) if o.n_prompts else []
        names = ["source", *(file.plan.name for file in self._files)]
        generations = [
            [Generation(**each) for each in self._state.noted(self._said_key(name, prompts)) or []] for name in names
        ]
        report = data.assemble(
            self.source,
            self._files,
            o.texts,
            [[self._measured(file, text) or {} for file in self._files] for text in o.texts],
            [self._state.noted(self._key("errors", file.digests)) or {} for file in self._files],
            source_digests=self._inputs,
            compute=o.compute,
            chunking=o.chunking,
            command=o.command,
            base_model=o.base_model,
            rounding=o.rounding,
            calibration=o.calibration,
            calibration_chunking=o.calibration_chunking,
            imatrix=o.imatrix,
            prompts=prompts,
            generations=generations if prompts and all(generations) else [],
        )
        place = self.directory / "README.md"
        existing = place.read_text(encoding="utf-8") if place.is_file() else ""
        contents = {
            "report.json": json_text(report) + "\n",
            "report.html": page.render(report),
            "report.md": summary.markdown(report),
            "README.md": card.render(report, o.repo, existing),
        }
        # These are made anew each time; what was written into the card by hand is kept in it.
        with OutputGroup(force=True, inputs=self.source.files, directory=self.directory) as group:
            for name, text in contents.items():
                write_whole(group.add(self.directory / name), text)
        self._reports = [self.directory / name for name in contents]
        return report

    def undo(self) -> None:
        """Remove the files that this run made, after an error."""
        for path in self._made:
            path.unlink(missing_ok=True)
        self._state.remove()
        for home in [*{path.parent for path in self._made} - {self.directory}, *self._new]:
            if home.is_dir() and not any(home.iterdir()):
                home.rmdir()

    @property
    def written(self) -> list[Path]:
        """Every file of the ladder, the report's last."""
        matrix = [self.matrix] if self.matrix is not None and self.options.imatrix is None else []
        own = [self.directory / part["path"] for file in self._files for part in file.parts]
        return [*matrix, *own, *self._reports]

    def digest(self, path: Path) -> str:
        """The SHA-256 of a file of the ladder."""
        known = {self.directory / part["path"]: part["sha256"] for file in self._files for part in file.parts}
        return known.get(path) or sha256(path)

    # -- what they share

    @property
    def _matrix_path(self) -> Path:
        return self.directory / f"{stem(self.source)}.imatrix.gguf"

    def _refuse(self) -> None:
        """Raise QuantkitError, before anything is computed, for plans that cannot be and files that are in the way."""
        o = self.options
        wanted = QuantizeOptions(
            imatrix=o.imatrix, calibrated=o.calibration is not None, allow_requantize=o.allow_requantize
        )
        group, places = self._group(), []
        for plan in plan_all(self.source, o.types, wanted):
            if o.calibration is None:
                plan.check()
            if plan.file_size > o.largest_file:
                plan.split_by(o.largest_file)
            if not self._state.knows(plan.name):
                places += [path for path, _, _ in plan.files(self._target(plan))]
        if o.calibration is not None and not self._state.knows(self._matrix_path.name):
            places.append(self._matrix_path)
        if not self._state.exists:
            places += [self.directory / name for name in _REPORTS]
        for path in places:
            group.check(path)

    def _group(self) -> OutputGroup:
        inputs = [*self.source.files, *([self.options.imatrix] if self.options.imatrix else [])]
        return OutputGroup(force=self._force, inputs=inputs, directory=self.directory)

    def _target(self, plan: Plan) -> Path:
        name = f"{stem(self.source)}-{plan.name}"
        home = self.directory if plan.split is None else self.directory / name
        return home / f"{name}.gguf"

    def _key(self, *parts: object) -> str:
        told = json.dumps([quantkit.__version__, self._inputs, *parts], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    def _measure_key(self, file: MadeFile, text: NamedText) -> str:
        o = self.options
        how = [o.chunking.n_ctx, o.chunking.chunks, o.compute.backend, o.compute.device, o.compute.precision]
        return self._key("measured", file.digests, text.digest(), how)

    def _measured(self, file: MadeFile, text: NamedText) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._state.noted(self._measure_key(file, text))
        return found

    def _said_key(self, name: str, prompts: Sequence[str]) -> str:
        digests = next((file.digests for file in self._files if file.plan.name == name), [])
        return self._key("said", name, digests, list(prompts), CONTINUED_TOKENS)


class _State:
    """What earlier runs in a directory made and found. A damaged state file counts as none."""

    def __init__(self, path: Path) -> None:
        self._path, self.exists = path, path.is_file()
        self._files: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, Any] = {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            self._files, self._notes = dict(held["files"]), dict(held["notes"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass

    def knows(self, name: str) -> bool:
        """Whether an earlier run made files of `name`, whatever has become of them."""
        return name in self._files

    def holds(self, name: str, key: str, paths: Sequence[Path]) -> bool:
        """Whether the files of `name` are there as the run that had `key` left them."""
        entry = self._files.get(name)
        try:
            return (
                entry is not None
                and entry["key"] == key
                and all(path.is_file() for path in paths)
                and entry["sha256"] == [sha256(path) for path in paths]
            )
        except (KeyError, TypeError):
            return False

    def put(self, made: Mapping[str, tuple[str, list[str]]], seconds: float = 0.0) -> None:
        """Remember files that are about to appear: by name, the key of the run and the SHA-256 of each.

        Before they appear, so that a run that is stopped in between finds them known, or makes them again.
        """
        self._files |= {n: {"key": key, "sha256": digests, "seconds": seconds} for n, (key, digests) in made.items()}
        self._save()

    def digests(self, name: str) -> list[str]:
        """The SHA-256 of the files of `name`."""
        return list(self._files[name]["sha256"])

    def seconds(self, name: str) -> float:
        """How long making `name` took."""
        return float(self._files[name]["seconds"])

    def note(self, key: str, value: object) -> None:
        """Remember something found, for JSON."""
        self._notes[key] = json_data(value)
        self._save()

    def noted(self, key: str) -> Any:
        """What was remembered under `key`, or None."""
        return self._notes.get(key)

    def remove(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)
        if self._path.parent.is_dir() and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()

    def _save(self) -> None:
        with OutputGroup(force=True, directory=self._path.parent) as group:
            text = json.dumps({"files": self._files, "notes": self._notes}, allow_nan=False)
            write_whole(group.add(self._path), text)
