"""Which kernels a measurement will need, so that a first run can compile them side by side."""

from __future__ import annotations

from collections.abc import Iterable

from numba.core import types

from quantkit import blocks
from quantkit.blocks.types import GGMLType
from quantkit.compile.ahead import KernelJob
from quantkit.evaluate import activation_kernels, attention_kernels, logit_kernels, norm_kernels
from quantkit.evaluate.inputs import add_squares
from quantkit.sources.source import TensorSource
from quantkit.vocabulary import merges

_INT, _FLOAT, _DOUBLE = types.int64, types.float32, types.float64


def measuring_kernels(
    source: TensorSource, others: Iterable[GGMLType] = (), comparing: bool = False, inputs: bool = False
) -> list[KernelJob]:
    """The kernels that measuring `source` with numpy will need, the longest to compile last.

    `others` are the types of further models' tensors. `comparing` measures the divergence from another model, `inputs`
    only what goes into each matrix, else it is perplexity alone. What only some architectures need is not among them.
    """
    known = set(blocks.encodable())
    kinds = dict.fromkeys([*(info.type for info in source.tensors.values()), *others])
    vector, matrix, cube, heads = (types.Array(_FLOAT, n, "C") for n in (1, 2, 3, 4))
    small, entries, ids = (types.Array(types.int32, n, "C") for n in (1, 2, 3))
    doubles, state, ints = types.Array(_DOUBLE, 1, "C"), types.Array(_DOUBLE, 2, "C"), types.Array(_INT, 1, "C")
    split = (matrix, _INT, matrix, matrix, _INT, types.boolean, _FLOAT, heads)
    found = [
        *blocks.codec_kernels(decoded=[kind for kind in kinds if kind in known]),
        KernelJob(norm_kernels.add, (matrix, matrix), 0.2),
        KernelJob(norm_kernels.add_rms_norm, (matrix, matrix, vector, _DOUBLE, matrix), 0.3),
        KernelJob(activation_kernels.silu_gate, (matrix, matrix), 0.3),
        KernelJob(norm_kernels.rms_norm, (matrix, vector, _DOUBLE, matrix), 0.4),
        KernelJob(attention_kernels.split_heads, split, 0.6),
    ]
    if source.metadata.string("tokenizer.ggml.model", "") in ("gpt2", "llama"):
        found.append(KernelJob(merges._fill, (ints, entries, types.uint64, ints, small, small), 0.3))
        found.append(KernelJob(merges._merge, (ints, entries, types.uint64, small, ints, small, small, _INT), 1.2))
    if comparing:
        found.append(KernelJob(logit_kernels.compare_tile, (matrix, matrix, _INT, small, state, cube, ids), 1.4))
    elif inputs:
        found.append(KernelJob(add_squares, (matrix, doubles), 0.2))
    else:
        found.append(KernelJob(logit_kernels.score_tile, (matrix, _INT, small, doubles, doubles, doubles), 0.6))
    reach = types.UniTuple(_INT, 3)
    attention = (cube, matrix, matrix, _INT, _INT, reach, _FLOAT, vector, matrix, vector, matrix, _INT)
    return [*found, KernelJob(attention_kernels.attention, attention, 4.0)]
