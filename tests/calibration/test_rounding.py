"""Files rounded with error feedback: what they hold, that they are the same each time, and that they lose less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference, requires_torch
from make_checkpoints import make_checkpoint
from support.families import OTHER_MIXERS
from support.llama_reference import llama_logits, llama_quantize
from support.tiny import FAMILIES, N_VOCAB, relative_error, write_gguf

import quantkit
from quantkit.blocks import decode
from quantkit.blocks.types import GGMLType
from quantkit.calibration import spool
from quantkit.calibration.gradients import coupled, gradient_moments
from quantkit.calibration.moments import MomentsPass, batches, shrunk
from quantkit.calibration.progress import Step
from quantkit.calibration.rounding import RoundedTensor, execute_with_feedback
from quantkit.calibration.text import CalibrationText, least_tokens
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.inputs import ALIKE, InputSum
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.unfinished import WorkDirectory
from quantkit.pipeline.run import plan
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource, TensorSource

CALIBRATION_FILE = ROOT / "fixtures" / "tinylm-calib.txt"
CALIBRATION = CALIBRATION_FILE.read_text("utf-8")
TEST = (ROOT / "fixtures" / "tinylm-test.txt").read_text("utf-8")
SOME = Chunking(n_ctx=256, chunks=80)
TYPES = ("Q4_K_M", "IQ2_XS")


class StopError(Exception):
    """What a test stops a run with."""


def stop_in(layer: int) -> Callable[[Step], None]:
    """A progress that stops a run in the middle of a layer."""

    def progress(step: Step) -> None:
        assert 0 <= step.done <= step.total
        if step.layer == layer and step.tensor.endswith("ffn_up.weight"):
            raise StopError

    return progress


def rounded(
    source: TensorSource, folder: Path, types: tuple[str, ...], compute: Compute | None = None, resume: bool = False,
    model: Model | None = None, **options: Any,
) -> list[list[RoundedTensor]]:  # fmt: skip
    """Write `types` with feedback into `folder`, named after them, by `model` if there is one already."""
    folder.mkdir(exist_ok=True)
    text = CalibrationText.of(source, CALIBRATION, SOME)
    outputs = [(plan(source, name, calibrated=True), folder / f"{name}.gguf") for name in types]
    work = WorkDirectory(outputs[0][1], resume)
    return execute_with_feedback(model or load(source, compute, keep=False), outputs, text, work=work, **options)


def assert_same_files(folder: Path, other: Path, types: tuple[str, ...]) -> None:
    """`folder` holds the files of `types`, byte for byte those in `other`, and nothing else."""
    for name in types:
        assert (folder / f"{name}.gguf").read_bytes() == (other / f"{name}.gguf").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gguf" for name in types)


@pytest.fixture(scope="module")
def tinylm() -> CheckpointSource:
    return CheckpointSource(TINYLM)


@pytest.fixture(scope="module")
def files(tinylm: CheckpointSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    rounded(tinylm, folder, TYPES, Compute(threads=2))
    return folder


def test_loses_less_than_with_an_importance_matrix(tinylm: CheckpointSource, files: Path, tmp_path: Path) -> None:
    matrix = quantkit.importance_matrix(tinylm, CALIBRATION, chunking=SOME)
    plain = tmp_path / "plain.gguf"
    quantkit.execute(tinylm, [(plan(tinylm, "Q4_K_M", imatrix=matrix), plain)])
    few = Chunking(n_ctx=256, chunks=40)
    losses = [
        quantkit.divergence(GGUFSource(path), tinylm, TEST, chunking=few).kld.value
        for path in (files / "Q4_K_M.gguf", plain)
    ]
    assert losses[0] < 0.92 * losses[1]
    ours, theirs = GGUFSource(files / "Q4_K_M.gguf"), GGUFSource(plain)
    assert {name: info.type for name, info in ours.tensors.items()} == {n: i.type for n, i in theirs.tensors.items()}
    np.testing.assert_array_equal(ours.read("token_embd.weight"), theirs.read("token_embd.weight"))


@pytest.mark.parametrize("change", ["threads", "memory", "alone", "again"])
def test_the_same_bytes_whatever_the_machine(
    tinylm: CheckpointSource, files: Path, tmp_path: Path, change: str
) -> None:
    compute = {"threads": Compute(threads=1), "memory": Compute(threads=3, memory=0)}.get(change)
    types = TYPES[:1] if change == "alone" else TYPES
    rounded(tinylm, tmp_path, types, compute)
    assert_same_files(tmp_path, files, types)


@requires_torch
def test_torch_rounds_as_well(tinylm: CheckpointSource, files: Path, tmp_path: Path) -> None:
    rounded(tinylm, tmp_path, ("Q4_K_M",), Compute(backend="torch"))
    few = Chunking(n_ctx=256, chunks=20)
    ours, numpys = (
        quantkit.divergence(GGUFSource(path), tinylm, TEST, chunking=few).kld.value
        for path in (tmp_path / "Q4_K_M.gguf", files / "Q4_K_M.gguf")
    )
    assert ours == pytest.approx(numpys, rel=0.05)


@requires_reference
def test_llama_cpp_reads_what_we_read(tinylm: CheckpointSource, files: Path, tmp_path: Path) -> None:
    """llama.cpp dequantizes our file and runs it, so that it does not round activations: its logits are ours."""
    tokens = np.random.default_rng(3).integers(0, 2000, 60).astype(np.int32)
    for name in TYPES:
        path, wide = files / f"{name}.gguf", tmp_path / f"{name}-F32.gguf"
        assert llama_quantize(path, wide, "F32", allow_requantize=True) == 0
        ours = load(GGUFSource(path)).logits(tokens[None])[0]
        assert relative_error(ours, llama_logits(wide, tokens.tolist())) < 2e-3
        direct = llama_logits(path, tokens.tolist())
        assert (direct.argmax(1) == ours.argmax(1)).mean() > 0.8


def test_a_stopped_run_goes_on_to_the_same_bytes(tinylm: CheckpointSource, files: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        rounded(tinylm, tmp_path, TYPES, progress=stop_in(1))
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.name == "Q4_K_M.gguf.unfinished"
    with pytest.raises(QuantkitError, match="holds the work of a run that was stopped"):
        rounded(tinylm, tmp_path, TYPES)
    with pytest.raises(QuantkitError, match=r"belongs to a run with another model, text, types or options"):
        rounded(tinylm, tmp_path, ("Q4_K_M", "Q5_K_M"), resume=True)
    with pytest.raises(StopError):
        rounded(tinylm, tmp_path, TYPES, resume=True, progress=stop_in(2))
    seen = set()
    rounded(tinylm, tmp_path, TYPES, resume=True, progress=lambda step: seen.add(step.tensor[:6]))
    assert "blk.2." in seen
    assert not {"blk.0.", "blk.1."} & seen
    assert_same_files(tmp_path, files, TYPES)


def test_a_run_goes_on_from_kept_activations(
    tinylm: CheckpointSource, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_EVERY", 0.0)
    with pytest.raises(StopError):
        rounded(tinylm, tmp_path, TYPES, progress=stop_in(2))
    kept = tmp_path / "Q4_K_M.gguf.unfinished" / "activations-2.f32"
    assert kept.stat().st_size == 4 * SOME.n_ctx * 80 * 256

    def skip(self: MomentsPass) -> None:
        raise AssertionError(f"layer {self.next} runs again")

    monkeypatch.setattr(MomentsPass, "skip", skip)
    rounded(tinylm, tmp_path, TYPES, resume=True)
    assert_same_files(tmp_path, files, TYPES)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "progress.json").write_text("{"), r"progress\.json: missing or damaged"),
        (lambda folder: (folder / "progress.json").write_text('{"layers": 3}'), r"progress\.json: missing or damaged"),
        (lambda folder: (folder / "quantkit-unfinished").unlink(), "is in the way"),
        (lambda folder: [file.write_bytes(b"x") for file in folder.glob("*.Q4_K")], "missing or damaged"),
    ],
)
def test_a_damaged_record(
    tinylm: CheckpointSource, tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    with pytest.raises(StopError):
        rounded(tinylm, tmp_path, ("Q4_K_M",), progress=stop_in(1))
    damage(tmp_path / "Q4_K_M.gguf.unfinished")
    with pytest.raises(QuantkitError, match=problem):
        rounded(tinylm, tmp_path, ("Q4_K_M",), resume=True)
    assert not (tmp_path / "Q4_K_M.gguf").exists()


def test_experts_that_saw_few_tokens_or_none(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    source = GGUFSource(write_gguf(tmp_path / "experts.gguf", family.metadata(), family.weights(7)))
    # One token again and again is routed to the same experts at most positions: some see none.
    text = CalibrationText.of(source, np.full(96, 17, np.int32), Chunking(n_ctx=24))
    path = tmp_path / "q.gguf"
    (report,) = execute_with_feedback(load(source, keep=False), [(plan(source, "Q8_0", calibrated=True), path)], text)
    unseen = {each.name: int(each.note.split()[0]) for each in report if "experts saw no token" in each.note}
    assert unseen
    assert all("_exps" in name and 0 < n < 8 for name, n in unseen.items())
    # What saw no token is rounded as without any calibration.
    plain = tmp_path / "plain.gguf"
    quantkit.execute(source, [(plan(source, "Q8_0"), plain)])
    name, count = next(iter(unseen.items()))
    a, b = (GGUFSource(each).read(name).reshape(8, -1) for each in (path, plain))
    assert (a == b).all(axis=1).sum() >= count
    before = decode(source.read(name), source.tensors[name].type)
    assert relative_error(decode(GGUFSource(path).read(name), GGMLType.Q8_0), before) < 0.01


def test_moments_of_few_tokens_are_drawn_towards_those_of_all() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((4, 32))
    pooled = np.diag(rng.uniform(1, 2, 32))
    mean = rows.T @ rows / 4
    few = shrunk(InputSum(rows.T @ rows, 4), pooled)
    assert np.trace(few.mean) == pytest.approx(np.trace(mean))
    assert np.linalg.matrix_rank(mean) == 4
    assert np.linalg.matrix_rank(few.mean) == 32
    many = shrunk(InputSum(rows.T @ rows * 1e6, 4_000_000), pooled)
    np.testing.assert_allclose(many.mean, mean, atol=1e-4)
    assert not shrunk(InputSum(np.zeros((32, 32)), 5), pooled).mean.any()


@pytest.mark.parametrize("rounding", ["gptq", "yaqa"])
def test_what_a_file_says_of_how_it_was_made(tinylm: CheckpointSource, tmp_path: Path, rounding: str) -> None:
    (path,) = quantkit.quantize(
        TINYLM, tmp_path, type="Q4_K_M", rounding=rounding, calibration=CALIBRATION_FILE, chunking=SOME
    )
    assert path.name.endswith(f"-{rounding}-Q4_K_M.gguf")
    metadata = GGUFSource(path).metadata
    assert {key: metadata[key].value for key in metadata if key.startswith("quantkit.")} == {
        "quantkit.rounding": rounding,
        "quantkit.calibration.text": "tinylm-calib.txt",
        "quantkit.calibration.sha256": CalibrationText.of(tinylm, CALIBRATION).sha256,
        "quantkit.calibration.chunks": 80,
        "quantkit.calibration.context_length": 256,
    }
    assert metadata.integer("general.file_type") == 15


def test_a_calibration_text_takes_the_place_of_an_importance_matrix(tmp_path: Path) -> None:
    matrix = quantkit.importance_matrix(TINYLM, CALIBRATION, chunking=SOME, dataset=str(CALIBRATION_FILE))
    (a,) = quantkit.quantize(TINYLM, tmp_path / "a.gguf", type="IQ2_XS", imatrix=matrix)
    (b,) = quantkit.quantize(TINYLM, tmp_path / "b.gguf", type="IQ2_XS", calibration=CALIBRATION_FILE, chunking=SOME)
    assert a.read_bytes() == b.read_bytes()


def test_texts_too_short(tinylm: CheckpointSource, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"calib\.txt: has \d tokens, which do not fill a chunk of 64"):
        CalibrationText.of(tinylm, "a few words", Chunking(n_ctx=64), "calib.txt")
    short = CalibrationText.of(tinylm, CALIBRATION, Chunking(n_ctx=16, chunks=2), "calib.txt")
    outputs = [(plan(tinylm, "Q4_K_M", calibrated=True), tmp_path / "q.gguf")]
    with pytest.raises(QuantkitError, match=r"calib\.txt: 32 tokens are too few .* 768 weights: \d+ are needed"):
        execute_with_feedback(load(tinylm, keep=False), outputs, short)
    assert not list(tmp_path.iterdir())
    assert least_tokens(768) < 768


@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")
def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    weights = family.weights(7)
    weights["blk.1.ffn_norm.weight"][:] = 1e38
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), weights))
    text = CalibrationText.of(source, np.arange(256) % N_VOCAB, Chunking(n_ctx=64))
    with pytest.raises(QuantkitError, match=r"the inputs of blk\.1\..* are not finite"):
        execute_with_feedback(
            load(source, keep=False), [(plan(source, "Q8_0", calibrated=True), tmp_path / "q.gguf")], text
        )


def test_an_unknown_rounding_and_a_missing_text() -> None:
    with pytest.raises(QuantkitError, match="no rounding 'best': use nearest, gptq or yaqa"):
        quantkit.quantize(TINYLM, type="Q4_K_M", rounding="best")
    with pytest.raises(QuantkitError, match="rounding gptq needs a calibration text"):
        quantkit.quantize(TINYLM, type="Q4_K_M", rounding="gptq")


@pytest.mark.parametrize("n_ctx", [4, 64, 512, 700, 20000])
def test_batches_hold_every_chunk_once(n_ctx: int) -> None:
    for n_chunks in (1, 2, 7, 300):
        cut = batches(n_chunks, n_ctx)
        assert [i for part in cut for i in range(part.start, part.stop)] == list(range(n_chunks))
        assert all((part.stop - part.start) * n_ctx <= max(8192, n_ctx) for part in cut)


def test_the_report_tells_what_was_not_rounded_with_feedback(tinylm: CheckpointSource, tmp_path: Path) -> None:
    reports = rounded(tinylm, tmp_path, ("Q4_K_M", "TQ2_0"))
    for each in [each for report in reports for each in report]:
        if each.note:
            assert each.loss is None
        else:
            assert each.loss is not None and each.plain_loss is not None
            assert 0 < each.loss < each.plain_loss
    notes = [{each.name: each.note for each in report if each.note} for report in reports]
    assert notes[0] == {"token_embd.weight": "no moments"}
    assert "no feedback for TQ2_0" in notes[1].values()


@pytest.fixture(scope="module")
def coupled_files(tinylm: CheckpointSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coupled")
    reports = rounded(tinylm, folder, TYPES, Compute(threads=2), rounding="yaqa")
    for report in reports:
        (embedding,) = (each for each in report if each.name == "token_embd.weight")
        assert embedding.note == ""
        assert embedding.loss is not None and embedding.plain_loss is not None
        assert 0 < embedding.loss < 0.95 * embedding.plain_loss
    return folder


def test_gradients_let_a_file_lose_less(tinylm: CheckpointSource, files: Path, coupled_files: Path) -> None:
    few = Chunking(n_ctx=256, chunks=40)
    for name in TYPES:
        without, with_gradients = (
            quantkit.divergence(GGUFSource(folder / f"{name}.gguf"), tinylm, TEST, chunking=few).kld.value
            for folder in (files, coupled_files)
        )
        assert with_gradients < 0.97 * without


@pytest.mark.parametrize("change", ["threads", "memory", "alone"])
def test_gradients_are_the_same_whatever_the_machine(
    tinylm: CheckpointSource, coupled_files: Path, tmp_path: Path, change: str
) -> None:
    compute = {"threads": Compute(threads=1), "memory": Compute(threads=3, memory=0)}.get(change)
    types = TYPES[:1] if change == "alone" else TYPES
    rounded(tinylm, tmp_path, types, compute, rounding="yaqa")
    assert_same_files(tmp_path, coupled_files, types)


@pytest.mark.parametrize("suffix", ["moments", "lengths"])
def test_a_stopped_run_keeps_its_gradients(
    tinylm: CheckpointSource, coupled_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    with pytest.raises(StopError):
        rounded(tinylm, tmp_path, TYPES, progress=stop_in(1), rounding="yaqa")
    with pytest.raises(QuantkitError, match=r"belongs to a run with another model, text, types or options"):
        rounded(tinylm, tmp_path, TYPES, resume=True)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("gradients are taken again")

    monkeypatch.setattr("quantkit.calibration.rounding.gradient_moments", again)
    kept = {path: path.read_bytes() for path in (tmp_path / "Q4_K_M.gguf.unfinished").glob(f"*.{suffix}")}
    for path, data in kept.items():
        path.write_bytes(data[:-4])
    with pytest.raises(QuantkitError, match=rf"\.{suffix}: missing or damaged"):
        rounded(tinylm, tmp_path, TYPES, resume=True, rounding="yaqa")
    for path, data in kept.items():
        path.write_bytes(data)
    rounded(tinylm, tmp_path, TYPES, resume=True, rounding="yaqa")
    assert_same_files(tmp_path, coupled_files, TYPES)


@requires_torch
def test_gradients_through_torch(tinylm: CheckpointSource, coupled_files: Path, tmp_path: Path) -> None:
    rounded(tinylm, tmp_path, ("Q4_K_M",), Compute(backend="torch"), rounding="yaqa")
    few = Chunking(n_ctx=256, chunks=20)
    ours, numpys = (
        quantkit.divergence(GGUFSource(path), tinylm, TEST, chunking=few).kld.value
        for path in (tmp_path / "Q4_K_M.gguf", coupled_files / "Q4_K_M.gguf")
    )
    # Sums of float32 in another order move a level here and there, and all that is rounded after it: weights of tokens
    # that differ by 1% move what this file loses by 3% either way.
    assert ours == pytest.approx(numpys, rel=0.1)


def test_gradients_that_numpy_does_not_take(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    source = GGUFSource(write_gguf(tmp_path / "experts.gguf", family.metadata(), family.weights(7)))
    text = CalibrationText.of(source, np.arange(96, dtype=np.int32) % N_VOCAB, Chunking(n_ctx=24))
    outputs = [(plan(source, "Q8_0", calibrated=True), tmp_path / "q.gguf")]
    with pytest.raises(QuantkitError, match="takes no gradients through experts: use torch"):
        execute_with_feedback(load(source, keep=False), outputs, text, rounding="yaqa")
    assert not (tmp_path / "q.gguf").exists()


def test_moments_of_gradients_are_those_of_the_whole_pass(tmp_path: Path) -> None:
    """Layers between those whose input was kept are computed again: the sums are the same as of one pass."""
    family = FAMILIES["gemma3"]  # seven layers
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(7)))
    model = load(source, keep=False)
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, (3, 20)).astype(np.int32)
    found, lengths = dict[str, np.ndarray](), dict[str, np.ndarray]()
    wanted = coupled(model.spec)
    gradient_moments(model, tokens, wanted, found.__setitem__, lengths.__setitem__)
    assert (
        found.keys()
        == wanted
        < lengths.keys()
        == {name for each in model.spec.layers for n in each.inputs for name in n}
    )
    read = [model.embedded(tokens)]
    for index in range(7):
        read.append(read[-1].copy())
        model.layer_pass(index, 20)(read[-1])
    gradients = model.last_gradients(read[7], np.random.default_rng(0).random(tokens.shape))
    for index in reversed(range(7)):
        sums = model.input_sums(full=True)
        model.gradient_pass(index, 20)(read[index], gradients)
        sums.settle()
        for ((name,), _), (total, n_rows) in sums.take().items():
            np.testing.assert_allclose(lengths[name].sum(), np.trace(total), rtol=1e-5)
            if name in wanted:
                np.testing.assert_array_equal(found[name], (total / n_rows).astype(np.float32))


MANY = np.random.default_rng(1).integers(0, N_VOCAB, (70, 128)).astype(np.int32)  # more than one batch


@requires_torch
def test_gradients_of_each_token_are_those_of_torch(tmp_path: Path) -> None:
    family = FAMILIES["gemma3"]
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(7)))
    numpys, torchs = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for backend, lengths in (("numpy", numpys), ("torch", torchs)):
        model = load(source, Compute(backend=backend, threads=2), keep=False)
        gradient_moments(model, MANY, (), lambda name, moments: None, lengths.__setitem__)
    assert numpys.keys() == torchs.keys()
    for name, own in numpys.items():
        # Where a draw falls between two tokens, one or the other is drawn.
        assert np.isclose(torchs[name], own, rtol=1e-2, atol=1e-3 * own.mean()).mean() > 0.97


@requires_torch
@pytest.mark.parametrize("name", OTHER_MIXERS)
def test_gradients_reach_every_matrix(tmp_path: Path, name: str) -> None:
    """Of all kinds of layers, but for those of experts and of single heads."""
    source = CheckpointSource(make_checkpoint(name, tmp_path), "f32")
    model = load(source, Compute(backend="torch", threads=2), keep=False)
    tokens = np.random.default_rng(1).integers(5, 250, (3, 70)).astype(np.int32)
    found, lengths = dict[str, np.ndarray](), dict[str, np.ndarray]()
    gradient_moments(model, tokens, coupled(model.spec), found.__setitem__, lengths.__setitem__)
    stacked = {name for name, info in source.tensors.items() if len(info.shape) > 2}
    matrices = {name for layer in model.spec.layers for group in layer.inputs for name in group}
    assert found.keys() == coupled(model.spec)
    assert lengths.keys() == matrices - stacked
    for each, of_tokens in lengths.items():
        # Nothing is wrong with what the last token makes others attend to: there is none.
        assert (of_tokens.reshape(tokens.shape)[:, :-1] > 0).mean() > 0.9, each


@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=requires_torch)])
def test_tokens_count_as_their_gradients_say(tmp_path: Path, backend: str) -> None:
    """Where one chunk alone has gradients, it counts as they say; all others share a tenth of the weight with it."""
    family = FAMILIES["gemma3"]
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", family.metadata(), family.weights(7)))
    model = load(source, Compute(backend=backend, threads=2), keep=False)

    def means(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        x = np.empty((*tokens.shape, model.spec.width), np.float32)
        steps = MomentsPass(model, tokens, source.tensors, x, gradients=lambda name: lengths.reshape(-1))
        steps.skip()
        return [shared.moments[0].mean for shared in steps.gather().inputs if shared.moments[0] is not None]

    every = means(MANY, np.ones(MANY.shape, np.float32))
    for chunk in (2, 67):
        lengths = np.zeros(MANY.shape, np.float32)
        lengths[chunk] = 3.0
        alone = means(MANY[chunk : chunk + 1], np.ones((1, 128), np.float32))
        for found, whole, own in zip(means(MANY, lengths), every, alone, strict=True):
            expected = ALIKE * whole + (1 - ALIKE) * own
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
