"""Projectors (mmproj files) against what the reference converter makes of the same checkpoints."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import requires_reference
from make_checkpoints import LLAVA, PROJECTORS, make_checkpoint
from safetensors.numpy import load_file, save_file
from support.conversion import (
    OUTTYPES,
    assert_recorded,
    changed_copy,
    golden,
    metadata_records,
    sha256,
    tensor_records,
    write,
)  # fmt: skip
from support.llama_reference import llama_sees, llama_senses
from support.program import call

from quantkit.architectures.projectors import PROJECTORS as FAMILIES
from quantkit.architectures.projectors import load_projector
from quantkit.architectures.projectors.qwen2_vl import Qwen2VlProjector
from quantkit.errors import QuantkitError
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.projector import ProjectorSource


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("projectors")
    return {name: make_checkpoint(name, parent) for name in PROJECTORS | LLAVA}


def test_every_projector_has_a_checkpoint() -> None:
    made = {recipe.config["architectures"][0] for recipe in (PROJECTORS | LLAVA).values()}
    assert all(made & {*family.checkpoints} for family in FAMILIES)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", PROJECTORS)
def test_the_file_is_the_reference_converters(tiny: dict[str, Path], tmp_path: Path, name: str, outtype: Any) -> None:
    assert_recorded(ProjectorSource(tiny[name], outtype), golden(name)[outtype], tmp_path / "out.gguf")


@pytest.mark.parametrize("outtype", ["f32", "f16"])
@pytest.mark.parametrize("name", LLAVA)
def test_llava_is_what_older_scripts_make(tiny: dict[str, Path], name: str, outtype: Any) -> None:
    """The converter does not know it; their files have the tensors in another order, and no `general.type`."""
    source, wanted = ProjectorSource(tiny[name], outtype), golden(name)[outtype]
    own = [record for record in metadata_records(source) if record[0].startswith("clip.")]
    assert own == [(key, digest) for key, _, digest, _ in wanted["metadata"]]
    assert sorted(tensor_records(source)) == sorted(wanted["tensors"])


@pytest.mark.parametrize("outtype", ["auto", "bf16", "q8_0"])
def test_llava_in_types_that_the_scripts_do_not_know(tiny: dict[str, Path], outtype: Any) -> None:
    source = ProjectorSource(tiny["tiny-eye-llava16"], outtype)
    assert source.tensors["mm.2.weight"].type == source.tensors["v.blk.0.ffn_up.weight"].type == source.type
    assert source.tensors["v.patch_embd.weight"].type.name == "F16"
    assert source.tensors["v.position_embd.weight"].type.name == "F32"


@requires_reference
@pytest.mark.parametrize("name", PROJECTORS | LLAVA)
def test_llama_cpp_loads_the_file(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    """And computes with it, on an empty image or on silence."""
    directory = tiny[name]
    if name == "tiny-omni-qwen3":
        # llama.cpp takes what text layers are given for a part of what is seen, and then both senses for unlike.
        directory = without_deep_mergers(directory, tmp_path / "copy")
    wanted = ("eye" in name or "omni" in name), ("ear" in name or "omni" in name)
    assert llama_senses(write(ProjectorSource(directory, "f16"), tmp_path / "out.gguf")) == wanted


@requires_reference
def test_llama_cpp_computes_llava_with_the_class_token_last(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Which is where it puts it. All else of the tower, and the choice of a layer, is what transformers computes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = tiny["tiny-eye-llava15"]
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    projector = write(ProjectorSource(directory, "f32"), tmp_path / "projector.gguf")
    found = llama_sees(write(CheckpointSource(directory, "f32"), tmp_path / "text.gguf"), projector, image)

    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    embeddings = model.model.vision_tower.embeddings

    def last(pixels: Any, **_options: Any) -> Any:
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], dim=1)
        return whole + embeddings.position_embedding.weight

    embeddings.forward = last
    pixels = (image / 255 - settings["image_mean"]) / settings["image_std"]
    with torch.no_grad():
        out = model.get_image_features(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
    wanted = out.pooler_output[0].numpy()
    # llama.cpp's GELUs read tables in float16, which are within 2^-11 of them; outputs are below 0.25.
    np.testing.assert_allclose(found, wanted, atol=0.25 * 2**-9)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("tiny-eye-llava16", "LlavaForConditionalGeneration"),
        ("tiny-ear-flamingo", "Qwen2AudioForConditionalGeneration"),
        ("tiny-eye-lfm2", "Lfm2ForCausalLM"),
    ],
)
def test_the_text_model_is_read_like_that_of_another_wrapper(
    tiny: dict[str, Path], tmp_path: Path, name: str, known: str
) -> None:
    own = CheckpointSource(tiny[name])
    other = CheckpointSource(changed_copy(tiny[name], tmp_path / name, architectures=[known]))
    assert dict(own.tensors) == dict(other.tensors)
    assert metadata_records(own) == metadata_records(other)


def without_deep_mergers(checkpoint: Path, target: Path) -> Path:
    """Qwen3-Omni that gives nothing to text layers."""
    thinker = json.loads((checkpoint / "config.json").read_text())["thinker_config"]
    thinker["vision_config"]["deepstack_visual_indexes"] = []
    directory = changed_copy(checkpoint, target, thinker_config=thinker)
    stored = without(directory, "merger_list")
    assert stored
    return directory


def without(directory: Path, part: str) -> list[str]:
    """Take the tensors with `part` in their names away, and say which they were."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    stored = json.loads(data[8:end])
    gone = [name for name in stored if part in name]
    kept: dict[str, Any] = {}
    body = b""
    for name, entry in stored.items():
        if name not in gone and name != "__metadata__":
            first, last = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(body), len(body) + last - first]}
            body += data[end + first : end + last]
    header = json.dumps(kept).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return gone


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tiny-ear-qwen2-audio", "", "model."),
        # As transformers 5 saves it, and as it keeps it.
        ("tiny-eye-llava15", "vision_tower.vision_model.", "vision_tower."),
        ("tiny-eye-llava16", "vision_tower.vision_model.", "model.vision_tower."),
        ("tiny-eye-llava16", "image_newline", "model.image_newline"),
        ("tiny-eye-lfm2", "model.vision_tower.vision_model.", "model.vision_tower."),
        ("tiny-ear-voxtral", "multi_modal_projector.", "model.multi_modal_projector."),
        ("tiny-omni-qwen25", "thinker.", ""),
        # As it is published, which the reference fails on.
        ("tiny-omni-qwen3", "visual.", "thinker.visual."),
        # As transformers saves it, which the reference fails on too.
        ("tiny-ear-qwen3-asr", "thinker.audio_tower.proj", "model.multi_modal_projector.linear_"),
        ("tiny-ear-qwen3-asr", "thinker.audio_tower.", "model.audio_tower."),
    ],
)
def test_other_names_give_the_same(tiny: dict[str, Path], tmp_path: Path, name: str, before: str, after: str) -> None:
    whole = ProjectorSource(tiny[name])
    directory = changed_copy(tiny[name], tmp_path / "copy")
    renamed(directory, lambda n: after + n.removeprefix(before) if n.startswith(before) else n)
    found = ProjectorSource(directory)
    assert dict(found.tensors) == dict(whole.tensors)
    assert all(np.array_equal(found.read(name), whole.read(name)) for name in whole.tensors)


def test_a_thinker_of_its_own_is_read_like_one_within(tiny: dict[str, Path], tmp_path: Path) -> None:
    """transformers saves Qwen3-ASR without a field around what it is."""
    config = json.loads((tiny["tiny-ear-qwen3-asr"] / "config.json").read_text())
    directory = changed_copy(
        tiny["tiny-ear-qwen3-asr"], tmp_path / "copy", thinker_config="absent", **config["thinker_config"]
    )
    found, whole = ProjectorSource(directory).metadata, ProjectorSource(tiny["tiny-ear-qwen3-asr"]).metadata
    keys = [key for key in whole if key.startswith("clip.")]
    assert keys and [found[key].raw for key in keys] == [whole[key].raw for key in keys]


def test_names_of_other_versions_of_transformers_are_known(tiny: dict[str, Path], tmp_path: Path) -> None:
    """transformers 5 saves Gemma 3's tower with a level less, and some write `model.` before everything."""
    whole = ProjectorSource(tiny["tiny-eye-gemma3"])
    for before, after in (("vision_tower.vision_model.", "vision_tower."), ("", "model.")):
        directory = changed_copy(tiny["tiny-eye-gemma3"], tmp_path / after)
        renamed(directory, lambda n, b=before, a=after: a + n.removeprefix(b) if n.startswith(b) else n)
        found = ProjectorSource(directory)
        assert found.tensors == whole.tensors
        assert all(np.array_equal(found.read(name), whole.read(name)) for name in whole.tensors)


def renamed(directory: Path, new_name: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint other names."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    stored = json.loads(data[8:end])
    header = json.dumps({n if n == "__metadata__" else new_name(n): v for n, v in stored.items()}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def test_the_token_between_rows_is_found_by_published_names(tiny: dict[str, Path], tmp_path: Path) -> None:
    whole = ProjectorSource(tiny["tiny-eye-mistral3"])
    directory = changed_copy(tiny["tiny-eye-mistral3"], tmp_path / "copy")
    renamed(directory, lambda name: name.replace("model.embed", "language_model.model.embed"))
    found = ProjectorSource(directory)
    np.testing.assert_array_equal(found.read("v.token_embd.img_break"), whole.read("v.token_embd.img_break"))
    for place in ("tokenizer_config.json", "tokenizer.json"):
        content = (directory / place).read_text()
        (directory / place).write_text(content.replace("[IMG_BREAK]", "[OTHER]"))
    with pytest.raises(QuantkitError, match="no token"):
        ProjectorSource(directory)


def test_a_projector_is_pickled_and_seen_as_another_type(tiny: dict[str, Path]) -> None:
    source = ProjectorSource(tiny["tiny-eye-qwen3-vl"])
    again = pickle.loads(pickle.dumps(source.seen_as("f32")))
    assert again.type.name == "F32" and list(again.tensors) == list(source.tensors)
    assert again.metadata["general.type"].value == "mmproj"


@pytest.mark.parametrize(
    "lost",
    ["model.vision_model.encoder.layers.1.mlp.fc1.weight", "model.connector.modality_projection.proj.weight"],
)
def test_a_missing_tensor_is_named(tiny: dict[str, Path], tmp_path: Path, lost: str) -> None:
    directory = changed_copy(tiny["tiny-eye-smolvlm"], tmp_path / "copy")
    stored = load_file(directory / "model.safetensors")
    del stored[lost]
    save_file(stored, directory / "model.safetensors")
    name = "v.blk.1.ffn_up.weight" if "fc1" in lost else "mm.model.fc.weight"
    with pytest.raises(QuantkitError, match=f"the projector lacks {name}; is the checkpoint whole"):
        ProjectorSource(directory)


@pytest.mark.parametrize(
    ("name", "part", "told"),
    [
        ("tiny-ear-voxtral", "multi_modal_projector.linear_2", "lacks mm.a.mlp.2.weight; is the checkpoint whole"),
        ("tiny-ear-ultravox", "ln_mid", "lacks mm.a.norm_mid.weight; is the checkpoint whole"),
        ("tiny-ear-qwen2-audio", "layers.2.fc1", "lacks a.blk.2.ffn_up.bias, a.blk.2.ffn_up.weight; is the checkpoint"),
        ("tiny-omni-qwen25", "audio_tower.ln_post", "lacks a.post_ln.weight, a.post_ln.bias; is the checkpoint whole"),
        ("tiny-omni-gemma4", "layers.1.self_attn.q_proj.input_max", "lacks a.blk.1.attn_q.input_max; is"),
        ("tiny-eye-llava15", "linear_2.weight", "lacks mm.2.weight; is the checkpoint whole"),
        ("tiny-eye-llava15", "layers.1.mlp.fc1.weight", "lacks v.blk.1.ffn_down.weight; is the checkpoint whole"),
        ("tiny-omni-gemma4-unified", "pos_norm.bias", "lacks v.patch_norm.3.bias; is the checkpoint whole"),
        ("tiny-omni-gemma4", "embed_audio", "lacks mm.a.input_projection.weight; is the checkpoint whole"),
    ],
)
def test_what_is_lacking_is_named(tiny: dict[str, Path], tmp_path: Path, name: str, part: str, told: str) -> None:
    directory = changed_copy(tiny[name], tmp_path / "copy")
    assert without(directory, part)
    with pytest.raises(QuantkitError, match=told):
        ProjectorSource(directory)


def test_an_ear_that_is_not_announced_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = changed_copy(tiny["tiny-omni-gemma4"], tmp_path / "copy", audio_config=None)
    with pytest.raises(QuantkitError, match=r"it has no audio_config, and there is (mm\.)?a\."):
        ProjectorSource(directory)
    directory = changed_copy(tiny["tiny-ear-voxtral"], tmp_path / "shallow", audio_config={"num_hidden_layers": 2})
    with pytest.raises(QuantkitError, match=r"audio_config has 2 blocks, and there is a\.blk\.2\."):
        ProjectorSource(directory)


def test_an_omni_that_hears_nothing_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny["tiny-omni-qwen3"] / "config.json").read_text())
    thinker = {**config["thinker_config"], "audio_config": None}
    with pytest.raises(QuantkitError, match=r"it has no audio_config$"):
        ProjectorSource(changed_copy(tiny["tiny-omni-qwen3"], tmp_path / "copy", thinker_config=thinker))


def test_an_unknown_tensor_of_an_ear_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = changed_copy(tiny["tiny-ear-qwen2-audio"], tmp_path / "copy")
    renamed(directory, lambda n: n.replace("audio_tower.layer_norm.bias", "audio_tower.odd.bias"))
    with pytest.raises(QuantkitError, match=r"'audio_tower\.odd\.bias' has no place"):
        ProjectorSource(directory)


def test_the_text_model_alone_is_no_projector(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = changed_copy(tiny["tiny-eye-smolvlm"], tmp_path / "copy")
    stored = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in stored.items() if k.startswith("language")}, directory / "model.safetensors")
    with pytest.raises(QuantkitError, match="it announces 2 layers, but there are only 1 tensors"):
        ProjectorSource(directory)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("gemma3", {"architectures": ["LlamaForCausalLM"]}, "the projector of LlamaForCausalLM is not supported"),
        ("gemma3", {"vision_config": "absent"}, "it has no vision_config"),
        ("gemma3", {"vision_config": {"num_hidden_layers": 1 << 30}}, "num_hidden_layers"),
        ("gemma3", {"text_config": {}}, "it lacks hidden_size"),
        ("qwen25-vl", {"vision_config": {"fullatt_block_indexes": [0, 2], "depth": 3}}, "not evenly apart"),
        ("qwen25-vl", {"vision_config": {"fullatt_block_indexes": [], "depth": 3}}, "not a list of blocks"),
        ("qwen3-vl", {"vision_config": {"deepstack_visual_indexes": [99], "depth": 3}}, "not a list of blocks"),
        ("smolvlm", {"scale_factor": "x"}, "scale_factor"),
        (
            "pixtral",
            {"vision_config": {"model_type": "siglip"}},
            "a tower of type 'siglip'",
        ),
        (
            "llava15",
            {"vision_config": {"model_type": 5}},
            "only pixtral and clip_vision_model",
        ),
        ("lfm2", {"vision_feature_layer": 2}, "not one of the 3 blocks, from the end"),
        ("lfm2", {"vision_feature_layer": "x"}, "not one of the 3 blocks, from the end"),
        ("lfm2", {"downsample_factor": [2]}, "downsample_factor"),
        ("llava15", {"vision_feature_layer": 9}, "not one of the states of 3 blocks"),
        ("llava15", {"vision_feature_layer": []}, "not one of the states of 3 blocks"),
        ("llava15", {"vision_feature_layer": [-2] * 9999}, "not one of the states of 3 blocks"),
        ("llava15", {"vision_feature_layer": 0}, "not what a block makes"),
        ("llava15", {"vision_feature_select_strategy": "full"}, "not default"),
        ("llava15", {"projector_hidden_act": "relu"}, "not gelu"),
        ("llava16", {"image_grid_pinpoints": [[32, 64], [32]]}, "image_grid_pinpoints has '\\[32\\]', not two sides"),
        ("llava16", {"image_grid_pinpoints": [[32, "x"]]}, "not a whole number"),
        ("llava16", {"image_grid_pinpoints": [[32, 32]] * 2000}, "not a list of at most 1024 sizes"),
        ("gemma4", {"vision_config": {"num_hidden_layers": 1 << 40}}, "num_hidden_layers"),
    ],
)
def test_a_bad_config_is_one_line(
    tiny: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], told: str
) -> None:
    directory = changed_copy(tiny[f"tiny-eye-{name}"], tmp_path / "copy", **changes)
    with pytest.raises(QuantkitError, match=told) as problem:
        _ = ProjectorSource(directory).metadata
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("qwen2-audio", {"audio_config": None}, "it has no audio_config"),
        ("qwen2-audio", {"audio_config": 7}, "audio_config is '7', not an object"),
        ("qwen2-audio", {"audio_config": {"encoder_layers": 1 << 30}}, "num_hidden_layers is"),
        ("qwen2-audio", {"audio_config": {"encoder_layers": 3, "num_mel_bins": -1}}, "num_mel_bins"),
        ("qwen2-audio", {"audio_config": {"encoder_layers": 3, "d_model": [64]}}, "not a whole number"),
        ("qwen2-audio", {"audio_config": {"encoder_layers": 3, "layer_norm_eps": "x"}}, "layer_norm_eps"),
        ("qwen2-audio", {"text_config": {}}, "it lacks hidden_size"),
        ("ultravox", {"stack_factor": "absent"}, "it lacks stack_factor"),
        ("ultravox", {"audio_config": {"encoder_layers": 3}}, "it lacks hidden_size"),
        ("voxtral", {"audio_config": {"num_hidden_layers": 3, "intermediate_size": 128}}, "not 4 times hidden_size"),
        ("gemma4-unified", {"vision_config": {"patch_size": 1 << 20}}, "not at most 512 pixels a token"),
        ("gemma4-unified", {"vision_config": {"patch_size": 5}}, "of 432 numbers, do not fit what config.json says"),
        ("gemma4-unified", {"vision_config": {"pooling_kernel_size": 0}}, "it lacks pooling_kernel_size"),
        ("qwen3-asr", {"thinker_config": []}, "thinker_config is '\\[\\]', not an object"),
        ("qwen3-asr", {"thinker_config": {"audio_config": {"d_model": 1 << 20}}}, "an even number from 4 to 8192"),
        ("qwen3-asr", {"thinker_config": {"audio_config": {"d_model": 63}}}, "an even number from 4 to 8192"),
    ],
)
def test_a_bad_config_of_an_ear_is_one_line(
    tiny: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], told: str
) -> None:
    kind = "omni" if "gemma4" in name else "ear"
    directory = changed_copy(tiny[f"tiny-{kind}-{name}"], tmp_path / "copy", **changes)
    with pytest.raises(QuantkitError, match=told) as problem:
        _ = ProjectorSource(directory).metadata
    assert "\n" not in str(problem.value)


def test_the_class_of_the_whole_model_counts_too(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny["tiny-eye-qwen2-vl"] / "config.json").read_text())
    text = {**config.get("text_config", {}), "architectures": ["Qwen2ForCausalLM"]}
    directory = changed_copy(tiny["tiny-eye-qwen2-vl"], tmp_path / "copy", text_config=text)
    assert isinstance(load_projector(directory), Qwen2VlProjector)


@pytest.mark.parametrize("content", ["absent", "{}", '{"image_mean": [0.5]}', '{"image_mean": [1, 2, "x"]}', "["])
def test_a_bad_preprocessor_is_one_line(tiny: dict[str, Path], tmp_path: Path, content: str) -> None:
    directory = changed_copy(tiny["tiny-eye-gemma3"], tmp_path / "copy")
    place = directory / "preprocessor_config.json"
    place.unlink() if content == "absent" else place.write_text(content)
    with pytest.raises(QuantkitError, match=r"preprocessor_config\.json") as problem:
        _ = ProjectorSource(directory).metadata
    assert "\n" not in str(problem.value)


def test_processor_config_is_read_over_the_other(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = changed_copy(tiny["tiny-eye-gemma3"], tmp_path / "copy")
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [1, 2, 3]}}))
    metadata = ProjectorSource(directory).metadata
    assert list(metadata["clip.vision.image_mean"].value) == [1, 2, 3]


def test_the_command_writes_the_projector_beside_the_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    name = "tiny-eye-qwen25-vl"
    call("convert", tiny[name], "--mmproj", "--type", "f16", "-o", f"{tmp_path}/out/")
    wanted = golden(name)["f16"]
    (made,) = (tmp_path / "out").iterdir()
    assert made.name == wanted["file"] and sha256(made.read_bytes()) == wanted["sha256"]
    assert "different files" in call("convert", tiny[name], "--mmproj", "--lora", code=2).stderr
    assert "--pre is of no use" in call("convert", tiny[name], "--mmproj", "--pre", "qwen2", code=2).stderr
