"""Mixers of other kinds than attention: metadata that contradicts itself is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import make_checkpoint

from quantkit.errors import QuantkitError
from quantkit.evaluate.transformer import Transformer
from quantkit.formats.gguf import ValueType
from quantkit.sources.checkpoint import CheckpointSource


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
