"""The statistics of an importance matrix as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.report.tables import table

if TYPE_CHECKING:
    from quantkit.evaluate.importance import LayerStatistics, TensorStatistics


def importance_tables(rows: Sequence[TensorStatistics], layers: Sequence[LayerStatistics]) -> str:
    """One table of the tensors and one of the layers, in Markdown, with llama-imatrix's columns."""
    tensors = table(
        ["tensor", "layer", "Σ(act²)", "min", "max", "μ", "σ", "active", "n", "entropy", "E (norm)", "ZD", "cos sim"],
        [
            [
                row.kind,
                "-" if row.block is None else str(row.block),
                f"{row.total:.2f}",
                f"{row.minimum:.4f}",
                f"{row.maximum:.4f}",
                f"{row.mean:.2f}",
                f"{row.deviation:.2f}",
                f"{row.active:.2%}",
                str(row.n),
                f"{row.entropy:.4f}",
                f"{row.normalised_entropy:.2%}",
                f"{row.zd:.2%}",
                f"{row.cosine:.4f}",
            ]
            for row in rows
        ],
    )
    each = [[str(x.block), f"{x.total:.2f}", f"{x.zd:.4%}", f"{x.cosine:.4f}"] for x in layers]
    return f"{tensors}\n\n{table(['layer', 'μΣ(act²)', 'μZD', 'μcos sim'], each, left=0)}"
