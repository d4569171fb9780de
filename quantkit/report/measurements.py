"""Results of measurements as text: perplexities, divergences in llama-perplexity's order, importance statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.report.tables import table
from quantkit.wording import count_text, size_text

if TYPE_CHECKING:
    from quantkit.evaluate.divergence import DivergenceResult
    from quantkit.evaluate.importance import LayerStatistics, TensorStatistics
    from quantkit.evaluate.perplexity import PerplexityResult
    from quantkit.evaluate.tasks import TasksResult
    from quantkit.report.memory import Recommendation

_NAMES = {100.0: "maximum", 50.0: "median", 0.0: "minimum"}


def cost_text(result: PerplexityResult | DivergenceResult) -> str:
    """What was measured over, how fast, and in how much memory."""
    r = result
    memory = "" if r.memory is None else f", peak memory {size_text(r.memory)}"
    return (
        f"{count_text(r.n_chunks, 'chunk')} of {r.n_ctx} tokens, {r.n_tokens} tokens scored, {r.seconds:.1f} s, "
        f"{r.tokens_per_second:.0f} tokens/s, batch {r.batch}{memory}"
    )


def computed_by(result: PerplexityResult | DivergenceResult | TasksResult) -> str:
    """What computed a result: "numpy, f32, OpenBLAS Haswell"."""
    return f"{result.backend}, {result.precision}, {result.blas}"


def perplexity_text(result: PerplexityResult) -> str:
    """`result` for a reader, in llama-perplexity's form."""
    ppl = result.ppl
    return f"PPL = {ppl.value:.4f} ± {ppl.stderr:.5f}\n{cost_text(result)} ({computed_by(result)})"


def divergence_text(result: DivergenceResult) -> str:
    """Every statistic of `result` for a reader: perplexities, divergence, token probabilities, and by position."""
    r = result

    def name(percent: float) -> str:
        return _NAMES.get(percent, f"{percent:.1f}%")

    lines = ["Perplexity"]
    for label, estimate in (
        ("PPL(model)", r.ppl),
        ("PPL(base)", r.ppl_base),
        ("ln(PPL(model) / PPL(base))", r.ln_ratio),
        ("PPL(model) / PPL(base)", r.ratio),
        ("PPL(model) - PPL(base)", r.difference),
    ):
        lines.append(f"  {label:<27} {estimate.value:11.6f} ± {estimate.stderr:.6f}")
    lines.append(f"  {'correlation of ln PPLs':<27} {100 * r.correlation:11.4f}%")
    lines += ["", "Kullback-Leibler divergence from the base, in nats"]
    lines.append(f"  {'mean':<27} {r.kld.value:11.6f} ± {r.kld.stderr:.6f}")
    lines += [f"  {name(percent):<27} {value:11.6f}" for percent, value in r.kld_percentiles.items()]
    lines += ["", "Probability of the text's token, less the base's (Δp)"]
    for label, estimate in (("mean", r.delta_p), ("root mean square", r.delta_p_rms)):
        lines.append(f"  {label:<27} {100 * estimate.value:10.3f}% ± {100 * estimate.stderr:.3f}%")
    lines += [f"  {name(percent):<27} {100 * value:10.3f}%" for percent, value in r.delta_p_percentiles.items()]
    lines += ["", "Likeliest tokens"]
    for label, estimate in (("same first", r.same_top), ("same first five", r.same_top5)):
        lines.append(f"  {label:<27} {100 * estimate.value:10.3f}% ± {100 * estimate.stderr:.3f}%")
    bands = [[f"{b.first}-{b.last}", f"{b.mean_kld:.6f}", f"{100 * b.top_disagreement:.2f}%"] for b in r.by_position]
    lines += ["", table(["positions", "mean KLD", "other top-1"], bands)]
    kinds = [
        [c.name, f"{100 * c.n_tokens / r.n_tokens:.1f}%", f"{c.mean_kld:.6f}", f"{100 * c.top_disagreement:.2f}%"]
        for c in r.by_class
    ]
    lines += ["", table(["tokens", "share", "mean KLD", "other top-1"], kinds)]
    lines += [
        "",
        f"{cost_text(r)} ({computed_by(r)}; base: {r.base})",
    ]
    return "\n".join(lines)


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


def recommendation_text(result: Recommendation) -> str:
    """The best choice in a sentence, and a table of all with what they need, in GiB."""
    gib = 2**30
    rows = [
        [
            c.name,
            *(f"{n / gib:.2f}" for n in (c.need.weights, c.need.cache, c.need.compute, c.need.total)),
            _mark(c.fits),
        ]
        for c in result.choices
    ]
    shown = table(["", "weights", "cache", "compute", "total GiB", "fits"], rows)
    memory, n_ctx = f"{result.memory / gib:.2f} GiB", result.choices[0].need.n_ctx
    if result.best is None:
        smallest = result.choices[-1]
        needed = f"the smallest, {smallest.name}, needs {smallest.need.total / gib:.2f} GiB"
        return f"{shown}\n\nnothing fits into {memory} with {n_ctx} tokens of context: {needed}"
    lines = [f"{result.best.name} is the largest that fits into {memory} with {n_ctx} tokens of context"]
    if result.above is not None:
        lines.append(f"next larger: {result.above.name}, needs {result.above.need.total / gib:.2f} GiB")
    if result.below is not None:
        lines.append(
            f"next smaller: {result.below.name}, leaves {(result.memory - result.below.need.total) / gib:.2f} GiB"
        )
    return "\n".join([shown, "", *lines])


def _mark(fits: bool) -> str:
    return "yes" if fits else "no"
