"""One page that shows what every head of every layer attends to, from any place of the picture: it needs no other file and no server."""
import base64
import html
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.files import explaining, replacing
from zoo.seeing.attention import NUMBERS, Layer, numbers, table
from zoo.seeing.attention_statistics import Grid
from zoo.seeing.page import document, folder_for_pictures, image

SIDE = 24  # rows and columns of patches that are shown apart, at most
MOST = 3_000_000  # numbers of a picture: beyond, the mean of the heads alone is shown
SHOWN = 448  # pixels of a picture's longer side
PICTURES = 12  # of one page, which holds some megabytes of each
HELP = ("<p>Click on a picture, or move the mark with the arrow keys, to ask from another place. The number in a cell of the table is "
        "that of a head over the whole picture; choosing it shows the head.</p>")

STYLE = """
.remark{border-left:.25rem solid rgb(var(--accent));background:var(--card);padding:.6rem .9rem}
.seen{display:grid;grid-template-columns:minmax(16rem,28rem) minmax(0,1fr);gap:1.5rem;align-items:start;margin-bottom:2.5rem}
.seen h2{grid-column:1/-1;margin-bottom:0}
@media(max-width:48rem){.seen{grid-template-columns:minmax(0,1fr)}}
canvas{width:100%;height:auto;display:block;border-radius:.5rem;cursor:crosshair;touch-action:manipulation}
canvas:focus-visible,button:focus-visible,select:focus-visible,input:focus-visible{outline:3px solid rgb(var(--accent));outline-offset:2px}
.said{min-height:4.5em;margin:.5rem 0;color:var(--soft)}
.controls{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.5rem 1rem;align-items:center}
.controls>div{display:flex;gap:.75rem;align-items:center}.controls output{min-width:1.5em}
.controls input[type=range]{flex:1;min-width:0;accent-color:rgb(var(--accent))}
select{font:inherit;max-width:100%;color:var(--text);background:var(--card);border:1px solid var(--line);border-radius:.25rem;padding:.2rem}
.wide{overflow-x:auto;margin-top:1rem}table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums}
th{font-weight:600;padding:.1rem .5rem;text-align:right;color:var(--soft)}td{padding:1px}
td button{font:inherit;width:3.6rem;padding:.25rem 0;border:2px solid transparent;border-radius:.25rem;color:var(--text);cursor:pointer}
td button[aria-pressed=true]{border-color:var(--text)}
.meaning{color:var(--soft);font-size:.9rem}
"""

SCRIPT = """
"use strict";
const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), i = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[i].map((from, c) => from + (STOPS[i + 1][c] - from) * (at - i));
}
function bytes(text) { return Uint8Array.from(atob(text), c => c.charCodeAt(0)); }
for (const section of document.querySelectorAll("section.seen")) {
  const data = JSON.parse(section.querySelector("script").textContent), picture = section.querySelector("img");
  const canvas = section.querySelector("canvas"), said = section.querySelector(".said"), range = section.querySelector("input");
  const [headOf, fromOf, numberOf] = section.querySelectorAll("select"), meaning = section.querySelector(".meaning");
  const body = section.querySelector("tbody"), context = canvas.getContext("2d");
  const layers = data.layers.map(layer => ({...layer, weights: bytes(layer.weights), scale: new Float32Array(bytes(layer.scale).buffer)}));
  const place = {y: 0.5, x: 0.5};
  const percent = share => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";

  function draw() {
    const layer = layers[range.value - 1], head = Number(headOf.value), {prefix, rows, columns} = layer, tokens = prefix + rows * columns;
    const row = Math.min(Math.floor(place.y * rows), rows - 1), column = Math.min(Math.floor(place.x * columns), columns - 1);
    const prefixed = fromOf.value !== "place" && Number(fromOf.value) < prefix;
    const query = prefixed ? Number(fromOf.value) : prefix + row * columns + column;
    const line = (Math.min(head, layer.heads) * tokens + query) * tokens, scale = layer.scale[Math.min(head, layer.heads) * tokens + query];
    const values = layer.weights.subarray(line, line + tokens), patches = values.subarray(prefix);
    const most = Math.max(1, ...patches), small = document.createElement("canvas");
    [small.width, small.height] = [columns, rows];
    const pixels = small.getContext("2d").createImageData(columns, rows);
    patches.forEach((value, i) => pixels.data.set([...colour(value / most), 60 + 170 * value / most], 4 * i));
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (!prefixed) {
      const [w, h] = [canvas.width / columns, canvas.height / rows];
      context.lineWidth = 3; context.strokeStyle = "#000"; context.strokeRect(column * w, row * h, w, h);
      context.lineWidth = 1.5; context.strokeStyle = "#fff"; context.strokeRect(column * w, row * h, w, h);
    }
    const best = patches.indexOf(Math.max(...patches)), onPrefix = values.subarray(0, prefix).reduce((a, b) => a + b, 0) * scale;
    const asked = head ? `head ${Math.min(head, layer.heads)}` : "mean of the heads";
    said.textContent = `Layer ${range.value} of ${layers.length}, ${asked}, asked from `
      + (prefixed ? data.names[query] : `row ${row + 1}, column ${column + 1} of ${rows} × ${columns}`)
      + `: most at row ${Math.floor(best / columns) + 1}, column ${best % columns + 1}, with ${percent(patches[best] * scale)}`
      + (prefix ? `; ${percent(onPrefix)} goes to ${data.names.join(", ")}.` : ".");
    section.querySelector("output").textContent = range.value;
    for (const button of body.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.dataset.layer === range.value && button.dataset.head === headOf.value);
  }
  function fill() {
    const key = numberOf.value, all = data.numbers.flat().map(row => row[key]).filter(Number.isFinite);
    const low = Math.min(...all), span = Math.max(...all) - low || 1;
    meaning.textContent = data.meanings[key] + ".";
    for (const button of body.querySelectorAll("button")) {
      const value = data.numbers[button.dataset.layer - 1][button.dataset.head - 1][key];
      button.textContent = Number.isFinite(value) ? value.toPrecision(2) : "–";
      button.style.background = `rgb(var(--accent)/${Number.isFinite(value) ? (0.6 * (value - low) / span).toFixed(3) : 0})`;
    }
  }
  body.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    range.value = button.dataset.layer;
    if (headOf.querySelector(`option[value="${button.dataset.head}"]`)) headOf.value = button.dataset.head;
    draw();
  });
  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect();
    place.x = (event.clientX - box.left) / box.width; place.y = (event.clientY - box.top) / box.height;
    fromOf.value = "place";
    draw();
  });
  canvas.addEventListener("keydown", event => {
    const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}, move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const {rows, columns} = layers[range.value - 1];
    const step = (at, count, by) => (Math.min(Math.max(Math.floor(at * count) + by, 0), count - 1) + 0.5) / count;
    place.y = step(place.y, rows, move[0]); place.x = step(place.x, columns, move[1]);
    fromOf.value = "place";
    draw();
  });
  for (const control of [range, headOf, fromOf]) control.addEventListener("input", draw);
  numberOf.addEventListener("input", fill);
  fill();
  picture.decode().then(draw);
}
"""


def write(
    folder: str | Path, title: str, paths: Sequence[Path], see: Callable[[Path], tuple[Image.Image, Sequence[Layer]]], remark: str = "",
) -> tuple[Path, Path]:
    """Writes the page, `index.html`, and the numbers, `attention.csv`, into `folder`, which is made; both or, with an InputError, none.

    Args:
        paths: of pictures; of more than `PICTURES` the table has all and the page the first.
        see: a picture as the network sees it, and its layers' attention.
        remark: stands above the pictures.
    """
    folder = Path(folder)
    sections, rows = [], []
    with folder_for_pictures(folder):
        for path in paths:
            print(f"{path} …", file=sys.stderr, flush=True)
            picture, layers = see(path)
            found = numbers(layers)
            rows.append((str(path), found))
            if len(sections) < PICTURES:
                sections.append(_section(len(sections), str(path), picture, layers, found))
        remarks = [remark, f"These are the first {PICTURES} of {len(paths)} pictures; attention.csv has the numbers of all." if
                   len(paths) > PICTURES else ""]
        said = "".join(f'<p class="remark">{html.escape(one)}</p>' for one in remarks if one)
        text = document(title, f"{said}{HELP}<main>{''.join(sections)}</main><script>{SCRIPT}</script>", STYLE)
        page, csv = folder / "index.html", folder / "attention.csv"
        with explaining(folder), replacing(csv) as new_csv, replacing(page) as new_page:
            new_csv.write_text(table(rows), encoding="utf-8")
            new_page.write_text(text, encoding="utf-8")
    return page, csv


def _section(index: int, name: str, picture: Image.Image, layers: Sequence[Layer], found: Sequence[Sequence[dict[str, float]]]) -> str:
    factor = SHOWN / max(picture.size)
    width, height = (max(1, round(n * factor)) for n in picture.size)
    shown = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    kept = [_pooled(layer) for layer in layers]
    apart = sum(attention.numel() for attention, _ in kept) + sum(attention[0].numel() for attention, _ in kept) <= MOST
    most_heads = max(len(attention) for attention, _ in layers)
    prefix = max(grid.prefix for _, grid in layers)
    names = ["the class token", *(f"register {i}" for i in range(1, prefix))] if prefix else []
    data = {
        "layers": [_packed(layer, apart) for layer in kept], "names": names,
        "numbers": [[{key: value if math.isfinite(value) else None for key, value in row.items()} for row in heads] for heads in found],
        "meanings": NUMBERS,
    }
    heads = [(0, "mean of the heads"), *((i, f"head {i}") for i in range(1, most_heads + 1) if apart)]
    rows = "".join(f'<tr><th scope="row">{i + 1}</th>' + "".join(
        f'<td><button type="button" data-layer="{i + 1}" data-head="{j + 1}" aria-pressed="false"></button></td>' for j in range(len(of)))
        + "</tr>" for i, of in enumerate(found))
    head = "".join(f'<th scope="col">{j + 1}</th>' for j in range(most_heads))
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<section class="seen" aria-labelledby="n{index}"><h2 id="n{index}">{html.escape(name)}</h2><div>'
        f'<canvas width="{shown.width}" height="{shown.height}" tabindex="0" role="application" '
        f'aria-label="The picture under what is attended to; arrow keys move the place that asks" aria-describedby="s{index}"></canvas>'
        f'<div hidden>{image(shown, f"The picture {name}", "JPEG")}</div>'
        f'<p class="said" id="s{index}" aria-live="polite"></p></div><div><div class="controls">'
        f'<label for="l{index}">Layer</label><div><input id="l{index}" type="range" min="1" max="{len(layers)}" step="1" '
        f'value="{len(layers)}"><output for="l{index}"></output></div>'
        f'<label for="h{index}">Head</label>{_select(f"h{index}", heads)}'
        f'<label for="q{index}">Asked from</label>{_select(f"q{index}", [("place", "the marked place"), *enumerate(names)])}'
        f'<label for="c{index}">Number</label>{_select(f"c{index}", [(key, key.replace("_", " ")) for key in NUMBERS])}</div>'
        f'<p class="meaning" aria-live="polite"></p><div class="wide" tabindex="0" role="region" aria-label="Numbers of all heads">'
        f'<table><thead><tr><th scope="col">layer \\ head</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>'
        f'<script type="application/json">{text}</script></section>')


def _select(name: str, options: Sequence[tuple[Any, str]]) -> str:
    return f'<select id="{name}">{"".join(f"""<option value="{value}">{html.escape(text)}</option>""" for value, text in options)}</select>'


def _pooled(layer: Layer) -> Layer:
    """With at most `SIDE` rows and columns of patches: sums over what is attended to together, means over what asks together."""
    attention, grid = layer
    step = max(-(-n // SIDE) for n in grid[1:])
    if step == 1:
        return layer
    rows, columns = (-(-n // step) for n in grid[1:])
    whole = F.pad(attention.new_ones(1, 1, *grid[1:]), (0, columns * step - grid.columns, 0, rows * step - grid.rows))
    count = F.avg_pool2d(whole, step)[0, 0].flatten() * step**2  # patches in each

    def summed(x: Tensor) -> Tensor:
        """(…, T) to (…, tokens kept)."""
        patches = x[..., grid.prefix:].unflatten(-1, grid[1:])
        patches = F.pad(patches, (0, columns * step - grid.columns, 0, rows * step - grid.rows))
        sums = patches.unflatten(-1, (columns, step)).sum(-1).unflatten(-2, (rows, step)).sum(-2).flatten(-2)
        return torch.cat([x[..., : grid.prefix], sums], -1)

    per_query = torch.cat([count.new_ones(grid.prefix), count])
    return Layer((summed(summed(attention).mT) / per_query).mT, Grid(grid.prefix, rows, columns))


def _packed(layer: Layer, apart: bool) -> dict[str, Any]:
    """Bytes of every row of attention, of the mean and of the heads, as shares of the row's largest, which is `scale` · 255."""
    attention, grid = layer
    mean = attention.mean(0, keepdim=True)
    shown = torch.cat([mean, attention]) if apart else mean
    largest = shown.amax(-1, keepdim=True).clamp_min(torch.finfo(shown.dtype).tiny)
    weights = (shown / largest * 255).round().to(torch.uint8)
    return {"prefix": grid.prefix, "rows": grid.rows, "columns": grid.columns, "heads": len(shown) - 1,
            "weights": base64.b64encode(weights.numpy().tobytes()).decode(),
            "scale": base64.b64encode((largest[..., 0] / 255).float().numpy().astype("<f4").tobytes()).decode()}
