"""The plots of a report, drawn by matplotlib as SVG that takes its colours from the page: light or dark.

matplotlib writes fixed colours; each is drawn in a marker colour here, which becomes a CSS variable of the page
afterwards. Text stays text (`svg.fonttype: none`), so it can be selected, searched and read aloud.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Marker colour -> CSS variable of the page. Series are told apart by their marks too, not by colour alone.
_FOREGROUND, _QUIET = "#0a0a0a", "#0b0b0b"
_SERIES = tuple(f"#0101{i:02x}" for i in range(1, 9))
_VARIABLES = {_FOREGROUND: "--ink", _QUIET: "--line", **{c: f"--series-{i + 1}" for i, c in enumerate(_SERIES)}}
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
# The steps of a scale of intensity, from nothing to the most.
_N_SHADES = 9
_SHADES = tuple(f"#0102{i:02x}" for i in range(1, _N_SHADES + 1))
_VARIABLES |= {c: f"--shade-{i + 1}" for i, c in enumerate(_SHADES)}
_ID = re.compile(r'(id="|xlink:href="#|url\(#)([\w-]+)')


def _drawn(name: str, title: str, description: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """What `draw` puts on a figure of `size` inches, as an SVG element that names and describes itself."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": _QUIET,
        "axes.labelcolor": _FOREGROUND,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _FOREGROUND,
        "xtick.color": _FOREGROUND,
        "ytick.color": _FOREGROUND,
        "grid.color": _QUIET,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.35,
        "legend.frameon": False,
    }
    out = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # The page holds several plots: an id stands for one thing in all of it.
    svg = _ID.sub(lambda m: f"{m[1]}{name}-{m[2]}", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    opening = f'<svg role="img" aria-labelledby="{name}-title {name}-desc"'
    svg = svg.replace("<svg", opening, 1)
    end = svg.index(">") + 1
    labels = (
        f'\n<title id="{name}-title">{_escaped(title)}</title>\n<desc id="{name}-desc">{_escaped(description)}</desc>'
    )
    return (svg[:end] + labels + svg[end:]).strip()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (size, loss) `points` no other beats in both, by size."""
    best, kept = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept


def size_and_loss(name: str, loss: str, points: Mapping[str, tuple[float, float]], unit: str = "nats") -> str:
    """The size of each file in GiB against what it lost, both logarithmic, with the frontier drawn.

    `points` are (GiB, loss) by the file's type. Files with no loss at all are left out: a logarithmic axis has no 0.
    """
    shown = {kind: point for kind, point in points.items() if point[0] > 0 and point[1] > 0}
    kinds = list(shown)
    on = {kinds[i] for i in frontier([shown[kind] for kind in kinds])}
    told = "; ".join(f"{kind}: {size:.3g} GiB, {value:.4g} {unit}" for kind, (size, value) in shown.items())
    beaten = [kind for kind in kinds if kind not in on]
    beneath = f" Beaten in both size and loss by another file: {', '.join(beaten)}." if beaten else ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        line = sorted(shown[kind] for kind in on)
        axes.plot([x for x, _ in line], [y for _, y in line], color=_SERIES[0], linewidth=1.2, zorder=1)
        for kind, (x, y) in shown.items():
            best = kind in on
            axes.plot(x, y, "o" if best else "x", color=_SERIES[0] if best else _SERIES[1], markersize=5, zorder=2)
            axes.annotate(kind, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, [x for x, _ in shown.values()])
        axes.set_xlabel("file size (GiB)")
        axes.set_ylabel(f"{loss} ({unit})")
        axes.margins(0.12)
        axes.grid(True, which="major")

    return _drawn(name, f"{loss} against file size", f"{told}.{beneath}", (6.4, 4.0), draw)


def _plain_ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """Ticks at familiar numbers (1, 1.5, 2, 3, ...): by default a logarithmic axis over half a decade has few."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    low, high = min(sizes), max(sizes)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.4g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def dumbbells(name: str, losses: Mapping[str, Mapping[str, float]], unit: str = "nats") -> str:
    """One line per file, through its mean divergences on several texts. `losses` are by type, then by text."""
    texts = list(dict.fromkeys(text for each in losses.values() for text in each))
    told = "; ".join(
        f"{kind}: " + ", ".join(f"{text} {value:.4g}" for text, value in each.items()) for kind, each in losses.items()
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        kinds = list(losses)
        for row, kind in enumerate(kinds):
            values = [value for value in losses[kind].values() if value > 0]
            if values:
                axes.plot([min(values), max(values)], [row, row], color=_QUIET, linewidth=1.5, zorder=1)
        for i, text in enumerate(texts):
            places = [(losses[kind][text], row) for row, kind in enumerate(kinds) if losses[kind].get(text, 0) > 0]
            mark, colour = _MARKS[i % len(_MARKS)], _SERIES[i % len(_SERIES)]
            axes.plot([x for x, _ in places], [y for _, y in places], mark, color=colour, label=text, zorder=2)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(f"mean KL divergence ({unit})")
        axes.set_ylabel("file type")
        axes.grid(True, axis="x")
        figure.legend(loc="outside upper center", ncols=max(1, min(3, len(texts))))

    size = (6.4, 1.4 + 0.3 * len(losses))
    return _drawn(name, "Mean KL divergence by text", f"In {unit}. {told}.", size, draw)


def distributions(name: str, edges: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """How often the probability of the text's token changed by how much: a stepped line per file.

    `edges` bound the bins, from -1 to 1; `shares` of all scored tokens by type, one per bin.
    """
    still = {kind: sum(s for s, a, b in zip(each, edges[:-1], edges[1:], strict=True) if a >= -0.0501 and b <= 0.0501)
             for kind, each in shares.items()}  # fmt: skip
    told = "; ".join(f"{kind}: {share:.1%} of tokens within 5 points" for kind, share in still.items())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        points = [100 * edge for edge in edges]
        for i, (kind, each) in enumerate(shares.items()):
            style = ("-", "--", ":", "-.")[i // len(_SERIES) % 4]
            colour = _SERIES[i % len(_SERIES)]
            axes.stairs(
                [100 * s if s > 0 else math.nan for s in each], points, color=colour, linestyle=style, label=kind
            )
        axes.set_yscale("log")
        axes.set_xlabel("change in the probability of the text's token, Δp (percentage points)")
        axes.set_ylabel("share of tokens (%)")
        axes.grid(True)
        figure.legend(loc="outside right upper", fontsize=8)

    return _drawn(name, "Distribution of Δp", told + ".", (6.4, 3.4), draw)


def by_layer(
    name: str, title: str, layers: Sequence[str], kinds: Sequence[str], values: Sequence[Sequence[float | None]]
) -> str:
    """The relative error of each tensor as a shade: one column per layer, one row per kind of tensor.

    `values[row][column]` is the root mean square of what rounding changed over that of the weights, None where there
    is no such tensor.
    """
    known = [(v, layers[c], kinds[r]) for r, row in enumerate(values) for c, v in enumerate(row) if v is not None]
    top = max((v for v, _, _ in known), default=0.0) or 1.0
    worst = sorted(known, reverse=True)[:3]
    told = "Largest: " + "; ".join(f"{kind} of layer {layer}, {v:.2%}" for v, layer, kind in worst) if worst else ""

    def draw(figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for r, row in enumerate(values):
            for c, v in enumerate(row):
                if v is not None:
                    shade = _SHADES[min(_N_SHADES - 1, int(v / top * _N_SHADES))]
                    axes.add_patch(Rectangle((c, r), 0.94, 0.9, facecolor=shade, linewidth=0))
        axes.set_xlim(0, max(1, len(layers)))
        axes.set_ylim(len(kinds), 0)
        every = max(1, len(layers) // 16)
        axes.set_xticks([c + 0.5 for c in range(0, len(layers), every)], list(layers)[::every])
        axes.set_yticks([r + 0.5 for r in range(len(kinds))], list(kinds))
        axes.set_xlabel(f"layer; shades from 0 to {top:.1%} relative error (RMS)")
        axes.set_ylabel("tensor")

    return _drawn(name, title, told + ".", (6.4, 0.9 + 0.24 * len(kinds)), draw)


def strips(name: str, title: str, layers: Sequence[str], kinds: Sequence[str], types: Sequence[Sequence[str]]) -> str:
    """The type of each tensor as a colour: one column per layer, one row per kind of tensor.

    `types[row][column]` is the name of a GGML type, "" where there is no such tensor.
    """
    names = sorted({t for row in types for t in row if t})
    counts = {t: sum(row.count(t) for row in types) for t in names}
    told = "Tensors by type: " + ", ".join(f"{n} {t}" for t, n in counts.items()) + "."
    hatches = ("", "//", "..", "xx")

    def draw(figure: Figure) -> None:
        from matplotlib.patches import Patch, Rectangle

        axes = figure.subplots()

        def look(t: str) -> dict[str, Any]:
            i = names.index(t)
            return {"facecolor": _SERIES[i % len(_SERIES)], "hatch": hatches[i // len(_SERIES) % 4], "linewidth": 0}

        for r, row in enumerate(types):
            for c, t in enumerate(row):
                if t:
                    axes.add_patch(Rectangle((c, r), 0.94, 0.9, **look(t)))
        axes.set_xlim(0, max(1, len(layers)))
        axes.set_ylim(len(kinds), 0)
        every = max(1, len(layers) // 16)
        axes.set_xticks([c + 0.5 for c in range(0, len(layers), every)], list(layers)[::every])
        axes.set_yticks([r + 0.5 for r in range(len(kinds))], list(kinds))
        axes.set_xlabel("layer")
        axes.set_ylabel("tensor")
        figure.legend(handles=[Patch(label=t, **look(t)) for t in names], loc="outside right upper", fontsize=8)

    return _drawn(name, title, told, (6.4, 0.9 + 0.24 * max(3, len(kinds))), draw)
