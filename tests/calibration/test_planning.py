"""Types chosen for a size: that they fit and lose less, what is refused, and plans in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference, requires_torch
from support.llama_reference import llama_logits, llama_quantize
from support.tiny import FAMILIES, N_VOCAB, relative_error, tiny_metadata, tiny_weights, write_gguf

import quantkit
from quantkit.blocks.types import GGMLType as T
from quantkit.calibration.planning import (
    ChosenPlan,
    Target,
    TypeChooser,
    Wishes,
    fingerprint,
    load_plan,
    save_plan,
)
from quantkit.calibration.survey import TensorCosts, survey
from quantkit.calibration.text import CalibrationText
from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import load
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.unfinished import WorkDirectory
from quantkit.pipeline.options import QuantizeOptions
from quantkit.pipeline.plan import plan_quantize
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource

CALIBRATION = (ROOT / "fixtures" / "tinylm-calib.txt").read_text("utf-8")
TEST = (ROOT / "fixtures" / "tinylm-test.txt").read_text("utf-8")
SOME = Chunking(n_ctx=256, chunks=40)
FEW_TYPES = Wishes(T.Q2_K, T.Q6_K)
TARGETS = [Target.parse(text) for text in ("Q4_K_M", "3.9bpw", "1850000")]


@pytest.fixture(scope="module")
def tinylm() -> CheckpointSource:
    return CheckpointSource(TINYLM)


@pytest.fixture(scope="module")
def text(tinylm: CheckpointSource) -> CalibrationText:
    return CalibrationText.of(tinylm, CALIBRATION, SOME, "calib.txt")


@pytest.fixture(scope="module")
def costs(tinylm: CheckpointSource, text: CalibrationText) -> dict[str, TensorCosts]:
    chooser = TypeChooser(tinylm, TARGETS, QuantizeOptions(), text, "gptq", FEW_TYPES)
    return chooser.survey(Compute())


@pytest.fixture(scope="module")
def plans(tinylm: CheckpointSource, text: CalibrationText, costs: dict[str, TensorCosts]) -> list[ChosenPlan]:
    return TypeChooser(tinylm, TARGETS, QuantizeOptions(), text, "gptq", FEW_TYPES).choose(costs)


def chosen(
    source: Any, text: CalibrationText, costs: dict[str, TensorCosts], target: str, wishes: Wishes = FEW_TYPES,
    **options: Any,
) -> ChosenPlan:  # fmt: skip
    chooser = TypeChooser(source, [Target.parse(target)], QuantizeOptions(**options), text, "gptq", wishes)
    (plan,) = chooser.choose(costs)
    return plan


def types_of(plan: ChosenPlan) -> dict[str, T]:
    return {line.info.name: line.info.type for line in plan}


def test_costs_fall_with_the_bits(costs: dict[str, TensorCosts]) -> None:
    for name, each in costs.items():
        divergence = each.divergence
        assert divergence[T.Q2_K] > divergence[T.Q3_K] > divergence[T.Q4_K] > divergence[T.Q5_K] > divergence[T.Q6_K]
        assert all(value > 0 for kind, value in divergence.items() if kind.is_quantized), name
        assert T.BF16 not in divergence


def test_plans_fit_and_use_their_bytes(tinylm: CheckpointSource, plans: list[ChosenPlan]) -> None:
    like, bits, nbytes = plans
    reference = plan_quantize(tinylm, "Q4_K_M", QuantizeOptions(calibrated=True))
    assert 0 <= reference.file_size - like.file_size < 12_000
    assert 3.85 < bits.bits_per_weight <= 3.9
    assert 0 <= 1_850_000 - nbytes.file_size < 12_000
    assert like.divergence < bits.divergence
    assert like.name == "Q4_K_M"
    assert like.metadata.integer("general.file_type") == 15
    assert "predicted mean divergence" in str(like)
    assert like.as_dict()["chosen"]["divergence"] == like.divergence


def test_chosen_types_lose_less_and_as_much_as_predicted(
    tinylm: CheckpointSource, plans: list[ChosenPlan], tmp_path: Path
) -> None:
    few = Chunking(n_ctx=256, chunks=60)
    (ours,) = quantkit.quantize(
        tinylm, tmp_path / "chosen.gguf", type=plans[0], rounding="gptq", calibration=CALIBRATION, chunking=SOME
    )
    matrix = quantkit.importance_matrix(tinylm, CALIBRATION, chunking=SOME)
    (theirs,) = quantkit.quantize(tinylm, tmp_path / "mixture.gguf", type="Q4_K_M", imatrix=matrix)
    assert ours.stat().st_size <= theirs.stat().st_size
    losses = [quantkit.divergence(path, tinylm, TEST, chunking=few).kld.value for path in (ours, theirs)]
    assert losses[0] < 0.8 * losses[1]
    # What is predicted is the divergence on the text that types were chosen by.
    again = quantkit.divergence(ours, tinylm, CALIBRATION, chunking=few)
    assert plans[0].divergence == pytest.approx(again.kld.value, rel=0.3)
    metadata = GGUFSource(ours).metadata
    assert metadata.string("quantkit.plan") == "types chosen for the size of Q4_K_M"
    assert metadata.number("quantkit.plan.divergence") == pytest.approx(plans[0].divergence, rel=1e-6)


@requires_reference
def test_llama_cpp_reads_a_file_of_chosen_types(
    tinylm: CheckpointSource, text: CalibrationText, costs: dict[str, TensorCosts], tmp_path: Path
) -> None:
    plan = chosen(tinylm, text, costs, "3.5bpw")
    path, wide = tmp_path / "q.gguf", tmp_path / "wide.gguf"
    quantkit.quantize(tinylm, path, type=plan, rounding="gptq", calibration=CALIBRATION, chunking=SOME)
    assert llama_quantize(path, wide, "F32", allow_requantize=True) == 0
    tokens = np.random.default_rng(3).integers(0, 2000, 60).astype(np.int32)
    ours = load(GGUFSource(path)).logits(tokens[None])[0]
    assert relative_error(ours, llama_logits(wide, tokens.tolist())) < 2e-3


def test_to_the_nearest_by_importance(
    tinylm: CheckpointSource, text: CalibrationText, costs: dict[str, TensorCosts], tmp_path: Path
) -> None:
    plan = chosen(tinylm, text, costs, "3.5bpw")
    (path,) = quantkit.quantize(
        tinylm, tmp_path / "q.gguf", type=plan, rounding="nearest", calibration=CALIBRATION, chunking=SOME
    )
    matrix = quantkit.importance_matrix(tinylm, CALIBRATION, chunking=SOME, process_output=True).weights()
    file = GGUFSource(path)
    for name, info in file.tensors.items():
        if info.type.is_quantized:
            weights = matrix[name].reshape(-1) if name in matrix else None
            rows = quantkit.blocks.decode(tinylm.read(name, 0, 3), tinylm.tensors[name].type)
            np.testing.assert_array_equal(file.read(name, 0, 3), quantkit.quantize_rows(rows, info.type, weights))


def test_wishes(tinylm: CheckpointSource, text: CalibrationText, costs: dict[str, TensorCosts]) -> None:
    bounded = types_of(chosen(tinylm, text, costs, "4.6bpw", Wishes(T.Q3_K, T.Q5_K)))
    assert {kind for kind in bounded.values() if kind.is_quantized} <= {T.Q3_K, T.IQ3_S, T.IQ4_XS, T.Q4_K, T.Q5_K}
    ties = Wishes(T.Q2_K, T.Q6_K, ties=(r"blk\.(\d+)\.attn_[qkv]", r"blk\.\d+\.ffn_down"))
    tied = types_of(chosen(tinylm, text, costs, "3.9bpw", ties))
    for i in range(3):
        assert len({tied[f"blk.{i}.attn_{x}.weight"] for x in "qkv"}) == 1
    assert len({tied[f"blk.{i}.ffn_down.weight"] for i in range(3)}) == 1
    pins = [("attn_v", "Q8_0")]
    pinned = types_of(chosen(tinylm, text, costs, "4.5bpw", tensor_types=pins, output_tensor_type="Q6_K"))
    assert pinned["output.weight"] is T.Q6_K
    assert all(pinned[f"blk.{i}.attn_v.weight"] is T.Q8_0 for i in range(3))
    whole = types_of(chosen(tinylm, text, costs, "5bpw", leave_output_tensor=True))
    assert whole["output.weight"] is T.BF16


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("100KB", r"100\.0 kB \(100KB\) cannot be reached: the smallest types take \d+\.\d kB \(\d+ bytes\)"),
        ("1.5bpw", r"cannot be reached: the smallest types take"),
        ("900MB", r"900\.0 MB \(900MB\) is more than that of .*tinylm, 6\.\d MB"),
    ],
)
def test_sizes_that_cannot_be_had(tinylm: CheckpointSource, text: CalibrationText, target: str, problem: str) -> None:
    with pytest.raises(QuantkitError, match=problem):
        TypeChooser(tinylm, [Target.parse(target)], QuantizeOptions(), text)


def test_the_smallest_size_that_is_named_can_be_had(
    tinylm: CheckpointSource, text: CalibrationText, costs: dict[str, TensorCosts]
) -> None:
    with pytest.raises(QuantkitError) as caught:
        chosen(tinylm, text, costs, "100KB")
    smallest = str(caught.value).rpartition("(")[2].split()[0]
    # The header says how the types were chosen, and so which size was asked for.
    plan = chosen(tinylm, text, costs, f"{int(smallest) / 1e6:.6f}MB")
    assert plan.file_size - int(smallest) in (0, 32)
    assert {kind for kind in types_of(plan).values() if kind.is_quantized} == {T.Q2_K}


def test_a_saved_plan_comes_back_and_can_be_edited(
    tinylm: CheckpointSource, plans: list[ChosenPlan], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    save_plan(plans[0], tinylm, path)
    again = load_plan(path, tinylm)
    assert types_of(again) == types_of(plans[0])
    assert again.divergence == pytest.approx(plans[0].divergence)
    assert (again.name, again.target, again.rounding) == ("Q4_K_M", "Q4_K_M", "gptq")
    data = json.loads(path.read_text())
    data["tensors"]["blk.1.ffn_down.weight"] = "Q8_0"
    path.write_text(json.dumps(data))
    edited = load_plan(path, tinylm)
    assert types_of(edited) == {**types_of(plans[0]), "blk.1.ffn_down.weight": T.Q8_0}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["tensors"].update({"blk.0.attn_q.weight": "Q9"}), "unknown tensor type 'Q9'"),
        (lambda d: d["tensors"].update({"blk.9.attn_q.weight": "Q4_K"}), r"not those of .*blk\.9\.attn_q\.weight"),
        (lambda d: d["tensors"].pop("output.weight"), r"not those of .*output\.weight"),
        (lambda d: d.update({"model": "0" * 64}), "is a plan for another model than .*tinylm"),
        (lambda d: d.update({"quantkit_plan": 7}), "a plan of version 7"),
        (lambda d: d.pop("costs"), "is not a plan that quantkit has written"),
        (lambda d: d.update({"tensors": 5}), "is not a plan that quantkit has written"),
        (lambda d: d["costs"]["output.weight"].update({"losses": {"Q9": 1}}), "is not a plan that quantkit has"),
        (lambda d: d["costs"]["output.weight"].update({"sensitivity": -1}), "is not a plan that quantkit has"),
        (
            lambda d: d["costs"]["output.weight"].update({"sensitivity": float("nan")}),
            "is not a plan that quantkit has",
        ),
        (lambda d: d["costs"]["output.weight"].update({"sensitivity": 10**400}), "is not a plan that quantkit has"),
        (lambda d: d.update({"quantkit_plan": float("inf")}), "is not a plan that quantkit has"),
        (lambda d: d.update({"target": "large"}), r"plan\.json: not a size: 'large'"),
        (lambda d: d.update({"rounding": "best"}), r"plan\.json: there is no rounding 'best'"),
        (lambda d: d["tensors"].update({"output.weight": "I32"}), r"'output\.weight' is .*, and cannot become I32"),
        (lambda d: d["tensors"].update({"blk.0.attn_norm.weight": "Q4_K"}), "is F32, and cannot become Q4_K"),
    ],
)
def test_plans_that_are_refused(
    tinylm: CheckpointSource, plans: list[ChosenPlan], tmp_path: Path, change: Callable[[Any], object], problem: str
) -> None:
    path = tmp_path / "plan.json"
    save_plan(plans[0], tinylm, path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(QuantkitError, match=problem):
        load_plan(path, tinylm)


def test_a_plan_that_is_no_json(tinylm: CheckpointSource, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\x00")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name, problem in (
        ("plan.json", "is not a plan"),
        ("deep.json", "is not a plan"),
        ("none.json", "No such file"),
    ):
        with pytest.raises(QuantkitError, match=problem):
            load_plan(tmp_path / name, tinylm)


def test_a_checkpoint_and_its_file_have_one_fingerprint(tinylm: CheckpointSource, tinylm_f32: Path) -> None:
    assert fingerprint(tinylm) == fingerprint(GGUFSource(tinylm_f32))
    assert len(fingerprint(tinylm)) == 64


def test_costs_are_kept_for_a_run_that_goes_on(tinylm: CheckpointSource, text: CalibrationText, tmp_path: Path) -> None:
    narrow = Wishes(T.Q4_K, T.Q5_K)
    chooser = TypeChooser(tinylm, TARGETS[:1], QuantizeOptions(), text, "nearest", narrow)
    work = WorkDirectory(tmp_path / "q.gguf")
    found = chooser.survey(Compute(), work=work)
    with pytest.raises(QuantkitError, match="holds the work of a run that was stopped") as caught:
        WorkDirectory(tmp_path / "q.gguf")
    assert caught.value.option == "resume"
    work = WorkDirectory(tmp_path / "q.gguf", resume=True)
    assert chooser.survey(Compute(), work=work) == found
    other = TypeChooser(tinylm, TARGETS[:1], QuantizeOptions(), text, "gptq", narrow)
    with pytest.raises(QuantkitError, match="belongs to a run with another model"):
        other.survey(Compute(), work=work)
    work.remove()
    assert not list(tmp_path.iterdir())


def test_experts_and_tied_embeddings(tmp_path: Path) -> None:
    """Rows that only small blocks divide, a matrix for each expert, and an output matrix that is the embedding."""
    family = FAMILIES["mixtral"]
    experts = GGUFSource(write_gguf(tmp_path / "e.gguf", family.metadata(), family.weights(7)))
    tied = GGUFSource(write_gguf(tmp_path / "t.gguf", tiny_metadata(), tiny_weights(3, tied=True)))
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 4096)
    for source in (experts, tied):
        plan = quantkit.choose_types(source, "6bpw", tokens, chunking=Chunking(n_ctx=64))
        assert plan.bits_per_weight <= 6
        used = {line.info.type for line in plan if line.info.type.is_quantized}
        assert used <= {T.IQ4_NL, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0}
        assert all(each.sensitivity > 0 for each in plan.costs.values())
    assert "token_embd.weight" in plan.costs
    assert any("_exps" in name for name in quantkit.choose_types(
        experts, "6bpw", tokens, chunking=Chunking(n_ctx=64), rounding="nearest"
    ).costs)  # fmt: skip


def test_a_tied_embedding_counts_where_it_is_looked_up_and_multiplied_with(tmp_path: Path) -> None:
    source = GGUFSource(write_gguf(tmp_path / "t.gguf", tiny_metadata(), tiny_weights(3, tied=True)))
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 4096)
    costs = quantkit.choose_types(source, "6bpw", tokens, chunking=Chunking(n_ctx=64)).costs
    options = QuantizeOptions(tensor_types=[("blk", "F32")], token_embedding_type="IQ4_NL")
    path = tmp_path / "q.gguf"
    quantkit.execute(source, [(plan_quantize(source, "Q8_0", options), path)])
    measured = quantkit.divergence(path, source, tokens, chunking=Chunking(n_ctx=64)).kld.value
    assert costs["token_embd.weight"].divergence[T.IQ4_NL] == pytest.approx(measured, rel=0.25)


def test_types_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    source = GGUFSource(write_gguf(tmp_path / "e.gguf", family.metadata(), family.weights(7)))
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 4096)
    one, three = (
        quantkit.choose_types(source, "6bpw", tokens, chunking=Chunking(n_ctx=64), compute=Compute(threads=n))
        for n in (1, 3)
    )
    assert types_of(one) == types_of(three)
    for name, each in one.costs.items():
        # Products over few rows are cut among BLAS's threads, and their float32 sums with them.
        assert three.costs[name].sensitivity == pytest.approx(each.sensitivity, rel=1e-5)
        assert three.costs[name].losses == pytest.approx(each.losses, rel=1e-5)


@requires_torch
def test_torch_measures_the_same_costs(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    source = GGUFSource(write_gguf(tmp_path / "e.gguf", family.metadata(), family.weights(7)))
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 2048)
    text = CalibrationText.of(source, tokens, Chunking(n_ctx=64))
    chooser = TypeChooser(source, [Target.parse("6bpw")], QuantizeOptions(), text, "nearest")
    models = [load(source, Compute(backend=backend), keep=False) for backend in ("numpy", "torch", "torch")]
    import torch

    models[2].gpu = torch.device("cpu")  # as where a GPU computes
    ours, *others = (survey(model, text, chooser.candidates, feedback=False) for model in models)
    for theirs in others:
        for name, each in ours.items():
            assert theirs[name].sensitivity == pytest.approx(each.sensitivity, rel=0.02), name
            for kind, loss in each.losses.items():
                assert theirs[name].losses[kind] == pytest.approx(loss, rel=0.01, abs=1e-9), (name, kind)
