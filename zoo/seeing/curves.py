"""Curves as inline SVG: sharp at every size, in the page's colours, light and dark."""
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.reading.scalars import Points, Scalars

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 230, 52, 12, 10, 38  # of a chart and its margins
MOST = 300  # points of a line
DOTTED = 30  # points at most, to be marked one by one
LINES = 8  # as many as there are colours
STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
.charts figure{background:var(--card);border-radius:.5rem;padding:.75rem;min-width:0}
.charts svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--soft)}
.charts figcaption{font-size:.85rem}.charts .grid{stroke:var(--line)}.charts .mark{stroke:var(--soft);stroke-dasharray:4 3}
.charts polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.25rem 0 0;padding:0;font-size:.85rem}
.legend i{display:inline-block;width:1em;height:.3em;margin-right:.4em;vertical-align:middle;background:currentColor}
.legend i.box{height:1em;border:1px solid var(--soft)}.legend i.mark{background:none;height:0;border-top:2px dashed var(--soft)}
.legend span{overflow-wrap:anywhere;color:var(--text)}
""" + "".join(f".c{i}{{stroke:{colour};color:{colour}}}circle.c{i}{{fill:{colour}}}" for i, colour in enumerate(
    ("#2a7fd0", "#dd6b10", "#149a70", "#c563a5", "#b48600", "#8a6fd1", "#d04545", "#6f7b86")))


@dataclass(frozen=True)
class Chart:
    """Lines by name, each of points (x, y), under a title with a unit; `across` says what x is.

    At most `LINES` of them. Where a value is not finite, its line is broken. `mark` is the x of a dashed upright, `marked` what it says.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    across: str
    unit: str = ""
    mark: float | None = None
    marked: str = ""


PERCENT = ("accuracy/", "iou/", "dice/", "calibration/", "aAcc", "mIoU", "mAcc", "mDice")  # how names of metrics in percent begin


def training_charts(scalars: Scalars, best: float | None) -> list[Chart]:
    """Metrics on held-out data, losses, the learning rate and the size of gradients, by epoch; without epochs by iteration.

    `best` is where the best checkpoint was written.
    """
    across = "epoch" if scalars.epochs else "iteration"
    mark = {"mark": best, "marked": f"best checkpoint: {across} {best}"} if best else {}
    train = {name: _by_epoch(points, scalars.epochs) for name, points in scalars.train.items()}
    losses = sorted((name for name in train if "loss" in name), key=lambda name: name != "loss")
    charts = {"loss, in training": losses[:LINES], "learning rate": [name for name in ("lr",) if name in train],
              "norm of the gradients": [name for name in ("grad_norm",) if name in train]}
    found: list[Chart] = []
    groups: dict[str, list[str]] = {}
    for name in scalars.held_out:
        prefix = name.partition("/")[0] if "/" in name else ""
        groups.setdefault(name.partition("_")[0] if prefix == "coco" else prefix, []).append(name)  # boxes apart from masks
    for group, names in groups.items():
        title = f"{group.replace('/', ' ')}, held-out data".removeprefix(", ")
        if len(names) > LINES:  # the mean, and the classes that end lowest
            names = sorted(names, key=lambda name: (name != f"{group}/mean", scalars.held_out[name][-1][1]))[:LINES]
            title += f" (the {LINES - 1} lowest of {len(groups[group]) - 1} classes)"
        lines = {name.removeprefix(f"{group.partition('/')[0]}/"): scalars.held_out[name] for name in names}
        if group.startswith("coco/"):  # where -1 stands for sizes that no object has
            lines = {name: kept for name, points in lines.items() if (kept := [point for point in points if point[1] != -1])}
        found.append(Chart(title, lines, across, "%" if names[0].startswith(PERCENT) else "", **mark))
    return found + [Chart(title, {name: train[name] for name in names}, across, **mark) for title, names in charts.items() if names]


def _by_epoch(points: Points, epochs: Mapping[float, int]) -> Points:
    """Iterations as parts of epochs: 1.5 is the middle of the second."""
    if not epochs:
        return points
    length = max(step / epochs[step] for step, _ in points)
    return [(min(max(step / length, epochs[step] - 1), epochs[step]), value) for step, value in points]


def draw(chart: Chart) -> str:
    """The chart with its legend, as HTML."""
    lines = {name: _thinned(points) for name, points in chart.lines.items()}
    finite = [point for points in lines.values() for point in points if math.isfinite(point[1])]
    heading = html.escape(chart.title + (f", {chart.unit}" if chart.unit else ""))
    notes = [f"{name} was not a finite number at {lost} of {len(points)} points" for name, points in chart.lines.items()
             if (lost := sum(not math.isfinite(value) for _, value in points))]
    legend = "".join(f'<li><i class="c{i}"></i><span>{html.escape(name)}</span></li>' for i, name in enumerate(lines))
    drawn = '<p class="soft">There is no finite number to draw.</p>'
    if finite:
        drawn = _svg(chart, lines, finite)
        if chart.mark is not None:
            legend += f'<li><i class="mark"></i><span>{html.escape(chart.marked)}</span></li>'
    note = f'<figcaption>{html.escape("; ".join(notes))}.</figcaption>' if notes else ""
    return f'<figure><h3>{heading}</h3>{drawn}<ul class="legend">{legend}</ul>{note}</figure>'


def _svg(chart: Chart, lines: Mapping[str, list[tuple[float, float]]], finite: list[tuple[float, float]]) -> str:
    across = ticks(min(0, *(x for x, _ in finite)), max(x for x, _ in finite), 5)
    up = ticks(min(y for _, y in finite), max(y for _, y in finite), 4)

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM))

    parts = []
    for y in up:
        _, height = place(across[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"></line>'
                     f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in across:
        parts.append(f'<text x="{place(x, up[0])[0]:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(chart.across)}</text>')
    if chart.mark is not None:
        x, _ = place(chart.mark, up[0])
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"></line>')
    said = []
    for i, (name, points) in enumerate(lines.items()):
        shown = [point for point in points if math.isfinite(point[1])]
        for piece in _pieces(points):
            at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in piece))
            parts.append(f'<polyline class="c{i}" points="{at}"></polyline>')
        dots = shown if len(points) <= DOTTED else [piece[0] for piece in _pieces(points) if len(piece) == 1]
        for point in dots:
            x, y = place(*point)
            parts.append(f'<circle class="c{i}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                         f"<title>{html.escape(name)}: {point[1]:.4g} at {html.escape(chart.across)} {point[0]:g}</title></circle>")
        if shown:
            said.append(f"{name} from {shown[0][1]:.4g} to {shown[-1][1]:.4g}")
    label = html.escape(f"Curves of {chart.title} by {chart.across}: {'; '.join(said)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` steps of round numbers that reach over [low, high]."""
    if high <= low:
        low, high = (0.0, high or 1.0) if high >= 0 else (low, 0.0)
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST` points, means of as many neighbours each."""
    if len(points) <= MOST:
        return list(points)
    return [tuple(chunk.mean(0).tolist()) for chunk in np.array_split(np.array(points, np.float64), MOST)]


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The runs of points with finite values."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
