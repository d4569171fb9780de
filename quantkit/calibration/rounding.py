"""Quantizing with error feedback: each layer's moments, its tensors rounded by them, then the files.

One pass over the layers serves all files. What feedback cannot round is rounded to the nearest: with the importance of
the columns, as the moments' diagonal has it, and where there are no moments without. Embeddings have none but those of
gradients.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.calibration.curvature import DAMPING
from quantkit.calibration.feedback import OUTPUT_DAMPING, SUPPORTED
from quantkit.calibration.gradients import coupled, embeds, gradient_moments
from quantkit.calibration.moments import LayerMoments, Moments, MomentsPass, SharedInput
from quantkit.calibration.progress import Step
from quantkit.calibration.rounder import rounder
from quantkit.calibration.roundings import check_rounding
from quantkit.calibration.spool import Spool, TensorFiles
from quantkit.calibration.text import CalibrationText
from quantkit.errors import QuantkitError
from quantkit.evaluate.activations import Activations
from quantkit.evaluate.inputs import on_host
from quantkit.evaluate.model import Model
from quantkit.evaluate.refusals import require_predictions
from quantkit.formats.atomic import OutputGroup
from quantkit.formats.gguf import TensorInfo, encode_header
from quantkit.formats.unfinished import WorkDirectory
from quantkit.machine import default_threads
from quantkit.pipeline.execute import FLOAT_TYPES, execute
from quantkit.pipeline.plan import Plan
from quantkit.sources.overlay import Overlay
from quantkit.sources.source import TensorSource

if TYPE_CHECKING:
    from quantkit.architectures.forward import ForwardSpec
    from quantkit.pipeline.cluster import Cluster

# What a spool written by another version of the rounding must not be taken for.
_VERSION = 5
# Weights of a tensor that are decoded and rounded together.
_SLAB = 1 << 24
# Weights of a tensor that is rounded beside others.
_SMALL = 1 << 21
# Rows that a thread rounds to the nearest at a time.
_ROWS = 64
# Units of work that rounding a weight costs for each column of its row: passes over the second moments.
_ROUNDING = 6.0


@dataclass(frozen=True)
class RoundedTensor:
    """How a tensor came out: its type, and its loss, the mean squared error of its output over the text, in all rows.

    For an embedding it is that of what is looked up times the gradients by it. Tokens count as
    `evaluate.inputs.Balance` weighs them. `plain_loss` is that of rounding to the nearest with the importance of the
    columns. Losses are None where feedback was not used; `note` says why, or what else is to be said.
    """

    name: str
    type: str
    loss: float | None
    plain_loss: float | None
    note: str


def execute_with_feedback(
    model: Model,
    outputs: Sequence[tuple[Plan, Path]],
    text: CalibrationText,
    *,
    rounding: str = "gptq",
    damping: float = DAMPING,
    work: WorkDirectory | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    max_buffer_size: int | None = None,
    progress: Callable[[Step], None] | None = None,
    group: OutputGroup | None = None,
    cluster: Cluster | None = None,
) -> list[list[RoundedTensor]]:
    """Write every (plan, path) of `outputs`, in one pass of `text` through `model`; says how the tensors came out.

    `rounding` is gptq, or yaqa, which takes gradients through the model first, see `gradients`: they say which tokens
    count, and which rows may err together. `damping` is added to
    the diagonal of the moments, as a share of its mean. Finished layers are kept in `work`, by default a directory
    beside the first output, until all files are written. `group` is as for `execute`. With `cluster`, its workers round
    the layers, of a model that they can open as this one was; for gptq alone.
    Raises QuantkitError as `pipeline.execute` does, for a text that is too short, for activations that are not finite,
    when the work directory is in the way, or another run's, and for a model that the backend takes no gradients
    through.
    """
    if rounding == "yaqa":
        require_predictions(model.spec, model.source.label, "rounding yaqa")
    looked_up = rounding == "yaqa" and embeds(model.spec)
    wanted = wanted_types(model.spec, outputs, looked_up)
    run = LayerRounding(model, wanted, text, rounding, damping, threads, allow_nonfinite, progress)
    if cluster is not None and rounding != "gptq":
        raise QuantkitError(
            f"rounding {rounding} takes gradients through all layers, which are not spread over workers"
        )
    text.require(max((run.infos[name].n_per_row for name in run.wanted), default=0))
    with ExitStack() as stack:
        group = group or stack.enter_context(OutputGroup())
        return _write(run, outputs, group, work or WorkDirectory(Path(outputs[0][1])), max_buffer_size, cluster)


def _write(
    run: LayerRounding,
    outputs: Sequence[tuple[Plan, Path]],
    group: OutputGroup,
    work: WorkDirectory,
    max_buffer_size: int | None,
    cluster: Cluster | None,
) -> list[list[RoundedTensor]]:
    group.protect(run.source.files)
    for plan, path in outputs:
        for name, _, _ in plan.files(path):
            group.check(name)
    spool = Spool(work, run.digest)
    if cluster is None:
        run.round_layers(spool)
    else:
        run.round_layers_on(cluster, spool)
    reports = []
    for plan, path in outputs:
        done = {
            line.source_name: (line.info.type, spool.reader(run.number[line.source_name], line.info, line.info.type))
            for line in plan
            if (line.source_name, line.info.type) in run.rounded
        }
        rest = [
            replace(line, source_type=line.info.type, needs_weights=False) if line.source_name in done else line
            for line in plan
        ]
        execute(
            Overlay(run.source, done),
            [(replace(plan, tensors=rest), path)],
            threads=run.threads,
            allow_nonfinite=run.allow_nonfinite,
            max_buffer_size=max_buffer_size,
            group=group,
        )
        reports.append(run.report(plan))
    group.then(work.remove)
    return reports


def wanted_types(spec: ForwardSpec, outputs: Sequence[tuple[Plan, Path]], embedding: bool) -> dict[str, list[GGMLType]]:
    """The types that each tensor with moments becomes, the embedding among them or not."""
    wanted: dict[str, list[GGMLType]] = {}
    inside = spec.matrices | ({spec.embedding} if embedding else frozenset())
    for plan, _ in outputs:
        for line in plan:
            if line.source_name in inside and not line.is_copy and line.info.type.is_quantized:
                kinds = wanted.setdefault(line.source_name, [])
                if line.info.type not in kinds:
                    kinds.append(line.info.type)
    return wanted


class LayerRounding:
    """The rounding of layers: what one call of `execute_with_feedback` knows, and a worker that does a part of it.

    `wanted` are the types that each tensor with moments becomes.
    """

    def __init__(
        self,
        model: Model,
        wanted: Mapping[str, Sequence[GGMLType]],
        text: CalibrationText,
        rounding: str,
        damping: float,
        threads: int | None,
        allow_nonfinite: bool,
        progress: Callable[[Step], None] | None = None,
    ) -> None:
        check_rounding(rounding)
        self._model, self._text, self._rounding, self._damping = model, text, rounding, damping
        self.threads, self.allow_nonfinite, self._progress = threads, allow_nonfinite, progress
        self._rounder = rounder(model)
        self.source: TensorSource = model.source
        self.infos: Mapping[str, TensorInfo] = self.source.tensors
        self.number = {name: at for at, name in enumerate(self.infos)}
        self.wanted = wanted
        # Those of them whose outputs are coupled by moments of gradients.
        self._by_gradients = rounding == "yaqa" and bool(wanted)
        self._coupled = coupled(model.spec) & self.wanted.keys() if self._by_gradients else frozenset[str]()
        self.rounded: dict[tuple[str, GGMLType], RoundedTensor] = {}
        self._layer, self._done = 0, 0.0
        self._total = self._work()

    def round_layers(self, spool: Spool) -> None:
        """Round every tensor that has moments into `spool`, layer by layer."""
        model, tokens = self._model, self._text.tokens
        for layer in spool.layers:
            self._remember(layer)
        done, n_layer = len(spool.layers), len(model.spec.layers)
        if done > n_layer:
            return
        if self._by_gradients:
            self._take_gradients(spool)
        shape = *tokens.shape, model.spec.width
        activations = Activations(shape, model.memory // 4, spool.path, model.staging)
        try:
            if spool.start:
                spool.load_activations(activations.values)
            lengths = partial(self._lengths, spool) if self._by_gradients else None
            steps = MomentsPass(model, tokens, self.wanted, activations.values, spool.start, self._through, lengths)
            while steps.next < done:
                self._layer = steps.next
                steps.skip()
            while steps.next <= n_layer:
                self._layer = steps.next
                layer = steps.gather()
                if layer.index == n_layer:
                    layer.inputs.extend(self._looked_up(spool))
                spool.finish(self.round_layer(layer, spool))
                if steps.next <= n_layer:
                    spool.keep_activations(activations.values)
        finally:
            activations.close()

    def round_layers_on(self, cluster: Cluster, spool: Spool) -> None:
        """The same as `round_layers` by the workers of `cluster`, to the last bit."""
        # What workers run is told of in terms of this module.
        from quantkit.calibration.apart import Job, round_apart

        for layer in spool.layers:
            self._remember(layer)
        model, apart = self._model, dict[int, dict[str, Any]]()

        def job(source: bytes) -> Job:
            return Job(
                source, model.compute, self._text, self.wanted, self._damping, self.allow_nonfinite,
                spool.path.absolute(), model.spec.width,
            )  # fmt: skip

        def finish(layer: int, record: dict[str, Any]) -> None:
            apart[layer] = record
            while (following := len(spool.layers)) in apart:
                self._remember(apart[following])
                spool.finish(apart.pop(following))
            self._layer = layer
            self._done += self._text.tokens.size * self._per_token.get(layer, 0.0)
            for tensor in record["tensors"]:
                info = self.infos[tensor["name"]]
                self._done += _ROUNDING * info.n_elements * info.n_per_row
            self._tell(f"blk.{layer}" if layer < len(model.spec.layers) else model.spec.output.weight)

        round_apart(cluster, self.source, job, len(model.spec.layers), len(spool.layers), finish)

    def report(self, plan: Plan) -> list[RoundedTensor]:
        """How the tensors of `plan` came out that were to be rounded at all."""
        lines = []
        for line in plan:
            kind = line.info.type
            if (line.source_name, kind) in self.rounded:
                lines.append(self.rounded[line.source_name, kind])
            elif not line.is_copy and kind.is_quantized:
                lines.append(RoundedTensor(line.info.name, kind.name, None, None, "no moments"))
        return lines

    # -- one layer

    def round_layer(self, layer: LayerMoments, files: TensorFiles) -> dict[str, object]:
        """Round the tensors of a layer into `files`; what to record of it."""
        model, results = self._model, []
        for shared in layer.inputs:
            # Moments of gradients are only roughly those of a token that the text does not have.
            damping = self._damping + (OUTPUT_DAMPING if model.spec.embedding in shared.names else 0.0)
            curvatures = [self._curvature(shared, moments, damping) for moments in shared.moments]
            tasks = [(name, kind) for name in shared.names for kind in self.wanted.get(name, ())]
            count = self.threads or default_threads()
            # Large tensors one by one: their rows are enough for all threads, and their memory is wanted only once.
            small = all(self.infos[name].n_elements <= _SMALL for name, _ in tasks)
            together = min(count, len(tasks)) if small and self._rounder.shared else 1

            def work(
                task: tuple[str, GGMLType],
                shared: SharedInput = shared,
                curvatures: list[Any] = curvatures,
                threads: int = max(1, count // max(1, together)),
            ) -> RoundedTensor:
                name, kind = task
                coupling = files.load_moments(self.number[name]) if name in self._coupled else None
                target = files.file(self.number[name], kind)
                # A worker that was given up may still be writing the same file.
                temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
                with open(temporary, "wb") as file:
                    result = self._round(name, kind, shared, curvatures, coupling, threads, file)
                temporary.replace(target)
                return result

            with ThreadPoolExecutor(max(1, together)) as pool:
                if tasks:
                    self._tell(tasks[0][0])
                for (name, kind), result in zip(tasks, pool.map(work, tasks), strict=True):
                    self.rounded[name, kind] = result
                    results.append(result)
                    self._done += _ROUNDING * self.infos[name].n_elements * self.infos[name].n_per_row
                    self._tell(name)
            for name in shared.names:
                self.source.release(name)
        return {"layer": layer.index, "tensors": [asdict(result) for result in results]}

    def _take_gradients(self, spool: Spool) -> None:
        """Keep the moments and lengths of gradients in `spool`, unless they are there."""
        if spool.has_moments:
            return
        measured = []

        def through(layer: int, tokens: int) -> None:
            self._layer = layer
            self._through(tokens)

        def keep_lengths(name: str, lengths: np.ndarray) -> None:
            measured.append(self.number[name])
            spool.keep_lengths(measured[-1], lengths)

        gradient_moments(
            self._model,
            self._text.tokens,
            self._coupled | ({self._model.spec.embedding} & self.wanted.keys()),
            lambda name, moments: spool.keep_moments(self.number[name], moments),
            keep_lengths,
            directory=spool.path,
            progress=through,
        )
        spool.finish_moments(measured)

    def _lengths(self, spool: Spool, name: str) -> np.ndarray | None:
        return spool.load_lengths(self.number[name], self._text.tokens.size)

    def _remember(self, layer: Mapping[str, object]) -> None:
        tensors = layer["tensors"]
        assert isinstance(tensors, list)
        for entry in tensors:
            result = RoundedTensor(**entry)
            self.rounded[result.name, GGMLType.parse(result.type)] = result

    def _looked_up(self, spool: Spool) -> list[SharedInput]:
        """The embedding where it is wanted: its rows are rounded by the moments of gradients by what is looked up."""
        name = self._model.spec.embedding
        if name not in self.wanted:
            return []
        mean = spool.load_moments(self.number[name])
        return [SharedInput((name,), [Moments(mean.astype(np.float64), self._text.tokens.size)])]

    def _curvature(self, shared: SharedInput, moments: Moments | None, damping: float) -> Any:
        if moments is None:
            return None
        try:
            return self._rounder.curvature(moments.mean, damping)
        except QuantkitError as error:
            raise QuantkitError(f"{self.source.label}: {shared.names[0]}: {error}") from None

    def _round(
        self,
        name: str,
        kind: GGMLType,
        shared: SharedInput,
        curvatures: list[Any],
        coupling: np.ndarray | None,
        threads: int,
        file: BinaryIO,
    ) -> RoundedTensor:
        """Round tensor `name` to `kind`, matrix by matrix, into `file`; `coupling` are moments of its outputs."""
        info, n_matrices = self.infos[name], len(shared.moments)
        per_matrix = info.n_rows // n_matrices
        step = max(1, _SLAB // max(1, info.n_per_row), self._rounder.rows)
        feedback = kind in SUPPORTED
        loss = plain_loss = 0.0
        unseen = 0
        for matrix, moments in enumerate(shared.moments):
            curvature = curvatures[matrix] if feedback else None
            unseen += moments is None
            importance = np.ones(info.n_per_row) if moments is None else on_host(moments.mean.diagonal())
            end = (matrix + 1) * per_matrix
            for start in range(matrix * per_matrix, end, step):
                stop = min(end, start + step)
                rows = self._rows(info, start, stop)
                if curvature is None:
                    self._to_nearest(rows, kind, importance.astype(np.float32)).tofile(file)
                    continue
                own = None if coupling is None else coupling[start:stop, start:stop]
                result = self._rounder.round(rows, curvature, kind, outputs=own, threads=threads)
                result.data.tofile(file)
                loss, plain_loss = loss + float(result.loss.sum()), plain_loss + float(result.plain_loss.sum())
        if not feedback:
            return RoundedTensor(name, kind.name, None, None, f"no feedback for {kind.name}")
        note = self._rounder.note(kind)
        if unseen:
            note = f"{unseen} of {n_matrices} experts saw no token"
        return RoundedTensor(name, kind.name, loss, plain_loss, note)

    def _to_nearest(self, rows: np.ndarray, kind: GGMLType, importance: np.ndarray) -> np.ndarray:
        encoded = np.empty((len(rows), kind.row_nbytes(rows.shape[1])), np.uint8)

        def encode(start: int) -> None:
            part = slice(start, start + _ROWS)
            blocks.encode(rows[part], kind, importance, encoded[part])

        for _ in self._model.threads.map(encode, range(0, len(rows), _ROWS)):
            pass
        return encoded

    def _rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        rows = blocks.decode(self.source.read(info.name, start, stop), info.type)
        if info.type in FLOAT_TYPES and not self.allow_nonfinite and (at := blocks.first_nonfinite(rows)) >= 0:
            row, column = divmod(at, info.n_per_row)
            raise QuantkitError(
                f"{self.source.label}: tensor {info.name!r} holds {rows[row, column]} at row {start + row}, column "
                f"{column}; the checkpoint is damaged"
            )
        return rows

    # -- progress and identity

    def _tell(self, tensor: str) -> None:
        if self._progress is not None:
            n_layer = len(self._model.spec.layers)
            self._progress(Step("quantize", self._layer, n_layer, tensor, min(self._done, self._total), self._total))

    def _through(self, tokens: int) -> None:
        self._done += tokens * self._per_token.get(self._layer, 0.0)
        self._tell("")

    def _work(self) -> float:
        """Units of work in all, of about a multiplication and an addition each."""
        spec, n_tokens = self._model.spec, self._text.tokens.size
        self._per_token = {}
        total = 0.0
        for index, layer in enumerate(spec.layers):
            cost = 0.0
            for names in layer.inputs:
                of = [self.infos[name] for name in names if name in self.infos]
                cost += sum(info.n_elements for info in of)
                if any(name in self.wanted for name in names):
                    cost += of[0].n_per_row ** 2 / 2
            self._per_token[index] = cost
            total += n_tokens * cost
            if self._by_gradients:
                # Up twice, and down.
                total += 4 * n_tokens * cost
        for name, kinds in self.wanted.items():
            total += _ROUNDING * len(kinds) * self.infos[name].n_elements * self.infos[name].n_per_row
        return total

    @cached_property
    def digest(self) -> str:
        """What the rounded tensors depend on, in one number."""
        source, digest = self.source, hashlib.sha256()
        infos = list(self.infos.values())
        digest.update(encode_header(source.metadata, infos, source.metadata.alignment))
        for info in infos:
            if info.n_rows:
                digest.update(np.ascontiguousarray(source.read(info.name, 0, 1)).tobytes())
                digest.update(np.ascontiguousarray(source.read(info.name, info.n_rows - 1)).tobytes())
        options = {
            "version": _VERSION,
            "text": self._text.sha256,
            "chunks": [self._text.n_chunks, self._text.n_ctx],
            "rounding": self._rounding,
            "damping": self._damping,
            "computed": [self._model.backend, self._model.precision],
            "types": {name: [kind.name for kind in kinds] for name, kinds in self.wanted.items()},
        }
        digest.update(json.dumps(options).encode())
        return digest.hexdigest()
