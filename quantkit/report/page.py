"""The report as a self-contained HTML page: no network, no other files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from quantkit.report import plots
from quantkit.report.card import is_disjoint

Data = Mapping[str, Any]


class Figure(NamedTuple):
    """A plot, and what is written below it."""

    svg: str
    caption: str


def render(report: Data) -> str:
    """The page of `report`, which is what report.json holds (schema.json says how it is built)."""
    from jinja2 import Environment
    from markupsafe import Markup

    assets = files("quantkit.report") / "assets"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(asset("page.html.j2"))
    return template.render(
        r=report,
        css=Markup(asset("page.css")),
        js=Markup(asset("page.js")),
        plots={
            "frontiers": list(_frontiers(report)),
            "dumbbells": _dumbbells(report),
            "distributions": _distributions(report),
            "tensors": {file["type"]: list(_tensors(file)) for file in report["files"]},
        },
        number=number,
        by_text=measurement,
        mixture=mixture,
        largest=largest,
        digests=list(digests(report)),
        disjoint=is_disjoint(report),
    )


def number(value: float | None, digits: int) -> str:
    """`value` with so many digits after the point, more where that would leave nothing; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return f"{value:.1e}" if value and not float(text) else text


def measurement(file: Data, text: str) -> Data:
    """What was measured of `file` on the text of this name."""
    found: Data = next(m for m in file["measurements"] if m["text"] == text)
    return found


def mixture(file: Data) -> str:
    """The share of a file's bytes in each type, largest first: "Q4_K 71%, Q6_K 29%"."""
    sizes: Counter[str] = Counter()
    for tensor in file["tensors"]:
        sizes[tensor["type"]] += tensor["size"]
    total = sum(sizes.values())
    return ", ".join(f"{kind} {size / total:.0%}" for kind, size in sizes.most_common() if size / total >= 0.005)


def largest(file: Data, count: int = 10) -> list[Data]:
    """The tensors of a file that rounding changed most, the worst first."""
    changed = [tensor for tensor in file["tensors"] if tensor["error"] is not None]
    return sorted(changed, key=lambda tensor: -tensor["error"])[:count]


def digests(report: Data) -> Iterator[tuple[str, Data]]:
    """The inputs and outputs of a report: kind, name, size and SHA-256 of each."""
    for file in report["source"]["files"]:
        yield "source", file
    for what in ("calibration", "imatrix"):
        if report[what] is not None:
            yield what, report[what]
    for text in report["texts"]:
        yield "text", text
    for file in report["files"]:
        for part in file["parts"]:
            yield "output", part


def _frontiers(report: Data) -> Iterator[Figure]:
    many = len(report["texts"]) > 1
    for i, text in enumerate(report["texts"]):
        for what, label in (("mean", "mean KL divergence"), ("tail", "99.9% KL divergence")):
            points = {}
            for file in report["files"]:
                m = measurement(file, text["text"])
                loss = m["kld"]["value"] if what == "mean" else m["kld_percentiles"]["99.9"]
                points[file["type"]] = (file["size"] / 2**30, loss)
            if not any(loss and loss > 0 for _, loss in points.values()):
                continue
            on = f" on {text['text']}" if many else ""
            caption = f"{label[0].upper()}{label[1:]}{on} against size. No other file beats those on the line in both."
            yield Figure(plots.size_and_loss(f"frontier-{i}-{what}", label, points), caption)


def _dumbbells(report: Data) -> Figure | None:
    if len(report["texts"]) < 2:
        return None
    losses = {f["type"]: {m["text"]: m["kld"]["value"] for m in f["measurements"]} for f in report["files"]}
    return Figure(plots.dumbbells("dumbbells", losses), "Mean divergence of each file on each text.")


def _distributions(report: Data) -> Figure:
    first = report["texts"][0]["text"]
    shares = {f["type"]: measurement(f, first)["delta_p_histogram"] for f in report["files"]}
    caption = f"How the probability of the text's own token changed, on {first}."
    return Figure(plots.distributions("delta-p", report["delta_p_edges"], shares), caption)


def _tensors(file: Data) -> Iterator[Figure]:
    """Errors and types of a file's matrices by layer and kind."""
    inside = [t for t in file["tensors"] if t["layer"] is not None and t["error"] is not None]
    if not inside:
        return
    layers = sorted({t["layer"] for t in inside})
    kinds = list(dict.fromkeys(t["kind"] for t in inside))
    errors: list[list[float | None]] = [[None] * len(layers) for _ in kinds]
    types = [[""] * len(layers) for _ in kinds]
    for t in inside:
        row, column = kinds.index(t["kind"]), layers.index(t["layer"])
        errors[row][column], types[row][column] = t["error"], t["type"]
    names: Sequence[str] = [str(layer) for layer in layers]
    slug = file["type"].lower()
    yield Figure(
        plots.by_layer(f"errors-{slug}", f"Relative error of each tensor of {file['type']}", names, kinds, errors),
        "What rounding changed, as the root mean square over that of the weights.",
    )
    yield Figure(
        plots.strips(f"types-{slug}", f"Type of each tensor of {file['type']}", names, kinds, types),
        "The mixture of types.",
    )
