"""Curves as small inline SVG: text stays text, colours are CSS variables, so they follow the theme of the
page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from stillhouse.console import visible
from stillhouse.console.format import compact_number

Points = Sequence[tuple[float, float]]

DASHED = frozenset(f"--run-{number}" for number in range(8, 16))
"""Colours that were used before, and are told from these by dashes."""

WIDTH, HEIGHT = 400, 230
"""Of a plot, in CSS pixels at scale 1: one column of a phone, a third of a desktop."""
MOST_POINTS = 240

# matplotlib knows no CSS variables: it draws in colours that nothing else uses, which are then replaced.
INK, GRID = "#010203", "#010204"


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot.

    Example: `Curve("kd", "--run-0", [(1, 2.5), (2, 2.1)], smooth=True)`
    """

    label: str
    colour: str
    """A CSS variable, such as `--run-0`."""
    points: Points
    smooth: bool = False
    """Draw a running mean, and the values themselves faintly behind it."""
    marked: bool = False
    """A dot at every point, for few points."""
    notes: Sequence[str] = ()
    """A label for each point; empty ones are left out."""
    spread: Sequence[float] = ()
    """Half the length of an error bar at each point, in the unit of y."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot with its title, legend and caption."""

    key: str
    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    """Pairs of label and CSS variable."""
    caption: str = ""


def line_plot(
    key: str,
    title: str,
    curves: Sequence[Curve],
    x: str,
    y: str,
    caption: str = "",
    *,
    log_x: bool = False,
) -> Plot:
    """Curves over a common x axis; `x` and `y` name the axes with their units.

    Curves of one label and colour stand in the legend once. With `log_x` only points right of 0 are drawn.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, axes = _canvas(x, y)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    elif all(float(at).is_integer() for curve in curves for at, _ in curve.points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    paints = _paints(curves)
    for curve in curves:
        points = thinned([point for point in curve.points if point[0] > 0] if log_x else curve.points)
        style = "--" if curve.colour in DASHED else "-"
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        paint = paints[curve.colour]
        if curve.smooth and len(points) >= 12:
            axes.plot(xs, ys, color=paint, linewidth=0.8, alpha=0.3 if len(curves) == 1 else 0.15)
            means = running_mean(ys, max(1, len(ys) // 24))
            axes.plot(xs, means, color=paint, linewidth=1.8, linestyle=style)
        else:
            marker = "o" if curve.marked and len(points) <= 40 else None
            axes.plot(xs, ys, color=paint, linewidth=1.8, marker=marker, markersize=3.5, linestyle=style)
            if len(points) == 1 and marker is None:
                axes.plot(xs, ys, color=paint, marker="o", markersize=3.5)
        _add_to_points(axes, curve, paint)
    legend = tuple(dict.fromkeys((curve.label, curve.colour) for curve in curves))
    described = "; ".join(f"{curve.label}: {_ends(curve.points)}" for curve in curves)
    return Plot(key, title, _svg(figure, key, title, described, paints), legend, caption)


def _add_to_points(axes, curve: Curve, paint: str) -> None:  # type: ignore[no-untyped-def]
    if curve.spread:
        xs, ys = zip(*curve.points, strict=True)
        axes.errorbar(xs, ys, yerr=curve.spread, fmt="none", ecolor=paint, elinewidth=1.2, capsize=2.5)
    for (x, y), text in zip(curve.points, curve.notes, strict=False):
        if text:
            axes.annotate(
                text,
                (x, y),
                (4, 4),
                textcoords="offset points",
                fontsize=11,
                color=paint,
                annotation_clip=True,
            )


def area_plot(key: str, title: str, curves: Sequence[Curve], x: str, y: str, caption: str = "") -> Plot:
    """Shares that add up, stacked. All curves have the same x values."""
    figure, axes = _canvas(x, y)
    paints = _paints(curves)
    stacks = [thinned(curve.points) for curve in curves]
    axes.stackplot(
        [point[0] for point in stacks[0]],
        *[[point[1] for point in stack] for stack in stacks],
        colors=[paints[curve.colour] for curve in curves],
        linewidth=0,
    )
    axes.set_ylim(0, 1)
    legend = tuple((curve.label, curve.colour) for curve in curves)
    described = "; ".join(f"{curve.label}: {_ends(curve.points)}" for curve in curves)
    return Plot(key, title, _svg(figure, key, title, described, paints), legend, caption)


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means over equal runs of neighbours, so that no spike is invented or left out
    whole."""
    if len(points) <= most:
        return list(points)
    edges = [index * len(points) // most for index in range(most + 1)]
    parts = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` neighbours on both sides, as far as there are any."""
    parts = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _paints(curves: Sequence[Curve]) -> dict[str, str]:
    colours = dict.fromkeys(curve.colour for curve in curves)
    return {colour: f"#0102{16 + index:02x}" for index, colour in enumerate(colours)}


def _canvas(x: str, y: str):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure  # slow to load, and needed by the report only
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=12, colors=INK)
    axes.set_axisbelow(True)
    axes.set_xlabel(visible(x), fontsize=12, color=INK, parse_math=False)
    axes.set_ylabel(visible(y), fontsize=12, color=INK, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def _tick(value: float, position: int) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.4g}".replace("-", "−").replace("e−0", "e−")


def _ends(points: Points) -> str:
    if not points:
        return "no values"
    return f"from {compact_number(points[0][1])} to {compact_number(points[-1][1])}"


def _svg(figure, key: str, title: str, described: str, paints: dict[str, str]) -> Markup:  # type: ignore[no-untyped-def]
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)  # the white ground
    text = re.sub(r'<g id="patch_2">.*?</g>', "", text, count=1, flags=re.DOTALL)
    text = _own_ids(text, key)
    for colour, paint in paints.items():
        text = text.replace(paint, f"var({colour})")
    text = text.replace(INK, "var(--soft)").replace(GRID, "var(--line)")
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    opening = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(visible(title))}</title>'
        f'<desc id="{key}-desc">{escape(visible(described))}</desc>'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    return Markup(text)


def _own_ids(text: str, key: str) -> str:
    """Keep only the ids that something points at, and make them the plot's own: a page holds many plots."""
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    names = {name for pair in used for name in pair if name}
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in names else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    return re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
