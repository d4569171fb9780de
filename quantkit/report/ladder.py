"""A ladder of types: one model quantized to several, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import quantkit
from quantkit.compile.ahead import KernelJob
from quantkit.errors import QuantkitError
from quantkit.evaluate.divergence import DivergenceResult, divergences
from quantkit.evaluate.needed_kernels import measuring_kernels
from quantkit.evaluate.perplexity import chunked, tokenize
from quantkit.evaluate.settings import Chunking, Compute, Estimate
from quantkit.formats.atomic import OutputGroup, write_whole
from quantkit.pipeline.execute import quantizing_kernels
from quantkit.pipeline.plan import Plan, plan_copy
from quantkit.report.json_data import json_text
from quantkit.report.tables import table
from quantkit.sources.source import GGUFSource, TensorSource
from quantkit.trust.digest import file_digests
from quantkit.vocabulary import Vocabulary

REPORT_FILES = ("report.md", "report.json")


@dataclass(frozen=True)
class Rung:
    """One type of a ladder: its file, its perplexity, and its divergence from the source.

    The source's own rung has no `path`, `sha256` (of the file, in hexadecimal) and `divergence`.
    """

    name: str
    path: Path | None
    sha256: str | None
    size: int
    bits_per_weight: float
    ppl: Estimate
    divergence: DivergenceResult | None


@dataclass(frozen=True)
class Ladder:
    """What each type costs. The first rung is the source, which the others are compared with.

    `imatrix` is the file of the importance matrix that they were made with, and its SHA-256; None without one.
    """

    model: str
    text: str
    rungs: list[Rung]
    imatrix: tuple[Path, str] | None = None

    def ratio(self, rung: Rung) -> float:
        """Perplexity of `rung` over that of the source: 1 is no loss."""
        return rung.ppl.value / self.rungs[0].ppl.value

    @property
    def measured(self) -> DivergenceResult:
        """One of the measurements, for what all have in common."""
        return next(rung.divergence for rung in self.rungs if rung.divergence is not None)

    def __str__(self) -> str:
        """The table, in Markdown."""
        rows = [
            [
                rung.name + ("" if rung.path else " (source)"),
                f"{rung.size / 1e6:.1f} MB" if rung.size < 1e9 else f"{rung.size / 1e9:.2f} GB",
                f"{rung.bits_per_weight:.2f}",
                f"{rung.ppl.value:.4f} ± {rung.ppl.stderr:.4f}",
                f"{self.ratio(rung):.4f}",
                f"{100 / self.ratio(rung):.2f}%",
                "" if rung.divergence is None else f"{rung.divergence.kld.value:.6f}",
                "" if rung.divergence is None else f"{rung.divergence.same_top.value:.2%}",
            ]
            for rung in self.rungs
        ]
        headers = ["type", "size", "bits/weight", "perplexity", "ratio", "retention", "mean KLD", "same top"]
        return table(headers, rows)

    def markdown(self) -> str:
        """The report as a page: the table, and how it was measured."""
        first = self.measured
        return (
            f"# {self.model}\n\n{self}\n\n"
            f"Perplexity on {self.text}: {first.n_chunks} chunks of {first.n_ctx} tokens, the second half of each "
            f"scored ({first.n_tokens} tokens), by llama-perplexity's method; ± is the standard error. "
            "The ratio is the perplexity over the source's, retention its inverse; the mean KLD is Kullback and "
            "Leibler's divergence of its predictions from the source's in nats, and same top the share of tokens whose "
            "likeliest prediction is the source's. "
            f"Measured with quantkit {quantkit.__version__} ({first.backend}, {first.precision}, {first.blas}).\n\n"
            f"{table(['file', 'sha256'], self._digests(), left=2)}\n"
        )

    def _digests(self) -> list[tuple[str, str]]:
        files = [(rung.path, rung.sha256) for rung in self.rungs if rung.path is not None]
        if self.imatrix is not None:
            files.append(self.imatrix)
        return [(path.name, digest or "") for path, digest in files]

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        first = self.measured
        return {
            "model": self.model,
            "text": self.text,
            "n_ctx": first.n_ctx,
            "n_chunks": first.n_chunks,
            "n_tokens": first.n_tokens,
            "backend": first.backend,
            "precision": first.precision,
            "blas": first.blas,
            "quantkit": quantkit.__version__,
            "imatrix": self.imatrix and {"path": self.imatrix[0].name, "sha256": self.imatrix[1]},
            "files": [
                {
                    "path": rung.path.name if rung.path else None,
                    "type": rung.name,
                    "sha256": rung.sha256,
                    "size": rung.size,
                    "bits_per_weight": rung.bits_per_weight,
                    "ppl": rung.ppl,
                    "retention": 1 / self.ratio(rung),
                    **({} if rung.divergence is None else _costs(rung.divergence)),
                }
                for rung in self.rungs
            ],
        }

    def write(self, directory: Path, group: OutputGroup) -> list[Path]:
        """Write report.md and report.json into `directory`, as files of `group`; returns their paths."""
        page, data = (directory / name for name in REPORT_FILES)
        write_whole(group.add(page), self.markdown())
        write_whole(group.add(data), json_text(self.as_dict()) + "\n")
        return [page, data]


def _costs(divergence: DivergenceResult) -> dict[str, Any]:
    """The statistics of a rung, under the names that a divergence has everywhere."""
    names = ("ratio", "kld", "kld_percentiles", "delta_p", "delta_p_rms", "same_top", "same_top5")
    return {name: getattr(divergence, name) for name in names}


def ladder_kernels(source: TensorSource, plans: Sequence[Plan], backend: str = "numpy") -> list[KernelJob]:
    """The kernels that carrying out `plans` and `measure` will need, to be compiled ahead."""
    outputs = [t.info.type for plan in plans for t in plan]
    measuring = measuring_kernels(source, outputs, comparing=True) if backend == "numpy" else []
    return [*quantizing_kernels(plans), *measuring]


def text_tokens(source: TensorSource, text: str, chunking: Chunking) -> np.ndarray:
    """The token ids of `text`, int32. Raises QuantkitError, before anything is made, when they are too few."""
    ids, bos = tokenize(Vocabulary.from_metadata(source.metadata), text)
    chunked(ids, chunking, bos, source.label)
    return ids


def measure(
    source: TensorSource,
    built: Sequence[tuple[Plan, Path]],
    group: OutputGroup,
    text: str | np.ndarray,
    *,
    text_name: str,
    imatrix: Path | None = None,
    chunking: Chunking = Chunking(),  # noqa: B008
    compute: Compute | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Ladder:
    """Measure each file built from `source` in `group` against it, all in one pass over the text, a string or ids.

    `imatrix` is the file of the importance matrix that they were made with, of `group` or not. `progress` is told
    chunks done, chunks, and a file's mean divergence so far: the first's, or each in turn through torch. Raises
    QuantkitError when nothing was built, and as `divergences` does.
    """
    if not built:
        raise QuantkitError("name at least one file type to measure")
    plan = plan_copy(source)
    kinds = {t.info.type.name: t.info.n_elements for t in plan if len(t.info.shape) > 1}
    places = [group.place(path) for _, path in built]
    files = [GGUFSource(place) for place in places]
    results = divergences(files, source, text, chunking=chunking, compute=compute, progress=progress)
    own = max(kinds, key=lambda name: kinds[name])
    matrices = [] if imatrix is None else [imatrix]
    digests = file_digests([*places, *map(group.place, matrices)])
    rungs = [Rung(own, None, None, plan.file_size, plan.bits_per_weight, results[0].ppl_base, None)]
    for (planned, path), place, result in zip(built, places, results, strict=True):
        rungs.append(
            Rung(planned.name, path, digests[place], planned.file_size, planned.bits_per_weight, result.ppl, result)
        )
    matrix = None if imatrix is None else (imatrix, digests[group.place(imatrix)])
    return Ladder(source.metadata.string("general.name", "") or source.label, text_name, rungs, matrix)
