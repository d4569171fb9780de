"""LoRA adapters: against the reference's converter, against PEFT's merge, and in llama.cpp."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoints import make_checkpoint
from safetensors.numpy import load_file, save_file
from support.conversion import assert_recorded, convert, write
from support.llama_reference import llama_logits, llama_logits_with
from support.program import call, refusal

import quantkit
from quantkit import blocks
from quantkit.architectures import load_architecture
from quantkit.errors import QuantkitError
from quantkit.sources.adapter import AdapterSource
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.merged import merge_lora
from quantkit.sources.source import GGUFSource, TensorSource

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "adapters"


def base_of(name: str) -> str:
    """The checkpoint that the adapter `name` belongs to."""
    config = json.loads((GOLDENS / name / "adapter_config.json").read_text())
    return str(config["base_model_name_or_path"]).removeprefix("example-org/")


# What record_adapters.py recorded: adapters and their bases, and those that the reference converts right.
ADAPTERS = {path.parent.name: base_of(path.parent.name) for path in sorted(GOLDENS.glob("*/adapter_config.json"))}
RECORDED = [(name, kind) for name in ADAPTERS if (GOLDENS / name / "reference.json").is_file()
            for kind in ("f32", "f16", "bf16", "q8_0")]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base of each adapter, and of the experts'."""
    parent = tmp_path_factory.mktemp("bases")
    wanted = dict.fromkeys([*ADAPTERS.values(), "tiny-qwen3-moe", "tiny-linear"])
    return {name: make_checkpoint(name, parent) for name in wanted}


def opened(name: str, bases: dict[str, Path], outtype: Any = "f32") -> AdapterSource:
    return AdapterSource(GOLDENS / name, load_architecture(bases[ADAPTERS[name]]), outtype)


def values(source: TensorSource, name: str) -> np.ndarray:
    return blocks.decode(source.read(name), source.tensors[name].type)


@pytest.mark.parametrize(("name", "outtype"), RECORDED)
def test_the_file_is_the_reference_converters(bases: dict[str, Path], tmp_path: Path, name: str, outtype: str) -> None:
    recorded = json.loads((GOLDENS / name / "reference.json").read_text())
    assert_recorded(opened(name, bases, outtype), recorded[outtype], tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_are_those_of_peft(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """PEFT sums over the rank in another order: float32's rounding of sums of some 30 products of about 0.01."""
    checkpoint = bases[ADAPTERS[name]]
    base, adapter = CheckpointSource(checkpoint, "f32"), opened(name, bases)
    merged = merge_lora(base, [(write(adapter, tmp_path / "adapter.gguf"), 1.0)])
    # What PEFT gives, as a checkpoint of these rows would be converted: rows that move are found by their values.
    rows = load_file(GOLDENS / name / "merged.safetensors")
    architecture, seen = load_architecture(checkpoint), set()
    stored = CheckpointSource(checkpoint)._checkpoint.tensors
    for key, expected in rows.items():
        name_there = _stored(key, stored)
        (assembly,) = architecture.assemblies({name_there: stored[name_there]})
        found = values(merged, assembly.name)
        if assembly.transform.arithmetic is not None:
            expected = assembly.transform.arithmetic(expected)
        if name == "gpt2-lora":
            found = found.T  # stored transposed
        for row in np.atleast_2d(expected):
            assert np.abs(found[:, : row.size] - row).max(axis=-1).min() < 2e-7, assembly.name
        assert merged.tensors[assembly.name].type.name == "F32"
        seen.add(assembly.name)
    assert len(rows) == len(seen)
    for other in base.tensors.keys() - seen:
        np.testing.assert_array_equal(merged.read(other), base.read(other))


def _stored(key: str, stored: Any) -> str:
    """What a checkpoint calls the tensor that transformers calls `key`."""
    return next(name for name in (key, key.removeprefix("transformer."), f"language_model.{key}") if name in stored)


@requires_reference
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("name", ["llama-lora", "qwen3-lora", "falcon-lora", "llama-patterns", "gpt2-lora"])
def test_llama_cpp_computes_the_same_with_the_adapter(
    bases: dict[str, Path], tmp_path: Path, name: str, scale: float
) -> None:
    checkpoint = bases[ADAPTERS[name]]
    adapter = write(opened(name, bases), tmp_path / "adapter.gguf")
    base = convert(checkpoint, tmp_path / "base.gguf", "f32")
    (merged,) = quantkit.quantize(merge_lora(GGUFSource(base), [(adapter, scale)]), tmp_path / "m.gguf", type="F32")
    tokens = [5, 290, 17, 33, 100, 264, 270, 6]
    plain, with_adapter = llama_logits(base, tokens), llama_logits_with(base, adapter, scale, tokens)
    np.testing.assert_allclose(llama_logits(merged, tokens), with_adapter, atol=2e-3)
    assert np.abs(plain - with_adapter).max() > 0.05


def experts_adapter(directory: Path, base: Path, rank: int = 3, only: int | None = None) -> Path:
    """An adapter of each expert by itself, as checkpoints name them; PEFT cannot make one of transformers' class."""
    rng = np.random.default_rng(3)
    shapes = {name: t.shape for name, t in CheckpointSource(base)._checkpoint.tensors.items() if ".experts." in name}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        if only is None or f".experts.{only}." in name:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": rank}))
    return directory


@requires_reference
def test_adapters_of_experts(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["tiny-qwen3-moe"]
    directory = experts_adapter(tmp_path / "adapter", base)
    adapter, source = AdapterSource(directory, load_architecture(base)), CheckpointSource(base, "f32")
    merged, tensors = merge_lora(source, [(adapter, 0.25)]), load_file(directory / "adapter_model.safetensors")
    n_experts = source.tensors["blk.1.ffn_up_exps.weight"].shape[2]
    before, after = (
        values(model, "blk.1.ffn_up_exps.weight").reshape(
            n_experts, -1, source.tensors["blk.1.ffn_up_exps.weight"].shape[0]
        )
        for model in (source, merged)
    )
    for e in range(n_experts):
        a, b = (
            tensors[f"base_model.model.model.layers.1.mlp.experts.{e}.up_proj.lora_{x}.weight"].astype(np.float64)
            for x in "AB"
        )
        np.testing.assert_allclose(after[e], before[e] + 0.25 * (6 / 3) * (b @ a), atol=2e-6)
    path, whole = write(adapter, tmp_path / "adapter.gguf"), write(source, tmp_path / "base.gguf")
    (made,) = quantkit.quantize(merged, tmp_path / "merged.gguf", type="F32")
    tokens = [5, 290, 17, 33]
    np.testing.assert_allclose(llama_logits(made, tokens), llama_logits_with(whole, path, 0.25, tokens), atol=5e-3)
    lone = experts_adapter(tmp_path / "lone", base, only=0)
    with pytest.raises(QuantkitError, match=r"lacks parts of .*experts"):
        AdapterSource(lone, load_architecture(base))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_are_those_of_the_whole(bases: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ADAPTERS)))
    adapter = opened(name, bases)
    merged = merge_lora(CheckpointSource(bases[ADAPTERS[name]]), [(adapter, 0.3), (adapter, -2.0)])
    tensor = data.draw(st.sampled_from(sorted(merged.tensors)))
    start = data.draw(st.integers(0, merged.tensors[tensor].n_rows))
    stop = data.draw(st.integers(start, merged.tensors[tensor].n_rows))
    np.testing.assert_array_equal(merged.read(tensor, start, stop), merged.read(tensor)[start:stop])
    merged.release(tensor)


def test_several_adapters_are_added_one_after_the_other(bases: dict[str, Path]) -> None:
    base, adapter = CheckpointSource(bases["tiny-llama3-scaling"]), opened("llama-lora", bases)
    once = merge_lora(base, [(adapter, 1.0)])
    both, back = (merge_lora(base, [(adapter, 1.0), (adapter, s)]) for s in (1.0, -1.0))
    for name in ("blk.0.attn_q.weight", "token_embd.weight"):
        # Sums of two in float32.
        np.testing.assert_allclose(values(back, name), values(base, name), atol=1e-7)
        np.testing.assert_allclose(
            values(both, name) - values(once, name), values(once, name) - values(base, name), atol=1e-7
        )
    again = pickle.loads(pickle.dumps(both))
    np.testing.assert_array_equal(again.read("blk.0.attn_q.weight"), both.read("blk.0.attn_q.weight"))
    assert {path.name for path in both.files} >= {"model.safetensors", "adapter_model.safetensors"}


def test_from_the_command_line(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["tiny-llama3-scaling"], tmp_path / "adapter"
    shutil.copytree(GOLDENS / "llama-lora", adapter)
    call("convert", adapter, "--lora", "--base", base)
    (made,) = adapter.glob("*.gguf")
    assert made.name.endswith("-F32-LoRA.gguf")
    assert quantkit.convert_lora(adapter, tmp_path / "api.gguf", base=base).read_bytes() == made.read_bytes()
    for i, each in enumerate((adapter, made)):
        call("quantize", base, "--merge-lora", f"{each}:0.5", "--type", "Q8_0", "-o", tmp_path / f"{i}.gguf")
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    call("quantize", base, "--type", "Q8_0", "-o", tmp_path / "plain.gguf")
    assert (tmp_path / "0.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()
    assert "names no base model that is there; name it with --base" in refusal(
        "convert", "--lora", broken(tmp_path / "b", base_model_name_or_path=None)
    )
    assert "a LoRA adapter, and no model; --lora converts it" in refusal("convert", adapter)
    told = refusal("quantize", base, "--merge-lora", made, "--type", "Q8_0", "-o", made, "--force")
    assert f"{made}: is the input" in told


def broken(directory: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """The Llama's adapter with changes to its config, and more or other tensors."""
    shutil.copytree(GOLDENS / "llama-lora", directory)
    config = json.loads((directory / "adapter_config.json").read_text()) | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        path = directory / "adapter_model.safetensors"
        save_file({name: t for name, t in (load_file(path) | tensors).items() if t.size}, path)
    return directory


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"DoRA \(use_dora\) is not supported"),
    "another kind": ({"peft_type": "IA3"}, "an adapter of the type 'IA3'; only LORA"),
    "no alpha": ({"lora_alpha": None}, "lacks lora_alpha"),
    "nothing": ({"lora_alpha": 0}, "changes nothing"),
    "a slow pattern": ({"alpha_pattern": {"(a+)+b": 1}}, r"alpha_pattern '\(a\+\)\+b': too complicated"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(': missing"),
    "an alpha as text": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern is 'x', not a finite number"),
    "tokens": ({"alora_invocation_tokens": [-1]}, r"not a list of token ids"),
    "a magnitude": ({"tensors": {f"{FIRST}.lora_magnitude_vector": np.ones(3, np.float32)}}, "no part of a LoRA"),
    "one factor": ({"tensors": {f"{FIRST}.lora_B.weight": np.ones(0, np.float32)}}, "q_proj has no lora_B"),
    "ranks": ({"tensors": {f"{FIRST}.lora_B.weight": np.ones((64, 5), np.float32)}}, r"does not fit .*q_proj.lora_A"),
    "whole and factors": ({"tensors": {f"{FIRST}.weight": np.ones((64, 64), np.float32)}}, "q_proj.weight whole, and"),
    "a convolution": ({"tensors": {f"{FIRST}.lora_A.weight": np.ones((4, 64, 1), np.float32)}}, "is no matrix"),
    "another model's": (
        {"tensors": {"base_model.model.encoder.q.lora_A.weight": np.ones((2, 2), np.float32),
                     "base_model.model.encoder.q.lora_B.weight": np.ones((2, 2), np.float32)}},
        "tensor 'encoder.q.weight' has no place in llama",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused_in_one_line(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    changes, told = BAD[case]
    directory = broken(tmp_path / "adapter", **changes)
    with pytest.raises(QuantkitError, match=told) as caught:
        assert AdapterSource(directory, load_architecture(bases["tiny-llama3-scaling"])).metadata
    assert "\n" not in str(caught.value)


def test_adapters_of_other_models_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = write(opened("llama-lora", bases), tmp_path / "adapter.gguf")
    with pytest.raises(QuantkitError, match=r"an adapter of llama does not fit .*, which is gpt2"):
        merge_lora(CheckpointSource(bases["tiny-gpt2"]), [(adapter, 1.0)])
    # Keys and values have other heads there.
    with pytest.raises(
        QuantkitError, match=r"'blk.0.attn_k.weight.lora_b' of shape .* does not fit 'blk.0.attn_k.weight'"
    ):
        merge_lora(CheckpointSource(bases["tiny-linear"]), [(adapter, 1.0)])
    model = convert(bases["tiny-linear"], tmp_path / "model.gguf")
    with pytest.raises(QuantkitError, match="not a LoRA adapter"):
        merge_lora(CheckpointSource(bases["tiny-linear"]), [(model, 1.0)])
    with pytest.raises(QuantkitError, match="nan is no scale"):
        merge_lora(CheckpointSource(bases["tiny-llama3-scaling"]), [(adapter, float("nan"))])
    bias = {"tensors": {f"{FIRST}.bias": np.ones(64, np.float32)}}
    whole = AdapterSource(broken(tmp_path / "whole", **bias), load_architecture(bases["tiny-llama3-scaling"]))
    with pytest.raises(QuantkitError, match=r"whole tensor blk.0.attn_q.bias .*merge it"):
        whole.check_for_file()
