"""Blocks decoded by torch: the numbers of the kernels, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import requires_torch

from quantkit import blocks
from quantkit.blocks.types import GGMLType

pytestmark = requires_torch


NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"


@pytest.mark.parametrize("kind", [GGMLType[name] for name in NAMES.split()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("together", [1 << 26, 3 * 512])
def test_bytes_of_any_kind_decode_to_the_same_bits(kind: GGMLType, together: int, monkeypatch) -> None:
    import torch

    from quantkit.evaluate import torch_blocks

    assert kind in torch_blocks.DECODABLE
    monkeypatch.setattr(torch_blocks, "_TOGETHER", together)
    # All bytes at random: codes of every size, and floats of every exponent, infinities and NaNs.
    data = np.random.default_rng(1).integers(0, 256, (40, kind.row_nbytes(512))).astype(np.uint8)
    expected = blocks.decode(data, kind)
    found = torch_blocks.decode(torch.from_numpy(data), kind)
    same = found.numpy().view(np.uint32) == expected.view(np.uint32)
    # A NaN's sign and payload say nothing.
    assert (same | (np.isnan(found.numpy()) & np.isnan(expected))).all()
    half = torch_blocks.decode(torch.from_numpy(data), kind, torch.bfloat16)
    assert torch.equal(half.nan_to_num(), torch.from_numpy(expected).bfloat16().nan_to_num())
