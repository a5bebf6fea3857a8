"""The tables of mechanisms and models, generated from the pages of docs/, from the registry and from committed measurements.

Latencies are of `benchmarks/models.json`, which `make measure` writes, exports of `benchmarks/exports.json`, which `make exports`
writes; what has not been measured is a dash.
"""
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import timm
import torch
import torchvision  # noqa: F401  has the deformable convolution that is counted
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo.kernels
from zoo.errors import InputError
from zoo.exporting.all_models import read_records
from zoo.kernels.deform_conv2d.reference import flops
from zoo.models import MECHANISMS, REPORTED_TOP1, list_models, mechanism_of, unet

NONE = "–"
ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS, PAGES = ROOT / "benchmarks", ROOT / "docs"


def _deform_conv2d(x: tuple, weight: tuple, offset: tuple, *_: object, **__: object) -> int:
    """Those of the zoo's operator, for the arguments of torchvision's."""
    return flops(x, offset, weight)


def _model(name: str) -> nn.Module:
    """Without numbers: there are shapes only."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def _cfg(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], model.pretrained_cfg)


def macs(name: str) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of the model's own size, see `products`."""
    return sum(products(name, tuple(_cfg(_model(name))["input_size"])).values())


@functools.cache
def products(name: str, size: tuple[int, ...]) -> dict[str, int]:
    """Multiply-accumulates of convolutions and matrix products for one image of `size`, channels first, by PyTorch's operators.

    Counted as exported graphs have it, where every mechanism stands as it is defined: what a formulation computes beyond that
    to be faster is not counted. Nothing is computed for it: shapes are enough.
    """
    model, image = _model(name), torch.empty(1, *size, device="meta")
    exporting = mock.patch.object(torch.compiler, "is_exporting", lambda: True)
    pools, definition = (sys.modules[f"zoo.kernels.token_aware_avg_pool.{name}"] for name in ("convolved", "reference"))
    adding = mock.patch.object(pools, "avg_pool", definition.avg_pool)  # a pool is a convolution in exports, but multiplies nothing
    # A scan is one node of exports, which the counter takes for no operator; there are no products in it.
    scanning = mock.patch.object(sys.modules["zoo.kernels.selective_scan._looped"], "selective_scan", lambda u, *_: torch.empty_like(u))
    counted = {torch.ops.torchvision.deform_conv2d: _deform_conv2d}
    with exporting, adding, scanning, FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.no_grad():
        model(image)
    return {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}


def kernels(model: nn.Module) -> list[str]:
    """The operators of `zoo.kernels` that the modules of `model` call."""
    sources = {type(module).__module__ for module in model.modules()}
    return [name for name in zoo.kernels.__all__
            if any(getattr(sys.modules[source], name, None) is getattr(zoo.kernels, name) for source in sources)]


def latencies(folder: Path) -> dict[str, float]:
    """Models' forward times over ResNet-50's, from what `zoo benchmark` wrote to `folder`/models.json."""
    path = folder / "models.json"
    rows = json.loads(path.read_text())["comparisons"] if path.exists() else []
    pairs = {row["model"]: zip(row["ours"]["seconds"], row["rival"]["seconds"], strict=True) for row in rows if row["kind"] == "forward"}
    return {name: statistics.median(ours / rival for ours, rival in pair) for name, pair in pairs.items()}


def exported(folder: Path) -> dict[str, str]:
    """What images models' ONNX files take, from what `zoo export --all` wrote to `folder`/exports.json."""
    return {name: "no" if record.failure else "one size" if record.reason else "any size"
            for name, record in read_records(folder / "exports.json").items()}


def listed() -> list[str]:
    """The models of the tables: all of the zoo but the U-Nets around each of the others."""
    return [name for name in list_models() if name not in unet.ENCODERS]


DETAILS = ("model", "mechanism", "parameters", "MACs", "size", "reported top-1", "licence of the authors' weights", "paper")


def details(name: str) -> tuple[str, ...]:
    """What `DETAILS` are of a model, as plain text."""
    model = _model(name)
    _, licence = _weights(model)
    return name, mechanism_of(name) or NONE, *_counts(name, model), _top1(name), licence, _cfg(model)["paper_ids"]


class Page(NamedTuple):
    """What the page of a mechanism says of it: its title, its idea in a sentence, and the Markdown link to its first paper."""

    title: str
    lead: str
    paper: str


def read_page(mechanism: str, folder: Path = PAGES) -> Page:
    text = (folder / f"{mechanism}.md").read_text()
    heading, lead, _ = text.split("\n\n", 2)
    return Page(heading.removeprefix("# "), " ".join(lead.split()), cast(re.Match[str], re.search(r"\[arXiv \S+\]\(\S+\)", text))[0])


def mechanism_table() -> str:
    """A Markdown table for the README: every mechanism in a sentence, its smallest network, its paper."""
    rows = [_row("mechanism", "idea", "smallest network", "paper"), _row("---", "---", "---", "---")]
    for mechanism in MECHANISMS:
        page, smallest = read_page(mechanism), min(list_models("*_nano*", mechanism), key=len)
        rows.append(_row(f"[{page.title}](docs/{mechanism}.md)", page.lead, f"`{smallest}`", page.paper.replace("arXiv ", "")))
    return "\n".join(rows)


def model_table(names: Iterable[str], folder: Path = MEASUREMENTS) -> str:
    """A Markdown table for docs/models.md: all that is known, with the measurements in `folder`."""
    heads = ("model", "mechanism", "parameters", "MACs", "size", "reported top-1", "paper", "authors' weights", "their licence",
             "CPU latency", "ONNX", "kernels")
    rows = [_row(*heads), _row("---", "---", "---:", "---:", "---:", "---:", "---", "---", "---", "---:", "---", "---")]
    latency, onnx = latencies(folder), exported(folder)
    for name in names:
        model, family, mechanism = _model(name), timm.model_entrypoint(name).__module__, mechanism_of(name)
        top1 = f"{_top1(name)}, {sys.modules[family].REPORTED_IN}" if name in REPORTED_TOP1 else NONE
        page = f"[{mechanism}]({mechanism}.md)" if mechanism else NONE
        rows.append(_row(
            f"`{name}`", page, *_counts(name, model), top1, _paper(model), *_weights(model),
            f"{latency[name]:.2f}" if name in latency else NONE, onnx.get(name, NONE),
            ", ".join(f"`{kernel}`" for kernel in kernels(model)) or NONE))
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _counts(name: str, model: nn.Module) -> tuple[str, str, str]:
    parameters = sum(p.numel() for p in model.parameters())
    return f"{parameters / 1e6:.2f} M", f"{macs(name) / 1e9:.2f} G", _size(_cfg(model)["input_size"])


def _size(shape: tuple[int, ...]) -> str:
    return str(shape[-1]) + ("³" if len(shape) == 4 else "")


def _top1(name: str) -> str:
    return f"{REPORTED_TOP1[name]} %" if name in REPORTED_TOP1 else NONE


def _paper(model: nn.Module) -> str:
    paper = _cfg(model)["paper_ids"].removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{paper})"


def _weights(model: nn.Module) -> tuple[str, str]:
    """Where the authors' weights are, and their licence, as `zoo.models.released` and the model's config have it."""
    cfg = _cfg(model)
    if cfg["tag"] == "untrained":
        return NONE, NONE
    return f"[theirs]({cfg['origin_url']})", cfg.get("license") or "not stated"


TABLES: dict[str, Callable[[], str]] = {"mechanisms": mechanism_table, "models": lambda: model_table(listed())}


def marks(name: str) -> tuple[str, str]:
    """Between which lines of a Markdown file the table stands."""
    return f"<!-- {name}: generated by `make models` -->", f"<!-- /{name} -->"


def write_tables(path: Path) -> list[str]:
    """Writes those of `TABLES` for which the Markdown file at `path` has a place, and returns their names."""
    text = path.read_text()
    places = [name for name in TABLES if all(mark in text for mark in marks(name))]
    if not places:
        raise InputError(f"{path} has no place for a table; it is between lines such as {' and '.join(marks('models'))}")
    for name in places:
        begin, end = marks(name)
        text = f"{text.split(begin)[0]}{begin}\n{TABLES[name]()}\n{end}{text.split(end)[1]}"
    path.write_text(text)
    return places
