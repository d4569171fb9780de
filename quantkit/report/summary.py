"""A report in short: its table in report.md, and the requirements that a gate checks it against."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.report.page import measurement
from quantkit.report.tables import table
from quantkit.wording import size_text

Data = Mapping[str, Any]

_OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
_REQUIREMENT = re.compile(
    r"\s*(?:(?P<type>\w+)\s*:)?\s*(?P<name>[\w.%]+)\s*(?P<op><=|>=|<|>)\s*(?P<bound>[-+.\deE]+)\s*"
)
_VALUES = {
    "kld": lambda m: m["kld"]["value"],
    "kld_99": lambda m: m["kld_percentiles"]["99.0"],
    "kld_99.9": lambda m: m["kld_percentiles"]["99.9"],
    "kld_max": lambda m: m["kld_percentiles"]["100.0"],
    "ppl": lambda m: m["ppl"]["value"],
    "ppl_ratio": lambda m: m["ratio"]["value"],
    "same_top": lambda m: m["same_top"]["value"],
    "top_disagreement": lambda m: m["top_disagreement"],
    "delta_p_rms": lambda m: m["delta_p_rms"]["value"],
}


def short_table(report: Data) -> str:
    """The source and every file on the first text, in Markdown."""
    source, text = report["source"], report["texts"][0]
    ppl = text["ppl"]
    headers = ["type", "size", "bits/weight", "perplexity", "ratio", "mean KLD", "99.9% KLD", "same top"]
    rows = [_row(f"{source['type']} (source)", source, ppl, 1.0, None)]
    for file in report["files"]:
        m = measurement(file, text["text"])
        rows.append(_row(file["type"], file, m["ppl"], m["ratio"]["value"], m))
    return table(headers, rows)


def _row(name: str, file: Data, ppl: Data, ratio: float | None, m: Data | None) -> list[str]:
    return [
        name,
        size_text(file["size"]),
        f"{file['bits_per_weight']:.2f}",
        f"{_told(ppl['value'], 4)} ± {_told(ppl['stderr'], 4)}",
        _told(ratio, 4),
        "" if m is None else _told(m["kld"]["value"], 6),
        "" if m is None else _told(m["kld_percentiles"]["99.9"], 4),
        "" if m is None else f"{m['same_top']['value']:.2%}",
    ]


def _told(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(report: Data) -> str:
    """report.md: the table, and how it was measured."""
    text, compute = report["texts"][0], report["compute"]
    return (
        f"# {report['model']['name']}\n\n{short_table(report)}\n\n"
        f"Perplexity on {text['text']}: {text['n_chunks']} chunks of {text['n_ctx']} tokens, the second half of each "
        f"scored ({text['n_tokens']} tokens), by llama-perplexity's method; ± is the standard error. "
        "The ratio is the perplexity over the source's; KLD is Kullback and Leibler's divergence of its predictions "
        "from the source's in nats, as a mean and at the 99.9th percentile of tokens, and same top the share of tokens "
        "whose likeliest prediction is the source's. "
        f"Measured with quantkit {report['quantkit']} "
        f"({compute['backend']}, {compute['precision']}, {compute['blas']}).\n"
    )


def failures(report: Data, requirements: Sequence[str]) -> list[str]:
    """Where `report` does not meet `requirements` such as "kld<=0.05", "ppl_ratio<=1.03" or "Q4_K_M:same_top>=0.9".

    Each holds for every file, or the type named before a colon, on every text. Returns a line for each that fails.
    Raises QuantkitError for a requirement that cannot be read, and one for a type that is not in the report.
    """
    lines = []
    for requirement in requirements:
        kind, name, compares, bound = _parsed(requirement)
        files = [file for file in report["files"] if kind is None or file["type"].upper() == kind.upper()]
        if not files:
            raise QuantkitError(f"requirement {requirement!r}: the report has no {kind}")
        for file in files:
            for m in file["measurements"]:
                value = _VALUES[name](m)
                if value is None or not _OPERATORS[compares](value, bound):
                    shown = "not finite" if value is None else f"{value:.6g}"
                    lines.append(f"{file['type']} on {m['text']}: {name} is {shown}, required {compares} {bound:g}")
    return lines


def check_requirements(requirements: Sequence[str]) -> None:
    """Raise QuantkitError for a requirement that cannot be read."""
    for requirement in requirements:
        _parsed(requirement)


def _parsed(requirement: str) -> tuple[str | None, str, str, float]:
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None or match["name"] not in _VALUES:
        raise QuantkitError(
            f"requirement {requirement!r} cannot be read: write NAME<=NUMBER, with NAME one of {', '.join(_VALUES)}"
        )
    try:
        return match["type"], match["name"], match["op"], float(match["bound"])
    except ValueError:
        raise QuantkitError(f"requirement {requirement!r}: {match['bound']!r} is not a number") from None
