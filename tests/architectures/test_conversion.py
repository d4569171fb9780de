"""Each family's tiny checkpoints against what the reference converter makes of them, record by record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoints import FAMILIES, make_checkpoint
from support.conversion import OUTTYPES, assert_recorded, changed_copy, golden, write
from support.families import ENCODERS, LLAMA_CPP_RUNS
from support.llama_reference import llama_computes

from quantkit.architectures import FAMILIES as CLASSES
from quantkit.architectures import supported
from quantkit.errors import QuantkitError
from quantkit.sources.checkpoint import CheckpointSource


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, parent) for name in FAMILIES}


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with changes to its config.json."""

    def make(name: str, **changes: Any) -> Path:
        return changed_copy(tiny[name], tmp_path / name, **changes)

    return make


def test_every_family_has_a_checkpoint() -> None:
    made = {recipe.config["architectures"][0] for recipe in FAMILIES.values()} | {"LlamaForCausalLM"}
    assert all(made & {*family.checkpoints, *family.wrappers} for family in CLASSES)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_the_reference_converters(tiny: dict[str, Path], tmp_path: Path, name: str, outtype: Any) -> None:
    assert_recorded(CheckpointSource(tiny[name], outtype), golden(name)[outtype], tmp_path / "out.gguf")


@requires_reference
@pytest.mark.parametrize("name", [name for name in LLAMA_CPP_RUNS if name not in ENCODERS])
def test_llama_cpp_loads_the_file_and_computes(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    llama_computes(write(CheckpointSource(tiny[name], "f16"), tmp_path / "out.gguf"), b"the other hats on")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_rows_are_those_of_the_whole(tiny: dict[str, Path], data: st.DataObject) -> None:
    source = CheckpointSource(tiny[data.draw(st.sampled_from(sorted(FAMILIES)))], data.draw(st.sampled_from(OUTTYPES)))
    info = source.tensors[data.draw(st.sampled_from(sorted(source.tensors)))]
    start = data.draw(st.integers(0, info.n_rows))
    stop = data.draw(st.integers(start, info.n_rows))
    np.testing.assert_array_equal(source.read(info.name, start, stop), source.read(info.name)[start:stop])
    assert source.read(info.name, start, start).shape == (0, info.type.row_nbytes(info.n_per_row))


def test_the_list_of_families() -> None:
    rows = supported()
    assert [row.family for row in rows] == sorted((row.family for row in rows), key=str.lower)
    assert {row.family for row in rows} == {family.__name__ for family in CLASSES}
    row = next(row for row in rows if row.family == "Gemma3")
    assert row.classes == ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
    assert row.gguf_name == "gemma3" and row.notes


def values(source: CheckpointSource) -> dict[str, Any]:
    return {key: value.value for key, value in source.metadata.items() if not key.startswith("tokenizer.")}


OLD_SPELLINGS = {
    "tiny-qwen2": {"rope_theta": 1000000.0, "layer_types": "absent"},
    "tiny-gemma3": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "tiny-phi3": {"rope_theta": 10000.0, "num_key_value_heads": 2},
    "tiny-smollm3": {"rope_theta": 5000000.0, "no_rope_layers": "absent"},
    "tiny-olmo2": {"rope_theta": 500000.0},
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_rotary_parameters_at_the_root_say_the_same(
    tiny: dict[str, Path], copy: Callable[..., Path], name: str
) -> None:
    """Most checkpoints on the hub were saved by transformers 4; the goldens are of configs of transformers 5."""
    old = copy(name, rope_parameters="absent", **OLD_SPELLINGS[name])
    assert values(CheckpointSource(old)) == values(CheckpointSource(tiny[name]))


def test_stacked_experts_are_cut_into_the_same_tensors(tiny: dict[str, Path], copy: Callable[..., Path]) -> None:
    from safetensors.numpy import save_file

    from quantkit.formats.safetensors import SafetensorsCheckpoint

    directory = copy("tiny-qwen3-moe")
    stored = SafetensorsCheckpoint(directory)
    tensors = {name: stored.data(name).view(np.float16) for name in stored.tensors if ".experts." not in name}
    for layer in range(2):
        part = f"model.layers.{layer}.mlp.experts.{{}}{{}}_proj"

        def expert(e: int, kind: str, part: str = part) -> np.ndarray:
            return stored.data(part.format(f"{e}.", kind) + ".weight").view(np.float16)

        both = [np.concatenate([expert(e, "gate"), expert(e, "up")]) for e in range(4)]
        tensors[part.format("", "gate_up")] = np.stack(both)
        tensors[part.format("", "down")] = np.stack([expert(e, "down") for e in range(4)])
    for path in directory.glob("model*"):
        path.unlink()
    save_file({name: np.ascontiguousarray(data) for name, data in tensors.items()}, directory / "model.safetensors")
    one_by_one, stacked = CheckpointSource(tiny["tiny-qwen3-moe"]), CheckpointSource(directory)
    assert stacked.tensors.keys() == one_by_one.tensors.keys()
    for name, info in one_by_one.tensors.items():
        assert stacked.tensors[name].shape == info.shape
        if info.type.name == "BF16":
            np.testing.assert_array_equal(stacked.read(name), one_by_one.read(name))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("modules.json", '[{"type": "a.Pooling", "path": "../up"}]', "the path '../up' is no folder beside it"),
        ("modules.json", "[", "not valid JSON"),
        ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', "only mean, cls and lasttoken pooling"),
    ],
)
def test_bad_modules_are_refused(copy: Callable[..., Path], file: str, content: str, told: str) -> None:
    directory = copy("tiny-qwen3-embedding")
    (directory / file).write_text(content)
    with pytest.raises(QuantkitError, match=told):
        assert CheckpointSource(directory).metadata


def test_gemmas_padding_is_cut_by_tokenizer_json_too(tiny: dict[str, Path], copy: Callable[..., Path]) -> None:
    directory = copy("tiny-gemma3")
    (directory / "tokenizer.model").unlink()
    tokenizer = {"model": {"vocab": {str(i): i for i in range(300)}}, "added_tokens": [{}] * 7}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    source, whole = CheckpointSource(directory), CheckpointSource(tiny["tiny-gemma3"])
    assert source.tensors["token_embd.weight"].shape == (256, 307)
    assert whole.tensors["token_embd.weight"].shape == (256, 320)
    np.testing.assert_array_equal(source.read("token_embd.weight"), whole.read("token_embd.weight", 0, 307))
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(QuantkitError, match=r"lacks model\.vocab"):
        CheckpointSource(directory)


@pytest.mark.parametrize(
    ("name", "changes", "key", "value"),
    [
        ("tiny-gpt2", {"n_ctx": "absent"}, "gpt2.context_length", 128),
        ("tiny-gpt2", {"n_inner": 1024}, "gpt2.feed_forward_length", 1024),
        ("tiny-pythia", {"rotary_emb_base": 25000}, "gptneox.rope.freq_base", 25000.0),
        ("tiny-pythia", {"rotary_pct": "absent", "partial_rotary_factor": 0.5}, "gptneox.rope.dimension_count", 32),
        ("tiny-granite", {"head_dim": 32}, "granite.rope.dimension_count", 64),
        ("tiny-olmo3", {"layer_types": "absent"}, "olmo2.attention.sliding_window_pattern", [True, True, True, False]),
        ("tiny-phi4", {"max_position_embeddings": 128}, "phi3.rope.scaling.attn_factor", 1.0),
    ],
)
def test_where_a_config_is_silent_or_odd(
    copy: Callable[..., Path], name: str, changes: dict[str, Any], key: str, value: Any
) -> None:
    found = CheckpointSource(copy(name, **changes)).metadata[key].value
    assert (list(found) if isinstance(value, list) else found) == value


def test_smollm3_warns_of_layers_that_llama_cpp_would_turn(
    copy: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert CheckpointSource(copy("tiny-smollm3", no_rope_layers=[1, 0, 1, 0])).tensors
    assert "no_rope_layers differs" in caplog.text


BAD = {
    "another text model": (
        "tiny-llava", {"text_config": {"model_type": "banana"}}, "around a text model of type 'banana' is not supported"
    ),
    "too few factors": (
        "tiny-phi4",
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "long_factor must be a list of 24 numbers",
    ),
    "factors as text": (
        "tiny-phi4",
        {"rope_scaling": {"type": "longrope", "long_factor": ["x"] * 24, "short_factor": [1.0] * 24}},
        "long_factor is 'x', not a finite number",
    ),
    "no short factors": (
        "tiny-phi4",
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 24}},
        "a long_factor and no short_factor",
    ),
    "layer types": ("tiny-olmo3", {"layer_types": ["full_attention"]}, "not a list for 4 layers"),
    "experts": ("tiny-mixtral", {"num_local_experts": 5}, "layer [01] lacks parts of .*: only 12"),
    "heads of fused attention": ("tiny-pythia", {"num_attention_heads": 7}, "does not fit what config.json says"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_refused_in_one_line(copy: Callable[..., Path], case: str) -> None:
    name, changes, told = BAD[case]
    with pytest.raises(QuantkitError, match=told) as caught:
        assert CheckpointSource(copy(name, **changes)).metadata
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [7, [], [-1], ["a"], [1 << 40], [1] * 100_000])
def test_suppressed_tokens_that_are_none_are_refused(copy: Callable[..., Path], tokens: Any) -> None:
    directory = copy("tiny-gemma4-unified")
    (directory / "generation_config.json").write_text(json.dumps({"suppress_tokens": tokens}))
    with pytest.raises(QuantkitError, match=r"generation_config\.json: suppress_tokens is") as caught:
        _ = CheckpointSource(directory).metadata
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [("tiny-gemma3n", "Gemma3nForConditionalGeneration"), ("tiny-gemma4", "Gemma4ForConditionalGeneration")],
)
def test_the_text_model_of_a_wrapper_is_the_same(
    tiny: dict[str, Path], copy: Callable[..., Path], name: str, wrapper: str
) -> None:
    """As published: with the towers of images and sounds, and the text model's config within another."""
    from safetensors.numpy import save_file

    plain = json.loads((tiny[name] / "config.json").read_text())
    wrapped = copy(name)
    outer = {"architectures": [wrapper], "model_type": name, "text_config": {**plain, "architectures": None}}
    (wrapped / "config.json").write_text(json.dumps(outer))
    raw = (wrapped / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    start = header.pop("__metadata__", None)
    renamed = {key.replace("model.", "model.language_model.", 1): entry for key, entry in header.items()}
    text = json.dumps({"__metadata__": start, **renamed}).encode()
    (wrapped / "model-00001-of-00002.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    (wrapped / "model.safetensors").unlink()
    others = {
        f"model.{part}.weight": np.zeros((2, 2), np.float32)
        for part in ("vision_tower.layers.0.mlp", "audio_tower.layers.0.mlp", "embed_vision.embedding_projection")
    }
    save_file(others, wrapped / "model-00002-of-00002.safetensors")
    index = dict.fromkeys(renamed, "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(others, "model-00002-of-00002.safetensors")
    (wrapped / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ours, expected = CheckpointSource(wrapped), CheckpointSource(tiny[name])
    assert ours.tensors == expected.tensors
    assert all(np.array_equal(ours.read(tensor), expected.read(tensor)) for tensor in expected.tensors)
    records = [
        [(key, value.type, bytes(value.raw)) for key, value in each.metadata.items()] for each in (ours, expected)
    ]
    assert records[0] == records[1]
