"""Mixers of other kinds than attention: what they read, and metadata that contradicts itself is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import make_checkpoint
from support.families import OTHER_MIXERS
from support.tiny import write_gguf

from quantkit.architectures import forward_spec
from quantkit.blocks import decode
from quantkit.errors import QuantkitError
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tiny-mamba2", "mamba2.ssm.group_count", 0, "impossible sizes of Mamba2: 8, 0, 64, 32"),
        ("tiny-mamba2", "mamba2.ssm.group_count", 3, "8 heads of a state space in 3 groups"),
        ("tiny-mamba2", "mamba2.ssm.time_step_rank", 7, "a state space of 512 numbers in 7 heads"),
        ("tiny-mamba2", "mamba2.ssm.state_size", 64, "blk.0.ssm_in.weight has shape"),
        ("tiny-mamba", "mamba.ssm.state_size", 1 << 27, "mamba.ssm.state_size"),
        ("tiny-mamba", "mamba.ssm.inner_size", 0, "impossible sizes of Mamba: 0"),
        ("tiny-lfm2", "lfm2.shortconv.l_cache", 0, "impossible sizes of ShortConvolution: 256, 0"),
        ("tiny-qwen35", "qwen35.ssm.group_count", 3, "4 heads of values for 3 of keys"),
        ("tiny-deepseek-v3", "deepseek2.attention.key_length_mla", 16, "impossible sizes of LatentAttention: 4, -16"),
        ("tiny-deepseek-v3", "deepseek2.rope.dimension_count", 0, "0 rotated dimensions"),
        ("tiny-nemotron-h", "nemotron_h.attention.head_count", 0, "impossible sizes of Attention: 0"),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, name: str, key: str, value: int, message: str) -> None:
    source = CheckpointSource(make_checkpoint(name, tmp_path))
    source.metadata.set(key, ValueType.UINT32, value)
    with pytest.raises(QuantkitError, match=message):
        Transformer(source).logits(np.array([[1, 2, 3]], np.int32))


@pytest.mark.parametrize("name", [*OTHER_MIXERS, "tiny-gpt-oss", "tiny-olmoe", "tiny-phi3", "tiny-bert"])
def test_descriptions_have_all_that_layers_read(tmp_path: Path, name: str) -> None:
    """Every tensor of a layer, with the shape that it is stored in."""
    source = CheckpointSource(make_checkpoint(name, tmp_path))
    spec = forward_spec(source.metadata, source.tensors)
    stored = {each: info for each, info in source.tensors.items() if each.startswith("blk.") and each not in spec.idle}
    assert stored
    assert {each: (1, *spec.shapes.get(each, ()))[-2:] for each in stored} == {
        each: (info.n_rows, info.n_per_row) for each, info in stored.items()
    }


def test_norms_without_weights_are_of_different_sizes(tmp_path: Path) -> None:
    """Falcon-Mamba normalises steps, of which there are more than numbers in a state, and both without weights.

    A step that is there twice is normalised to the same numbers, and with half the weights for each makes the same.
    """
    source = CheckpointSource(make_checkpoint("tiny-falcon-mamba", tmp_path), "f32")
    tokens = np.arange(5, 45, dtype=np.int32)[None]
    expected = Transformer(source).logits(tokens)
    weights = {
        name: decode(source.read(name), info.type).reshape(tuple(reversed(info.shape)))
        for name, info in source.tensors.items()
    }
    n_step = source.metadata.integer("mamba.ssm.time_step_rank")
    for name, values in weights.items():
        if name.endswith("ssm_x.weight"):
            weights[name] = np.concatenate([values[:n_step], values])
        elif name.endswith("ssm_dt.weight"):
            weights[name] = np.concatenate([values, values], 1) / 2
    source.metadata.set("mamba.ssm.time_step_rank", ValueType.UINT32, 2 * n_step)
    path = write_gguf(tmp_path / "twice.gguf", source.metadata, weights)
    np.testing.assert_allclose(Transformer(GGUFSource(path)).logits(tokens), expected, atol=1e-5)
