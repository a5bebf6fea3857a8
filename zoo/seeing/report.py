"""What a training came to, as one page: curves, what each class gets, and the worst mistakes."""
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from zoo.seeing import curves
from zoo.seeing.curves import Chart
from zoo.seeing.mistakes import Colour, Picture
from zoo.seeing.page import document, image

MATRIX = 25  # classes, to be shown as a matrix
PAIRS = 25  # confusions that are listed where there are more
ROWS = 200  # of the table
SMALL = 128  # pixels: smaller pictures are enlarged without smoothing

COLUMNS = {
    "images": ("images", "", "images of the class"),
    "answers": ("answers", "", "images that were taken for it"),
    "precision": ("precision", "%", "share of what was answered that is right"),
    "recall": ("recall", "%", "share of what is there that was found"),
    "f1": ("F1", "%", "harmonic mean of precision and recall"),
    "pixels": ("pixels", "", "pixels of the class"),
    "voxels": ("voxels", "", "voxels of the class"),
    "iou": ("IoU", "%", "intersection over union, over all images together"),
    "missed": ("missed", "", "images that hold the class and where none of it was found"),
    "dice": ("Dice", "%", "twice the intersection over the sum of both; of volumes the mean over those that hold the class"),
    "surface_dice": ("surface Dice", "%", "share of the surfaces within 1 mm of each other"),
    "accuracy": ("accuracy", "%", "share of all images that are rightly said to be, or not, of the class"),
    "hd95": ("HD95", "", "95th percentile of the distances between outlines, mean over the images where both have the class"),
    "boxes": ("boxes", "", "objects of the class"),
    "ap": ("AP", "%", "average precision, mean over IoU of 0.50 to 0.95, as COCO has it"),
    "ap50": ("AP50", "%", "at IoU 0.50"),
    "ap75": ("AP75", "%", "at IoU 0.75"),
    "mask_ap": ("mask AP", "%", "the same of masks"),
    "mask_ap50": ("mask AP50", "%", "at IoU 0.50"),
    "mask_ap75": ("mask AP75", "%", "at IoU 0.75"),
}
STYLE = """
.soft{color:var(--soft)}.wide{overflow-x:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10rem),1fr));gap:1rem;margin:1rem 0;padding:0}
.cards div{background:var(--card);border-radius:.5rem;padding:.6rem .9rem}
.cards dt{color:var(--soft);font-size:.85rem}.cards dd{margin:0;font-size:1.5rem;font-weight:600;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:1rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere;min-width:0}
@media(max-width:40rem){.facts{grid-template-columns:1fr}.facts dd{margin-bottom:.4rem}}
pre{background:var(--card);border-radius:.5rem;padding:.6rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 1rem}
.note{border-left:.25rem solid rgb(var(--accent));padding:.3rem .9rem;background:var(--card)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
th{font-weight:600}tbody th,thead th:first-child{text-align:left}
.classes{min-width:min(100%,36rem)}.classes tbody th{max-width:18rem;overflow-wrap:break-word}
.classes td.bar{background:linear-gradient(90deg,rgb(var(--accent)/.28) var(--share),transparent var(--share))}
.matrix td,.matrix th{padding:.2rem .4rem}.matrix td{text-align:center;min-width:2.1rem;border:1px solid var(--line)}
.matrix tbody th{max-width:9rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.matrix thead th{text-align:center}
.matrix thead th.upright{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9rem;overflow:hidden;text-align:left;font-weight:600}
.mistakes{display:grid;gap:1rem;margin-top:.75rem}
.mistakes.tiles{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
.mistakes.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.mistakes>figure{background:var(--card);border-radius:.5rem;padding:.6rem;min-width:0}
.mistakes h3{margin-bottom:.3rem}
.mistakes figcaption{font-size:.85rem}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:.4rem}
.panels img,.mistakes img{width:100%;height:auto;display:block}.tiles img{height:9rem;object-fit:contain}
.small img{image-rendering:pixelated}
@media(max-width:40rem){th,td{padding:.2rem .35rem}table{font-size:.8rem}}
footer{margin:2rem 0 1rem;color:var(--soft);font-size:.85rem}
"""


@dataclass(frozen=True)
class Mistake:
    """Pictures of one thing that went wrong, with what it is and what is to be said of it."""

    title: str
    caption: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes, worst first: what they are, in a sentence, and what the colours in them mean."""

    sentence: str
    shown: Sequence[Mistake]
    legend: Mapping[str, Colour] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the page says.

    Args:
        title: its heading.
        numbers: the few that matter most, by name.
        facts: what was trained, on what, when, by name.
        notes: sentences on what is not as it should be, or is not there.
        commands: what to run next, by what it is for.
        charts: curves.
        table: rows of `zoo.measuring.per_class` or `class_tables`; of more than `ROWS`, those with the lowest `by`.
        by: the column that counts most.
        distance: unit of distances in the table.
        confusion: (classes, classes) counts of given classes (rows) by answers.
        classes: names of the latter.
        mistakes: None where nothing was evaluated.
        written: when, and by what.
    """

    title: str
    numbers: Mapping[str, str]
    facts: Mapping[str, str]
    notes: Sequence[str]
    commands: Mapping[str, str]
    charts: Sequence[Chart]
    written: str
    table: Sequence[Mapping[str, str | float]] = ()
    by: str = ""
    distance: str = ""
    confusion: np.ndarray | None = None
    classes: Sequence[str] = ()
    mistakes: Mistakes | None = None


def render(report: Report) -> str:
    """The page, which needs no other file. However large the data are, it stays small."""
    parts = [_list("cards", report.numbers), _list("facts", report.facts)]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in report.notes]
    if report.charts:
        parts.append(f'<h2>Curves</h2><div class="charts">{"".join(curves.draw(chart) for chart in report.charts)}</div>')
    if report.table:
        parts.append("<h2>Classes</h2>" + _table(report))
    if report.confusion is not None:
        parts.append("<h2>Confusions</h2>" + _confusions(report.confusion, report.classes))
    if report.mistakes is not None:
        parts.append("<h2>Worst mistakes</h2>" + _mistakes(report.mistakes))
    parts.append("<h2>Going on</h2>")
    parts += [f"<div>{html.escape(what)}:</div><pre>{html.escape(command)}</pre>" for what, command in report.commands.items()]
    parts.append(f"<footer>{html.escape(report.written)}</footer>")
    return document(report.title, f"<main>{''.join(parts)}</main>", curves.STYLE + STYLE)


def _list(kind: str, values: Mapping[str, str]) -> str:
    pairs = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items())
    return f'<dl class="{kind}">{"".join(f"<div>{pair}</div>" for pair in pairs) if kind == "cards" else "".join(pairs)}</dl>'


def _table(report: Report) -> str:
    rows, columns = list(report.table), list(report.table[0])[1:]
    said = ""
    if len(rows) > ROWS:
        rows = sorted(rows, key=lambda row: _or(row[report.by], math.inf))[:ROWS]
        said = f"<p>The {ROWS} classes with the lowest {COLUMNS[report.by][0]} of {len(report.table)}.</p>"
    units = {column: report.distance if column == "hd95" else COLUMNS[column][1] for column in columns}
    head = "".join(f'<th scope="col">{COLUMNS[column][0]}{f", {units[column]}" if units[column] else ""}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{html.escape(str(row["class"]))}</th>'
                   f'{"".join(_cell(row[column], units[column]) for column in columns)}</tr>' for row in rows)
    meant = "; ".join(f"{COLUMNS[column][0]}: {COLUMNS[column][2]}" for column in columns)
    return (f'{said}<div class="wide" tabindex="0"><table class="classes"><thead><tr><th scope="col">class</th>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div><p class="soft">{meant}. – : there is no such number.</p>')


def _cell(value: str | float, unit: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "<td>–</td>"
    if unit == "%":
        return f'<td class="bar" style="--share:{value:.1f}%">{value:.1f}</td>'
    return f"<td>{value:,}</td>" if isinstance(value, int) else f"<td>{value:.2f}</td>"


def _or(value: str | float, other: float) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else other


def _confusions(counts: np.ndarray, names: Sequence[str]) -> str:
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    if len(names) <= MATRIX:
        upright = ' class="upright"' if max(map(len, names)) > 3 else ""
        head = "".join(f'<th scope="col"{upright} title="{html.escape(name)}">{html.escape(_short(name))}</th>' for name in names)
        body = []
        for i, name in enumerate(names):
            shares = counts[i] / max(1, counts[i].sum())
            cells = "".join(f'<td style="background:rgb(var(--accent)/{0.6 * share:.2f})">{count or ""}</td>'
                            for count, share in zip(counts[i].tolist(), shares.tolist(), strict=True))
            body.append(f'<tr><th scope="row" title="{html.escape(name)}">{html.escape(_short(name))}</th>{cells}</tr>')
        return (f'<p>Rows are the given classes, columns the answers; the darker, the larger the share of its row.</p>'
                f'<div class="wide" tabindex="0"><table class="matrix"><thead><tr><th scope="col">given \\ answer</th>{head}</tr></thead>'
                f'<tbody>{"".join(body)}</tbody></table></div>')
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs: list[tuple[int, int]] = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    body = "".join(f'<tr><th scope="row">{html.escape(names[i])}</th><td>{html.escape(names[j])}</td><td>{counts[i, j]:,}</td>'
                   f"<td>{100 * counts[i, j] / counts[i].sum():.1f}</td></tr>" for i, j in pairs)
    return (f'<p>The {len(pairs)} most frequent ones between {len(names)} classes.</p>'
            '<div class="wide" tabindex="0"><table class="classes"><thead><tr><th scope="col">given</th><th scope="col">answer</th>'
            f'<th scope="col">images</th><th scope="col">of the class, %</th></tr></thead><tbody>{body}</tbody></table></div>')


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[:most - 1] + "…"


def _mistakes(mistakes: Mistakes) -> str:
    legend = "".join(f'<li><i class="box" style="color:rgb{colour}"></i><span>{html.escape(name)}</span></li>'
                     for name, colour in mistakes.legend.items())
    large = any(len(mistake.pictures) > 1 or mistake.pictures[0][1].width > 2 * SMALL for mistake in mistakes.shown)
    return (f'<p>{html.escape(mistakes.sentence)}</p><ul class="legend">{legend}</ul>'
            f'<div class="mistakes {"large" if large else "tiles"}">{"".join(map(_mistake, mistakes.shown))}</div>')


def _mistake(mistake: Mistake) -> str:
    drawn = [_picture(picture, f"{mistake.title}: {what}") for what, picture in mistake.pictures]
    if len(drawn) > 1:
        panels = (f'<div>{one}<span class="soft">{html.escape(what)}</span></div>'
                  for one, (what, _) in zip(drawn, mistake.pictures, strict=True))
        drawn = [f'<div class="panels">{"".join(panels)}</div>']
    return f"<figure><h3>{html.escape(mistake.title)}</h3>{''.join(drawn)}<figcaption>{html.escape(mistake.caption)}</figcaption></figure>"


def _picture(picture: Image.Image, alt: str) -> str:
    if max(picture.size) > SMALL:
        return image(picture, alt, "JPEG")
    return f'<div class="small">{image(picture, alt)}</div>'
