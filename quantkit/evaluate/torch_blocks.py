"""Blocks decoded by torch: packed weights go to the device and become numbers there.

The values are those of `blocks.decode`, bit for bit: the same products and sums of float32, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantkit.blocks.types import GGMLType

_NIBBLES = (0, 4)
_PAIRS = (0, 2, 4, 6)
# Weights that are decoded together: what stands beside the result for a moment is a few times as large.
_TOGETHER = 1 << 26


def decode(rows: Any, kind: GGMLType, dtype: Any = torch.float32) -> Any:
    """Dequantize `rows`, uint8 [n_rows, bytes of a row] on any device, to `dtype` [n_rows, n_per_row] there.

    The numbers are float32 and then rounded to `dtype`. `kind` must be one of DECODABLE.
    """
    n_rows, nbytes = rows.shape
    n_per_row = nbytes // kind.type_size * kind.block_size
    out = torch.empty((n_rows, n_per_row), dtype=dtype, device=rows.device)
    step = max(1, _TOGETHER // max(1, n_per_row))
    for at in range(0, n_rows, step):
        part = rows[at : at + step].contiguous()
        out[at : at + step] = _DECODERS[kind](part.view(-1, kind.type_size), kind).view(-1, n_per_row)
    return out


def _floats(blocks: Any, at: int, dtype: Any = torch.float16) -> Any:
    """The float16 at byte `at` of each block: float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(dtype).float()


def _fields(packed: Any, shifts: tuple[int, ...], mask: int) -> Any:
    """Bits of `packed` [..., bytes]: those at the first of `shifts` of all bytes, then those at the next."""
    return torch.stack([(packed >> shift) & mask for shift in shifts], dim=-2)


def _plain(dtype: Any) -> Callable[[Any, GGMLType], Any]:
    def decode_plain(blocks: Any, kind: GGMLType) -> Any:
        return blocks.view(dtype).float()

    return decode_plain


def _legacy(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    affine, five = "m" in layout.sizes, "qh" in layout.sizes
    levels = _fields(blocks[:, layout.qs : layout.qs + 16], _NIBBLES, 15).flatten(1)
    if five:
        tops = _fields(blocks[:, layout.qh : layout.qh + 4], tuple(range(8)), 1).transpose(1, 2).flatten(1)
        levels = levels | (tops << 4)
    middle = 0 if affine else 16 if five else 8
    values = (levels.float() - middle) * _floats(blocks, layout.d)
    return values + _floats(blocks, layout.m) if affine else values


def _q8_0(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    return blocks[:, layout.qs :].contiguous().view(torch.int8).float() * _floats(blocks, layout.d)


def _affine(blocks: Any, kind: GGMLType, levels: Any, codes: Any, low_codes: Any) -> Any:
    """Levels [blocks, sub-blocks, weights] times their scales, minus their minimums."""
    layout = kind.layout
    steps = _floats(blocks, layout.d) * codes.float()
    lows = _floats(blocks, layout.dmin) * low_codes.float()
    return steps[:, :, None] * levels.float() - lows[:, :, None]


def _q2_k(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    codes = blocks[:, layout.scales : layout.scales + 16]
    return _affine(blocks, kind, _pairs(blocks, layout.qs).view(-1, 16, 16), codes & 15, codes >> 4)


def _pairs(blocks: Any, at: int) -> Any:
    """256 levels of two bits: of 32 bytes the lowest bits, then the next, ..., and then of the next 32 bytes."""
    return _fields(blocks[:, at : at + 64].view(-1, 2, 32), _PAIRS, 3)


def _q4_k(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    heads = blocks[:, layout.scales : layout.scales + 12]
    first, second, last = heads[:, :4], heads[:, 4:8], heads[:, 8:]
    codes = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], dim=1)
    low_codes = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], dim=1)
    levels = _fields(blocks[:, layout.qs : layout.qs + 128].view(-1, 4, 32), _NIBBLES, 15).view(-1, 8, 32)
    if "qh" in layout.sizes:
        levels = levels | (_fields(blocks[:, layout.qh : layout.qh + 32], tuple(range(8)), 1) << 4)
    return _affine(blocks, kind, levels, codes, low_codes)


def _q3_k(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    heads = blocks[:, layout.scales : layout.scales + 12]
    low = _fields(heads[:, :8], _NIBBLES, 15).flatten(1)
    high = _fields(heads[:, 8:], _PAIRS, 3).flatten(1)
    codes = (low | (high << 4)).float() - 32
    tops = _fields(blocks[:, layout.hmask : layout.hmask + 32], tuple(range(8)), 1)
    levels = _pairs(blocks, layout.qs).view(-1, 8, 32) | (tops << 2)
    steps = _floats(blocks, layout.d) * codes
    return steps[:, :, None] * (levels.view(-1, 16, 16).float() - 4)


def _q6_k(blocks: Any, kind: GGMLType) -> Any:
    layout = kind.layout
    low = _fields(blocks[:, layout.ql : layout.ql + 128].view(-1, 2, 64), _NIBBLES, 15).view(-1, 2, 4, 32)
    high = _fields(blocks[:, layout.qh : layout.qh + 64].view(-1, 2, 32), _PAIRS, 3)
    codes = blocks[:, layout.scales : layout.scales + 16].contiguous().view(torch.int8).float()
    steps = _floats(blocks, layout.d) * codes
    return steps[:, :, None] * ((low | (high << 4)).view(-1, 16, 16).float() - 32)


def _table(values: Any, levels: Any) -> Any:
    return torch.from_numpy(values).to(levels.device)[levels.int()]


def _iq4_nl(blocks: Any, kind: GGMLType) -> Any:
    from quantkit.blocks.nonlinear import VALUES

    layout = kind.layout
    levels = _fields(blocks[:, layout.qs : layout.qs + 16], _NIBBLES, 15).flatten(1)
    return _floats(blocks, layout.d) * _table(VALUES, levels)


def _iq4_xs(blocks: Any, kind: GGMLType) -> Any:
    from quantkit.blocks.nonlinear import VALUES

    layout = kind.layout
    low = _fields(blocks[:, layout.scales_l : layout.scales_l + 4], _NIBBLES, 15).transpose(1, 2).flatten(1)
    high = _fields(blocks[:, layout.scales_h : layout.scales_h + 2], _PAIRS, 3).transpose(1, 2).flatten(1)
    steps = _floats(blocks, layout.d) * ((low | (high << 4)).float() - 32)
    levels = _fields(blocks[:, layout.qs : layout.qs + 128].view(-1, 8, 16), _NIBBLES, 15).flatten(2)
    return steps[:, :, None] * _table(VALUES, levels)


def _mxfp4(blocks: Any, kind: GGMLType) -> Any:
    from quantkit.blocks.float4 import VALUES

    layout = kind.layout
    codes = blocks[:, layout.e : layout.e + 1].int()
    # Half of the power of two: the two least have no exponent of their own in a float32.
    bits = torch.where(codes < 2, 0x00200000 << codes.clamp(max=1), (codes - 1) << 23)
    levels = _fields(blocks[:, layout.qs : layout.qs + 16], _NIBBLES, 15).flatten(1)
    return bits.view(torch.float32) * _table(VALUES, levels)


_DECODERS: dict[GGMLType, Callable[[Any, GGMLType], Any]] = {
    GGMLType.F32: _plain(torch.float32),
    GGMLType.F16: _plain(torch.float16),
    GGMLType.BF16: _plain(torch.bfloat16),
    GGMLType.Q4_0: _legacy,
    GGMLType.Q4_1: _legacy,
    GGMLType.Q5_0: _legacy,
    GGMLType.Q5_1: _legacy,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q4_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}
DECODABLE: frozenset[GGMLType] = frozenset(_DECODERS)
