"""Plans whose types are chosen for a number of bytes, and the files that such plans are kept in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit import blocks
from quantkit.architectures import forward_spec
from quantkit.architectures.forward import ForwardSpec
from quantkit.blocks.types import GGMLType
from quantkit.calibration.choice import SMALLEST, Item, candidates, choose, engine_lacks, tied
from quantkit.calibration.progress import Step
from quantkit.calibration.roundings import check_rounding
from quantkit.calibration.survey import TensorCosts, survey
from quantkit.calibration.text import CalibrationText
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Compute
from quantkit.formats.atomic import OutputFile, write_whole
from quantkit.formats.gguf import ValueType, padded
from quantkit.formats.unfinished import WorkDirectory
from quantkit.pipeline.mixtures import ALIASES, FILE_TYPES, FileType, file_type
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import Plan, PlannedTensor, plan_quantize
from quantkit.sources.source import TensorSource
from quantkit.wording import size_text

if TYPE_CHECKING:
    from quantkit.pipeline.cluster import Cluster

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_VERSION = 1
# Bytes that a plan has at most: some hundred for each tensor.
_LARGEST = 1 << 26
# File types that a file of chosen types may be called by.
_LABELS = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS",
    "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """How large a file is to be: the size of file type `like`, or `nbytes`, or `bits` for each weight."""

    text: str
    like: FileType | None = None
    nbytes: int = 0
    bits: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Target:
        """A file type's name, a size such as 5.2GB or 700MiB, or bits per weight, as 4.5bpw. Raises QuantkitError."""
        name = text.strip().upper()
        if name in FILE_TYPES or name in ALIASES:
            return cls(text, like=file_type(name))
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG]I?)?B?|(BPW))", name)
        if match is None or not float(match[1]) > 0:
            raise QuantkitError(f"not a size: {text!r}; write 5.2GB, 700MiB, 4.5bpw, or a file type such as Q4_K_M")
        if match[3]:
            return cls(text, bits=float(match[1]))
        return cls(text, nbytes=int(float(match[1]) * _UNITS[match[2] or ""]))

    @property
    def mark(self) -> str:
        """What the names of files of this size have in them: nothing that is read as a type."""
        if self.like is not None:
            return "chosen"
        return f"{self.nbytes}B" if self.text.strip().isdigit() else self.text.strip().replace(" ", "")


@dataclass
class ChosenPlan(Plan):
    """A plan whose types were chosen. `divergence` is the predicted mean divergence from the source, in nats.

    `target` is what its size was to be, `rounding` what the choice assumes; `costs` says what each tensor would cost
    as each type.
    """

    target: str = ""
    rounding: str = "gptq"
    costs: dict[str, TensorCosts] = field(default_factory=dict, repr=False)

    @property
    def divergence(self) -> float:
        """The sum over the tensors with costs, of the types that they have now."""
        return sum(
            self.costs[line.source_name].divergence.get(line.info.type, 0.0)
            for line in self.tensors
            if line.source_name in self.costs
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        chosen = {"target": self.target, "rounding": self.rounding, "divergence": self.divergence}
        return {**super().as_dict(), "chosen": chosen}

    def __str__(self) -> str:
        """The table, and what is predicted."""
        return (
            f"{super().__str__()}\n{self.target}: {size_text(self.file_size)}, predicted mean divergence "
            f"{self.divergence:.5f}"
        )


@dataclass(frozen=True)
class Wishes:
    """What types a user will have: bounds, an engine that must load the file, and tensors that are to be alike."""

    minimum: GGMLType = SMALLEST
    maximum: GGMLType | None = None
    engine: str | None = None
    ties: Sequence[str] = ()


_NO_WISHES = Wishes()


class TypeChooser:
    """Chooses types for each of `targets`, of the model `source`, by a calibration text.

    `options` are as for `plan_all`; tensors whose type they name keep it. `rounding` is nearest, gptq or yaqa. Raises
    QuantkitError for a size below that of the smallest types (it says which that is) or above the source's, and for
    wishes that cannot be met, before anything is computed.
    """

    def __init__(
        self,
        source: TensorSource,
        targets: Sequence[Target],
        options: QuantizeOptions,
        text: CalibrationText,
        rounding: str = "gptq",
        wishes: Wishes = _NO_WISHES,
    ) -> None:
        self._source, self._targets, self._text = source, targets, text
        self._rounding, self._wishes = rounding, wishes
        self._options = options = replace(options, calibrated=True, imatrix=None)
        template = plan_quantize(source, "Q4_K_M", options)
        spec = forward_spec(source.metadata, source.tensors)
        self.candidates = _open_lines(source, spec, template, wishes)
        self._groups = tied(self.candidates, wishes.ties)
        for names in self._groups:
            if not self._shared_kinds(names):
                raise QuantkitError(f"no type that all of these tensors can have: {', '.join(names)}: do not tie them")
        self._sizes = [_file_size(source, template, target, options) for target in targets]
        self.labels = []
        for target, size in zip(targets, self._sizes, strict=True):
            label = target.like.name if target.like is not None else _label(source, size, options)
            self._check(target, size, label)
            self.labels.append(label)

    @property
    def marks(self) -> list[str]:
        """What the names of the files have before the file type."""
        return [target.mark for target in self._targets]

    def survey(
        self,
        compute: Compute,
        *,
        work: WorkDirectory | None = None,
        progress: Callable[[Step], None] | None = None,
        cluster: Cluster | None = None,
    ) -> dict[str, TensorCosts]:
        """What each tensor would cost as each type, by the workers of `cluster` if there is one.

        Kept in `work`, and taken from there where it was.
        """
        digest = ""
        if work is not None:
            digest = self._identify()
            known = work.load_costs(digest)
            if known is not None:
                return {name: _costs(self._source, name, entry) for name, entry in known.items()}
        how: dict[str, Any] = {
            "feedback": self._rounding != "nearest",
            "directory": None if work is None else work.make(),
            "progress": progress,
        }
        if cluster is None:
            costs = survey(load(self._source, compute, keep=False), self._text, self.candidates, **how)
        else:
            from quantkit.calibration.apart import survey_apart

            costs = survey_apart(cluster, self._source, compute, self._text, self.candidates, **how)
        if work is not None:
            work.save_costs(digest, {name: _as_json(each) for name, each in costs.items()})
        return costs

    def choose(self, costs: Mapping[str, TensorCosts]) -> list[ChosenPlan]:
        """The plan for each target. Raises QuantkitError where `costs` are another model's."""
        for name, kinds in self.candidates.items():
            if name not in costs:
                raise QuantkitError(f"{self._source.label}: the costs are another model's: they lack {name}")
            if not any(kind in costs[name].losses for kind in kinds):
                raise QuantkitError(f"{self._source.label}: the costs of {name} are of other types than may be had")
        return [
            self._choose(target, size, label, costs)
            for target, size, label in zip(self._targets, self._sizes, self.labels, strict=True)
        ]

    def _shared_kinds(self, names: Sequence[str]) -> list[GGMLType]:
        """The types that all of `names` may become."""
        first, *others = names
        return [kind for kind in self.candidates[first] if all(kind in self.candidates[name] for name in others)]

    def _base(self, target: Target, label: str, costs: Mapping[str, TensorCosts]) -> ChosenPlan:
        """The plan of `label`, with all keys that the file will have."""
        base = plan_quantize(self._source, label, self._options)
        plan = ChosenPlan(base.name, base.metadata, base.tensors, base.split, target.text, self._rounding, dict(costs))
        self._text.describe(plan.metadata, self._rounding)
        plan.metadata.set("quantkit.plan", ValueType.STRING, f"types chosen for the size of {target.text}")
        plan.metadata.set("quantkit.plan.divergence", ValueType.FLOAT32, 0.0)
        return plan

    def _check(self, target: Target, size: int, label: str) -> None:
        """Raise QuantkitError, before anything is computed, for a size that cannot be or needs no choice."""
        source, plan = self._source, self._base(target, label, {})
        whole = sum(info.nbytes for info in source.tensors.values()) + plan.file_size - plan.nbytes
        if size > whole:
            raise QuantkitError(
                f"a size of {size_text(size)} ({target.text}) is more than that of {source.label}, {size_text(whole)}"
            )
        for line in plan:
            if line.source_name in self.candidates:
                _set(line, min(self.candidates[line.source_name], key=lambda kind: kind.bits_per_weight), None)
        if plan.file_size > size:
            raise QuantkitError(
                f"a size of {size_text(size)} ({target.text}) cannot be reached: the smallest types take "
                f"{size_text(plan.file_size)} ({plan.file_size} bytes)"
            )

    def _choose(self, target: Target, size: int, label: str, costs: Mapping[str, TensorCosts]) -> ChosenPlan:
        plan = self._base(target, label, {name: costs[name] for name in self.candidates})
        lines = {line.source_name: line for line in plan}
        alignment = plan.metadata.alignment
        items = []
        for names in self._groups:
            kinds = [kind for kind in self._shared_kinds(names) if all(kind in costs[n].losses for n in names)]
            items.append(
                Item(
                    {
                        kind: (
                            sum(padded(costs[name].nbytes[kind], alignment) for name in names),
                            sum(costs[name].divergence[kind] for name in names),
                        )
                        for kind in kinds
                    }
                )
            )
        fixed = plan.file_size - sum(padded(lines[name].info.nbytes, alignment) for name in self.candidates)
        try:
            chosen = choose(items, size - fixed)
        except QuantkitError as error:
            raise QuantkitError(f"a size of {size_text(size)} ({target.text}) cannot be reached: {error}") from None
        for names, kind in zip(self._groups, chosen, strict=True):
            for name in names:
                _set(lines[name], kind, costs[name])
        plan.metadata.set("quantkit.plan.divergence", ValueType.FLOAT32, plan.divergence)
        return plan

    def _identify(self) -> str:
        """What costs depend on, in one number."""
        text = self._text
        data = {
            "model": fingerprint(self._source),
            "text": [text.sha256, text.n_chunks, text.n_ctx],
            "rounding": self._rounding,
            "types": {name: [kind.name for kind in kinds] for name, kinds in self.candidates.items()},
        }
        return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _open_lines(source: TensorSource, spec: ForwardSpec, template: Plan, wishes: Wishes) -> dict[str, list[GGMLType]]:
    """The tensors whose types are chosen, with what they may become, by their name in the source."""
    excluded = engine_lacks(wishes.engine) if wishes.engine else frozenset[GGMLType]()
    found = {}
    for line in template:
        named = line.reason in ("tensor type", "output tensor type", "token embedding type")
        calibrated = line.source_name in spec.matrices
        if line.is_copy or named or not (calibrated or line.source_name == spec.embedding):
            continue
        kinds = candidates(
            replace(line.info, type=line.source_type),
            calibrated=calibrated,
            minimum=wishes.minimum,
            maximum=wishes.maximum,
            excluded=excluded,
        )
        if not kinds:
            raise QuantkitError(
                f"{source.label}: no type is left for {line.info.name}, whose rows have {line.info.n_per_row} "
                "weights: allow smaller or larger types"
            )
        found[line.source_name] = kinds
    if not found:
        raise QuantkitError(f"{source.label}: no tensor is left whose type could be chosen")
    return found


def _file_size(source: TensorSource, template: Plan, target: Target, options: QuantizeOptions) -> int:
    """The bytes that the file may have."""
    if target.like is not None:
        return plan_quantize(source, target.like, options).file_size
    if target.nbytes:
        return target.nbytes
    return template.file_size - template.nbytes + int(target.bits * template.n_elements / 8)


def _set(line: PlannedTensor, kind: GGMLType, costs: TensorCosts | None) -> None:
    line.info = replace(line.info, type=kind)
    line.needs_weights = False
    line.reason = "" if costs is None else f"{costs.divergence.get(kind, 0.0):.2g} nats"


def _label(source: TensorSource, size: int, options: QuantizeOptions) -> str:
    """The known file type that comes closest to `size` bytes."""
    sizes = {name: plan_quantize(source, name, options).file_size for name in _LABELS}
    return min(sizes, key=lambda name: abs(sizes[name] - size))


def fingerprint(source: TensorSource) -> str:
    """What tells models apart: a digest of the tensors' names and shapes and of the first row of each, as float32.

    A checkpoint and a GGUF file of the same values have the same.
    """
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        info = source.tensors[name]
        digest.update(f"{name}{list(info.shape)}".encode())
        if info.n_elements and info.type in blocks.encodable():
            digest.update(blocks.decode(np.ascontiguousarray(source.read(name, 0, 1)), info.type).tobytes())
    return digest.hexdigest()


# -- plans in files


def save_plan(plan: ChosenPlan, source: TensorSource, target: str | os.PathLike[str] | OutputFile) -> None:
    """Write `plan` as JSON, to be edited and run again: the types of tensors, and what the choice was made by."""
    keys = ("text", "sha256", "chunks", "context_length")
    data = {
        "quantkit_plan": _VERSION,
        "model": fingerprint(source),
        "type": plan.name,
        "target": plan.target,
        "rounding": plan.rounding,
        "calibration": {key: plan.metadata[f"quantkit.calibration.{key}"].value for key in keys},
        "size": plan.file_size,
        "divergence": plan.divergence,
        "tensors": {line.info.name: line.info.type.name for line in plan},
        "costs": {name: _as_json(each) for name, each in plan.costs.items()},
    }
    write_whole(target, json.dumps(data, indent=1))


def load_plan(path: str | os.PathLike[str], source: TensorSource, options: QuantizeOptions | None = None) -> ChosenPlan:
    """Read a plan that `save_plan` wrote, for the model `source`; `options` are as for `plan_all`.

    Raises QuantkitError for a file that is none, a plan for another model, and types that tensors cannot have.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError("no plan is as large")
        data = json.loads(text.decode("utf-8"))
        version, model, name = int(data["quantkit_plan"]), str(data["model"]), str(data["type"])
        target, rounding = str(data["target"]), str(data["rounding"])
        tensors = {str(key): str(kind) for key, kind in data["tensors"].items()}
        costs = {str(key): _costs(source, str(key), entry) for key, entry in data["costs"].items()}
        Target.parse(target)
        check_rounding(rounding)
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror or error}") from None
    except QuantkitError as error:
        raise QuantkitError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise QuantkitError(f"{path}: is not a plan that quantkit has written, or was damaged") from None
    if version != _VERSION:
        raise QuantkitError(f"{path}: a plan of version {version}, but this quantkit reads version {_VERSION}")
    if model != fingerprint(source):
        raise QuantkitError(f"{path}: is a plan for another model than {source.label}")
    base = plan_quantize(source, name, replace(options or QuantizeOptions(), calibrated=True, imatrix=None))
    plan = ChosenPlan(base.name, base.metadata, base.tensors, base.split, target, rounding, costs)
    lines = {line.info.name: line for line in plan}
    if lines.keys() != tensors.keys():
        other = next(iter(lines.keys() ^ tensors.keys()))
        raise QuantkitError(f"{path}: its tensors are not those of {source.label}: {other!r} is in one of them alone")
    for each, kind_name in tensors.items():
        kind, line = GGMLType.parse(kind_name), lines[each]
        if kind != line.info.type and (len(line.info.shape) == 1 or kind not in blocks.encodable()):
            raise QuantkitError(f"{path}: {each!r} is {line.info.type.name}, and cannot become {kind.name}")
        if line.info.n_per_row % kind.block_size:
            raise QuantkitError(
                f"{path}: {each!r} has rows of {line.info.n_per_row} weights, which {kind.name} does not divide"
            )
        if kind != line.info.type or line.source_name in costs:
            _set(line, kind, costs.get(line.source_name))
    return plan


def _as_json(costs: TensorCosts) -> dict[str, Any]:
    return {"sensitivity": costs.sensitivity, "losses": {kind.name: loss for kind, loss in costs.losses.items()}}


def _costs(source: TensorSource, name: str, entry: Mapping[str, Any]) -> TensorCosts:
    info = source.tensors.get(name)
    losses = {GGMLType[str(kind)]: float(loss) for kind, loss in entry["losses"].items()}
    sensitivity = float(entry["sensitivity"])
    if not all(0 <= value < math.inf for value in (sensitivity, *losses.values())):
        raise ValueError("costs are numbers from 0 on")
    nbytes = {} if info is None else {kind: kind.nbytes(info.shape) for kind in losses}
    return TensorCosts(sensitivity, losses, nbytes)
