"""What holds for every block format whatever the rows are."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import block_rows

import quantkit
from quantkit import GGMLType, QuantkitError, blocks

KINDS = blocks.encodable()
QUANTIZED = [kind for kind in KINDS if kind.is_quantized]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_quantized = pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
# The largest error of a weight, as a share of the largest weight of its row, for rows of one scale.
# Half a step of the coarsest grid that the format can choose, with room for the rounding of its scales.
BOUNDS = {
    GGMLType.F16: 2**-11, GGMLType.BF16: 2**-8, GGMLType.F32: 0, GGMLType.Q8_0: 0.5 / 127 + 2**-11,
    GGMLType.Q6_K: 0.04, GGMLType.Q5_0: 1 / 16 + 2**-11, GGMLType.Q5_1: 0.04, GGMLType.Q5_K: 0.06,
    GGMLType.Q4_0: 1 / 8 + 2**-11, GGMLType.Q4_1: 0.08, GGMLType.Q4_K: 0.12, GGMLType.IQ4_NL: 0.2,
    GGMLType.IQ4_XS: 0.25, GGMLType.MXFP4: 0.26, GGMLType.NVFP4: 0.2, GGMLType.Q3_K: 0.4, GGMLType.Q2_K: 0.6,
    GGMLType.TQ1_0: 0.5, GGMLType.TQ2_0: 0.5, GGMLType.Q2_0: 0.5,
}  # fmt: skip


def weights_for(kind: GGMLType, n: int) -> np.ndarray | None:
    return np.linspace(0.1, 3, n, dtype=np.float32) if kind in block_rows.NEED_WEIGHTS else None


def finite_rows(n_per_row: int, limit: float = 1e4) -> st.SearchStrategy[np.ndarray]:
    number = st.floats(-limit, limit, width=32)
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(n_per_row)), elements=number, fill=number)


@each_kind
def test_rows_are_independent_and_order_of_work_does_not_matter(kind: GGMLType) -> None:
    rows = np.concatenate([np.stack(list(block_rows.named_rows().values()))[::4], block_rows.random_rows(13)])
    for weights in (weights_for(kind, rows.shape[1]), block_rows.importance()["uneven"]):
        together = blocks.encode(rows, kind, weights)
        apart = np.concatenate([blocks.encode(row[None], kind, weights) for row in rows])
        assert np.array_equal(together, apart)
        some = np.concatenate([blocks.encode(part, kind, weights) for part in np.array_split(rows, 5)])
        assert np.array_equal(together, some)
        with ThreadPoolExecutor(4) as pool:
            threads = list(pool.map(blocks.encode, [rows] * 4, [kind] * 4, [weights] * 4))
        assert all(np.array_equal(together, again) for again in threads)


@each_quantized
def test_any_number_of_blocks(kind: GGMLType) -> None:
    rows = block_rows.random_rows(1, 40 * 256).reshape(-1, kind.block_size)
    weights = weights_for(kind, kind.block_size)
    whole = blocks.encode(rows, kind, weights)
    for count in (1, 2, 3, 7, 15, 16, 17, 31, 33):
        assert np.array_equal(blocks.encode(rows[:count], kind, weights), whole[:count])
        assert np.array_equal(blocks.decode(whole[:count], kind), blocks.decode(whole, kind)[:count])


@each_kind
def test_weights_belong_to_their_columns(kind: GGMLType) -> None:
    rows = block_rows.random_rows(3, 512)
    weights = np.exp(np.random.default_rng(6).standard_normal(512)).astype(np.float32)
    whole = blocks.encode(rows, kind, weights)
    if kind in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1):
        return  # their weights depend on the whole row
    half = kind.row_nbytes(256)
    assert np.array_equal(whole[:, half:], blocks.encode(rows[:, 256:], kind, weights[256:]))


@each_kind
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_error_is_bounded(kind: GGMLType, data: st.DataObject) -> None:
    # NVFP4 has no scale for rows: 448 * 6 is its largest weight, and it drops those below 6 * 2**-10.
    small = kind == GGMLType.NVFP4
    rows = data.draw(finite_rows(256, 2500 if small else 1e4))
    encoded = blocks.encode(rows, kind, weights_for(kind, 256))
    decoded = blocks.decode(encoded, kind)
    assert encoded.shape == (len(rows), kind.row_nbytes(256)) and decoded.shape == rows.shape
    assert np.isfinite(decoded).all()
    if kind in BOUNDS:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        # A float16 scale loses up to half of 2**-24, and is multiplied with up to 4096: in Q6_K with 128 and 32.
        lost = 6 * 2**-10 if small else 4096 * 2**-25
        assert (np.abs(decoded - rows) <= BOUNDS[kind] * largest + lost).all()


@each_kind
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_zeros_stay_zeros(kind: GGMLType, data: st.DataObject) -> None:
    sign = data.draw(hnp.arrays(np.bool_, (2, 256)))
    rows = np.where(sign, np.float32(-0.0), np.float32(0.0))
    assert not blocks.decode(blocks.encode(rows, kind, weights_for(kind, 256)), kind).any()


STABLE = [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.MXFP4]


@pytest.mark.parametrize("kind", [k for k in STABLE if k in KINDS], ids=lambda kind: kind.name)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_was_decoded_decodes_to_itself(kind: GGMLType, data: st.DataObject) -> None:
    rows = data.draw(finite_rows(256, 1e3))
    once = blocks.decode(blocks.encode(rows, kind), kind)
    twice = blocks.decode(blocks.encode(once, kind), kind)
    # The scale of Q8_0 is recomputed from 127 times a float16, which can move it by an ulp of float16.
    assert np.allclose(once, twice, rtol=2**-9 if kind == GGMLType.Q8_0 else 0, atol=1e-5)


def test_layouts_are_ggufs() -> None:
    for kind in GGMLType:
        if kind == GGMLType.Q2_0:  # newer than gguf
            continue
        theirs = gguf.GGMLQuantizationType(int(kind))
        assert theirs.name == kind.name
        if kind != GGMLType.Q8_1:  # gguf has an old layout of this type, which no file holds
            assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_size, kind.type_size)


def test_a_layout_says_where_its_fields_begin() -> None:
    layout = GGMLType.Q4_K.layout
    assert [getattr(layout, field) for field in layout.sizes] == [0, 2, 4, 16]
    assert (layout.nbytes, layout.qs) == (144, 16)
    assert copy.deepcopy(layout).offsets == layout.offsets
    with pytest.raises(AttributeError, match=r"Layout\(d=2, dmin=2, scales=12, qs=128\) has no field 'qh'"):
        layout.qh  # noqa: B018


def test_public_functions_take_any_shape_and_bytes() -> None:
    rows = block_rows.random_rows(6, 64).reshape(2, 3, 64)
    data = quantkit.quantize_rows(rows, "q8_0")
    assert data.shape == (2, 3, 68) and data.dtype == np.uint8
    decoded = quantkit.dequantize_rows(data, "Q8_0")
    assert decoded.shape == rows.shape
    assert np.array_equal(quantkit.dequantize_rows(data.tobytes(), GGMLType.Q8_0, 64), decoded.reshape(6, 64))
    assert np.array_equal(quantkit.quantize_rows(rows[0, 0].tolist(), GGMLType.Q8_0), data[0, 0])


def test_bad_input_is_one_clear_line() -> None:
    rows = np.zeros((2, 64), np.float32)
    for call, says in [
        (lambda: quantkit.quantize_rows(rows, "Q9_9"), "unknown tensor type 'Q9_9'"),
        (lambda: quantkit.quantize_rows(rows, "Q4_K"), "a row of 64 weights cannot hold Q4_K: its blocks are of 256"),
        (lambda: quantkit.quantize_rows(rows, "I32"), "I32 cannot be encoded or decoded"),
        (lambda: quantkit.quantize_rows(np.float32(1), "Q8_0"), "at least one dimension"),
        (lambda: quantkit.quantize_rows(rows[:, :0], "Q8_0"), "not empty"),
        (lambda: quantkit.quantize_rows(rows, "Q4_0", np.ones(32)), "(32,) importance weights for rows of 64"),
        (lambda: quantkit.dequantize_rows(np.zeros(35, np.uint8), "Q8_0"), "rows of 35 bytes do not hold Q8_0"),
        (lambda: quantkit.dequantize_rows(np.zeros(34, np.int8), "Q8_0"), "needs bytes (uint8), not int8"),
        (lambda: quantkit.dequantize_rows(bytes(50), "Q8_0", 32), "do not make Q8_0 rows of 32 weights"),
        (lambda: quantkit.dequantize_rows(bytes(32), "I32"), "I32 cannot be encoded or decoded"),
    ]:
        with pytest.raises(QuantkitError) as raised:
            call()
        assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 100), at=st.integers(0, 99))
def test_first_nonfinite_finds_the_first(bad: float, size: int, at: int) -> None:
    rows = np.full((1, size), 3e38, np.float32)
    assert blocks.first_nonfinite(rows) == -1
    if at < size:
        rows[0, at:] = bad
        assert blocks.first_nonfinite(rows) == at


@given(st.data(), st.sampled_from([GGMLType.F32, GGMLType.F16, GGMLType.BF16]))
def test_nonfinite_floats_are_found_as_they_stand(data: st.DataObject, kind: GGMLType) -> None:
    """Any bits: the first that decodes to NaN or infinity, at even and odd addresses."""
    size = kind.type_size
    values = data.draw(st.lists(st.integers(0, 256**size - 1), min_size=1, max_size=40))
    odd = data.draw(st.integers(0, 1))
    stored = b"\0" * odd + b"".join(value.to_bytes(size, "little") for value in values)
    rows = np.frombuffer(stored, np.uint8)[odd:].reshape(1, -1)
    wild = np.flatnonzero(~np.isfinite(blocks.decode(rows.copy(), kind)))
    assert blocks.first_nonfinite_stored(rows, kind) == (wild[0] if wild.size else -1)
