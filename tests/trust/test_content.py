"""The check of tensors' bytes against llama.cpp's own."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from conftest import requires_reference

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.trust.content import searches
from quantkit.trust.content_kernels import pairs_below_3, trits

TERNARY = (GGMLType.TQ1_0, GGMLType.TQ2_0)


def first_wrong(kind: GGMLType, data: np.ndarray) -> int:
    found = [at for search in searches(kind).values() if (at := search(data)) >= 0]
    return min(found, default=-1)


@requires_reference
@pytest.mark.parametrize("kind", [k for k in GGMLType if k != GGMLType.Q8_1], ids=lambda kind: kind.name)
def test_finite_scales_as_llama_cpp_wants_them(kind: GGMLType) -> None:
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_validate_row_data.restype = ctypes.c_bool
    rng, n_bad = np.random.default_rng(int(kind)), 0
    for _ in range(400):
        n_blocks = 3 if kind.is_quantized else 64
        data = rng.integers(0, 256, n_blocks * kind.type_size, np.uint8)
        if rng.random() < 0.3:
            data[rng.integers(0, data.size - 1)] = rng.choice([0x7C, 0x7F, 0xFC, 0xFF])
        pointer = data.ctypes.data_as(ctypes.c_void_p)
        theirs = library.ggml_validate_row_data(int(kind), pointer, ctypes.c_size_t(data.size))
        ours = [search(data) for what, search in searches(kind).items() if kind not in TERNARY or "scale" in what]
        n_bad += not theirs
        assert (max(ours, default=-1) < 0) == theirs
    assert n_bad or not searches(kind)


@pytest.mark.parametrize("kind", blocks.encodable(), ids=lambda kind: kind.name)
def test_what_encoders_write_is_legal(kind: GGMLType) -> None:
    rows = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    rows[3] = 0
    weights = np.ones(512, np.float32)
    data = blocks.encode(rows, kind, weights).reshape(-1)
    assert first_wrong(kind, data) == -1


@pytest.mark.parametrize("kind", TERNARY, ids=lambda kind: kind.name)
def test_codes_that_are_no_ternary_digits(kind: GGMLType) -> None:
    data = blocks.encode(np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32), kind)
    data[5, 3] = 0xFF if kind == GGMLType.TQ2_0 else int(np.flatnonzero(~trits(5))[0])
    assert first_wrong(kind, data.reshape(-1)) == 5
    assert trits(5).sum() == 243 and trits(4).sum() == 81 and pairs_below_3().sum() == 81


def test_the_place_is_named() -> None:
    values = np.zeros(20_000, np.float32)
    values[12_345] = np.nan
    for kind, data in ((GGMLType.F32, values), (GGMLType.F16, values.astype(np.float16))):
        assert first_wrong(kind, data.view(np.uint8)) == 12_345
