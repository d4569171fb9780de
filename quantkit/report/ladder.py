"""A ladder of types: one model quantized to several, and what each costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantkit
from quantkit.evaluate.perplexity import PerplexityResult, perplexity, tokenize
from quantkit.pipeline.execute import Progress, execute
from quantkit.pipeline.mixtures import FileType
from quantkit.pipeline.naming import output_paths
from quantkit.pipeline.plan import Plan, plan_copy, plan_quantize
from quantkit.pipeline.source import GGUFSource, TensorSource
from quantkit.report.tables import table

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Rung:
    """One type of a ladder: its file (None for the source itself), and its perplexity."""

    name: str
    path: Path | None
    size: int
    bits_per_weight: float
    perplexity: PerplexityResult


@dataclass(frozen=True)
class Ladder:
    """What each type costs. The first rung is the source, which the others are compared with."""

    model: str
    text: str
    rungs: list[Rung]

    def ratio(self, rung: Rung) -> float:
        """Perplexity of `rung` over that of the source: 1 is no loss."""
        return rung.perplexity.ppl / self.rungs[0].perplexity.ppl

    def __str__(self) -> str:
        """The table, in Markdown."""
        rows = [
            [
                rung.name + ("" if rung.path else " (source)"),
                f"{rung.size / 1e6:.1f} MB" if rung.size < 1e9 else f"{rung.size / 1e9:.2f} GB",
                f"{rung.bits_per_weight:.2f}",
                f"{rung.perplexity.ppl:.4f} ± {rung.perplexity.error:.4f}",
                f"{self.ratio(rung):.4f}",
                f"{100 / self.ratio(rung):.2f}%",
            ]
            for rung in self.rungs
        ]
        return table(["type", "size", "bits/weight", "perplexity", "ratio", "retention"], rows)

    def markdown(self) -> str:
        """The report as a page: the table, and how it was measured."""
        first = self.rungs[0].perplexity
        return (
            f"# {self.model}\n\n{self}\n\n"
            f"Perplexity on {self.text}: {first.n_chunks} chunks of {first.n_ctx} tokens, the second half of each "
            f"scored ({first.n_tokens} tokens), by llama-perplexity's method; ± is the standard error. "
            "The ratio is the perplexity over the source's, retention its inverse. "
            f"Measured with quantkit {quantkit.__version__} ({first.backend}, {first.precision}).\n"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        first = self.rungs[0].perplexity
        return {
            "model": self.model,
            "text": self.text,
            "n_ctx": first.n_ctx,
            "n_chunks": first.n_chunks,
            "n_tokens": first.n_tokens,
            "backend": first.backend,
            "precision": first.precision,
            "quantkit": quantkit.__version__,
            "types": [
                {
                    "type": rung.name,
                    "file": rung.path.name if rung.path else None,
                    "size": rung.size,
                    "bits_per_weight": rung.bits_per_weight,
                    "perplexity": rung.perplexity.ppl,
                    "perplexity_error": rung.perplexity.error,
                    "ratio": self.ratio(rung),
                    "retention": 1 / self.ratio(rung),
                    "tokens_per_second": rung.perplexity.tokens_per_second,
                }
                for rung in self.rungs
            ],
        }

    def write(self, directory: Path) -> list[Path]:
        """Write report.md and report.json into `directory`; returns their paths."""
        page, data = directory / "report.md", directory / "report.json"
        page.write_text(self.markdown(), encoding="utf-8")
        data.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        return [page, data]


def build(
    source: TensorSource,
    files: Sequence[FileType],
    directory: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[Plan, Path]]:
    """Quantize `source` to every type of `files` into `directory`, in one reading. Returns plans and paths."""
    directory.mkdir(parents=True, exist_ok=True)
    plans = [plan_quantize(source, file) for file in files]
    paths = output_paths(source.label, source, [file.name for file in files], directory)
    outputs = list(zip(plans, paths, strict=True))
    execute(source, outputs, threads=threads, progress=progress)
    return outputs


def measure(
    source: TensorSource,
    built: Sequence[tuple[Plan, Path]],
    text: str,
    *,
    text_name: str,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> Ladder:
    """Measure the perplexity of `source` and of each file built from it. Progress: type, chunks done, all, estimate."""
    tokens: np.ndarray = tokenize(source, text)[0]
    plan = plan_copy(source)
    kinds = {t.info.type.name: t.info.n_elements for t in plan if len(t.info.shape) > 1}
    rungs = []
    models = [(max(kinds, key=lambda name: kinds[name]), plan, None), *((p.name, p, path) for p, path in built)]
    for name, planned, path in models:

        def advance(done: int, total: int, ppl: float, name: str = name) -> None:
            if progress is not None:
                progress(name, done, total, ppl)

        model = source if path is None else GGUFSource(path)
        result = perplexity(model, tokens, n_ctx, chunks, threads, progress=advance)
        rungs.append(Rung(name, path, planned.file_size, planned.bits_per_weight, result))
    return Ladder(source.metadata.lookup("general.name") or source.label, text_name, rungs)
