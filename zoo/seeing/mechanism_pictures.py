"""Pictures of what a model attends to: one that explains its mechanism for every stage, and attributions of its answer.

matplotlib draws (`pip install "zoo-attention[visualize]"`).
"""
import base64
import contextlib
import html
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import zoo.layers
from zoo.checkpoints import ModelInfo
from zoo.errors import InputError, require
from zoo.files import check_writable, explaining, make_folder
from zoo.seeing.attributions import heat, undisturbed

Point = tuple[float, float]


@dataclass(frozen=True)
class Seen:
    """A picture, the name of its file, and what it shows."""

    name: str
    title: str
    caption: str
    picture: Image.Image


@dataclass(frozen=True)
class Captured:
    """A layer that reported, the maps it reported of one image, the size (H, W) of its map, and the image (H, W, 3), 0 to 1.

    The size of tokens in a sequence is that of the image.
    """

    name: str
    layer: nn.Module
    maps: dict[str, Tensor]
    size: tuple[int, int]
    image: np.ndarray

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Where matplotlib has to put the image for the centres of the map's positions to be whole numbers."""
        return -0.5, self.size[1] - 0.5, self.size[0] - 0.5, -0.5


def mechanisms(model: nn.Module, info: ModelInfo, picture: Image.Image, query: Point = (0.5, 0.5)) -> list[Seen]:
    """What the layers of `model` did with `picture`: the last layer of every stage.

    Args:
        query: where the attention comes from whose targets are shown, as fractions of height and width of what the model sees.

    Raises:
        InputError: a query outside the picture, or a model whose layers report nothing.
    """
    if not all(0 <= fraction < 1 for fraction in query):
        raise InputError(f"the query is at least 0 and less than 1, as a fraction of height and width; got {query[0]:g} {query[1]:g}")
    image, shown = _prepare(info, picture)
    with _sizes(model) as sizes, torch.inference_mode(), zoo.layers.capture(model) as maps:
        model(image)
    modules = dict(model.named_modules())
    drawn = {name: found for name, found in maps.items() if type(modules[name]) in PICTURES}
    if not drawn:
        known = ", ".join(kind.__name__ for kind in PICTURES)
        raise InputError(f"{info.name} has no layer with a picture of its own; {known} have")
    # Layers that report maps of the same shapes are one stage.
    stages = {(type(modules[name]), *(value.shape for value in found.values())): name for name, found in drawn.items()}
    seen = []
    for name in stages.values():
        captured = Captured(name, modules[name], {key: value[0] for key, value in drawn[name].items()},
                            sizes.get(name, shown.shape[:2]), shown)
        figure, caption = PICTURES[type(modules[name])](captured, query)
        seen.append(Seen(name.replace(".", "-"), f"{name}: {type(modules[name]).__name__}", caption, _render(figure)))
    return seen


def attribution(model: nn.Module, info: ModelInfo, picture: Image.Image, method: str, target: int | None = None) -> Seen:
    """Which pixels speak for class number `target` (default: the most probable one), by a method of `zoo.seeing.attributions.heat`.

    Raises:
        InputError: an unknown method or class, or a model that the method does not suit.
    """
    image, shown = _prepare(info, picture)
    with undisturbed(model), torch.inference_mode():
        logits = model(image)[0]
    if logits.ndim != 1:
        raise InputError(f"{info.name} gives maps; attributions explain the classes of whole pictures")
    target = int(logits.argmax()) if target is None else target
    check_target(target, len(logits))
    figure, (left, right) = _figure(2)
    left.imshow(shown)
    _overlay(right, shown, heat(model, image, target, method), (-0.5, shown.shape[1] - 0.5, shown.shape[0] - 0.5, -0.5))
    caption = f"For {info.class_name(target)}, predicted with probability {logits.softmax(0)[target]:.2f}."
    return Seen(method, method.replace("_", " "), caption, _render(figure))


def check_target(target: int, classes: int) -> None:
    """Raises InputError unless `target` is the number of one of so many classes."""
    if not 0 <= target < classes:
        raise InputError(f"the target is a class number from 0 to {classes - 1}, got {target}")


def page(title: str, sections: Sequence[tuple[str, Sequence[Seen]]]) -> str:
    """One HTML document with all pictures inside: it needs no other file and no server."""
    parts = []
    for heading, seen in sections:
        parts.append(f"<section><h2>{html.escape(heading)}</h2>")
        for shown in seen:
            buffer = io.BytesIO()
            shown.picture.save(buffer, "PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<figure><h3>{html.escape(shown.title)}</h3><img alt="{html.escape(shown.title)}" '
                         f'src="data:image/png;base64,{data}"><figcaption>{html.escape(shown.caption)}</figcaption></figure>')
        parts.append("</section>")
    style = ("body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}"
             "section{display:flex;flex-wrap:wrap;gap:1.5rem}h2{width:100%}h3{font-size:1rem;margin:0}figure{margin:0;max-width:34rem}"
             "img{min-width:16rem;max-width:100%}figcaption{color:#555}")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
            f"<h1>{html.escape(title)}</h1>{''.join(parts)}</html>")


@contextlib.contextmanager
def folder_for_pictures(folder: str | Path) -> Iterator[None]:
    """Makes `folder` before the work whose pictures go there, and takes back what it made if the block ends with an error.

    Raises InputError if there can be no such folder, or nothing can be written to it.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # Path.exists raises for some names
    try:
        make_folder(folder)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write(folder: str | Path, title: str, sections: Sequence[tuple[str, Sequence[Seen]]]) -> list[Path]:
    """Writes every picture as a PNG file and the page `index.html` into `folder`, which is made; returns the files.

    They are there all or, with an InputError, none: if the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    pictures = {f"{i + 1:03d}-{shown.name}.png": shown.picture for i, (_, seen) in enumerate(sections) for shown in seen}
    files = [folder / name for name in (*pictures, "index.html")]
    with folder_for_pictures(folder), explaining(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".pictures.") as made:
        for name, picture in pictures.items():
            picture.save(Path(made) / name)
        (Path(made) / "index.html").write_text(page(title, sections), encoding="utf-8")
        for path in files:
            check_writable(path)
        for path in files:
            (Path(made) / path.name).replace(path)
    return files


def _routing(seen: Captured, query: Point):
    layer, (height, width) = seen.layer, seen.size
    own = region_of(query, seen.size, layer.regions)
    routes = seen.maps["routes"][own].tolist()
    share = seen.maps["attention"][own].mean((0, 1)).unflatten(0, (len(routes), -1)).sum(1).tolist()
    figure, (axes,) = _figure(1)
    axes.imshow(seen.image, extent=seen.extent)
    boxes = [region_box(route, seen.size, layer.regions) for route in routes]
    for box, weight in zip(boxes, share, strict=True):
        axes.add_patch(_rectangle(box, facecolor=("yellow", 0.1 + 0.6 * weight / max(share)), edgecolor="black"))
    axes.add_patch(_rectangle(region_box(own, seen.size, layer.regions), fill=False, edgecolor="red", linewidth=2.5))
    count = sum(h * w > 0 for *_, h, w in boxes)  # some may lie off the map
    return figure, f"On this {height}x{width} map the red region attends to the {count} in yellow, the stronger the colour, the more."


def _deformable(seen: Captured, query: Point):
    points = sampling_points(seen.maps["offset"])
    figure, (left, right) = _figure(2)
    left.imshow(seen.image, extent=seen.extent)
    for row in _spread(seen.size[0]):
        for column in _spread(seen.size[1]):
            y, x = points[:, :, row, column].unbind(1)
            left.plot(x, y, "o", markersize=4, markeredgecolor="white", markeredgewidth=0.5)
            left.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    left.set_xlim(seen.extent[:2])
    left.set_ylim(seen.extent[2:])
    _overlay(right, seen.image, seen.maps["gate"].mean(0), seen.extent)
    return figure, "Left, where the deformable convolution samples for each red cross; right, the gate's mean over channels."


def _selective(seen: Captured, query: Point):
    weights = seen.maps["weights"].flatten(1)
    figure, (axes,) = _figure(1)
    axes.boxplot([branch.tolist() for branch in weights], whis=(5, 95), showfliers=False)
    axes.set(ylim=(0, 1), xlabel="branch, from the smallest kernel to the largest", ylabel="weight over channels")
    axes.set_axis_on()
    means = ", ".join(f"{mean:.2f}" for mean in weights.mean(1).tolist())
    return figure, f"How the channels weigh the branches (boxes: quartiles, whiskers: 5 and 95 per cent); means {means}."


def _polarized(seen: Captured, query: Point):
    figure, (left, right) = _figure(2)
    _overlay(left, seen.image, seen.maps["spatial"][0], seen.extent)
    right.hist(seen.maps["channel"].flatten().tolist(), bins=30, range=(0, 1))
    right.set(xlabel="gate", ylabel="channels")
    right.set_axis_on()
    spatial = seen.maps["spatial"]
    return figure, f"Left, the gate of positions ({spatial.min():.3f} to {spatial.max():.3f}); right, the gates of channels."


def _kernels(seen: Captured, query: Point):
    kernels = seen.maps["kernels"]
    shown = kernels[torch.linspace(0, len(kernels) - 1, min(64, len(kernels))).round().long()]
    columns = math.ceil(math.sqrt(len(shown)))
    tiles = F.pad(shown, (0, 1, 0, 1), value=float("nan"))
    tiles = torch.cat([tiles, tiles.new_full((-len(tiles) % columns, *tiles.shape[1:]), float("nan"))])
    mosaic = tiles.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    figure, (left, right) = _figure(2)
    left.imshow(seen.image)
    limit = shown.abs().max().item() or 1.0
    bar = right.imshow(mosaic.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(bar, ax=right, shrink=0.8)
    return figure, f"The kernels that this image made for {len(shown)} of {len(kernels)} channels, evenly spaced."


def _gate(seen: Captured, query: Point):
    figure, (axes,) = _figure(1)
    attention = seen.maps["attention"]
    _overlay(axes, seen.image, attention[0], seen.extent)
    return figure, f"What the gate lets through, {attention.min():.2f} to {attention.max():.2f}."


def _high_and_low(seen: Captured, query: Point):
    layer, (height, width) = seen.layer, seen.size
    grid = tuple(math.ceil(n / layer.window) for n in seen.size)
    row, column = (int(f * n) for f, n in zip(query, seen.size, strict=True))
    figure, (left, right) = _figure(2)
    for axes in (left, right):
        axes.imshow(seen.image, extent=seen.extent)
        axes.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    if "hi" in seen.maps:
        window = row // layer.window * grid[1] + column // layer.window
        place = row % layer.window * layer.window + column % layer.window
        share = seen.maps["hi"].mean(0)[window, place].tolist()
        top, first = row - row % layer.window, column - column % layer.window
        for i, weight in enumerate(share):
            box = (top + i // layer.window, first + i % layer.window, 1, 1)
            left.add_patch(_rectangle(box, facecolor=("yellow", 0.1 + 0.6 * weight / max(share)), edgecolor="black"))
    if "lo" in seen.maps:
        low = seen.maps["lo"].mean(0)[row * width + column].unflatten(0, grid).repeat_interleave(layer.window, 0)
        _overlay(right, seen.image, low.repeat_interleave(layer.window, 1)[:height, :width], seen.extent)
    return figure, (f"What the red cross attends to: left, its window of {layer.window}x{layer.window} positions, in the heads of high "
                    "frequencies; right, the means of all windows, in those of low ones.")


def _halo(seen: Captured, query: Point):
    layer, attention = seen.layer, seen.maps["attention"]
    block, halo, stride = layer.block_size, layer.halo_size, layer.stride
    row, column = (int(f * n) for f, n in zip(query, seen.size, strict=True))
    own = attention[row // block, column // block].mean(0)[row % block // stride, column % block // stride]
    top, first = row // block * block - halo, column // block * block - halo
    window = block + 2 * halo
    figure, (axes,) = _figure(1)
    axes.imshow(seen.image, extent=seen.extent)
    axes.imshow(own, extent=(first - 0.5, first + window - 0.5, top + window - 0.5, top - 0.5), cmap="inferno", alpha=0.6)
    axes.add_patch(_rectangle((top + halo, first + halo, block, block), fill=False, edgecolor="white", linewidth=1.5))
    axes.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    axes.set_xlim(min(seen.extent[0], first - 0.5), max(seen.extent[1], first + window - 0.5))
    axes.set_ylim(max(seen.extent[2], top + window - 0.5), min(seen.extent[3], top - 0.5))
    return figure, f"What the red cross attends to: its block of {block}x{block} positions (white) and a halo of {halo} around it."


def _token_aware(seen: Captured, query: Point):
    weights = seen.maps["weights"]
    figure, (axes,) = _figure(1)
    _overlay(axes, seen.image, weights @ torch.arange(weights.shape[-1], dtype=weights.dtype), seen.extent)
    shares = ", ".join(f"{share:.2f}" for share in weights.mean((0, 1)).tolist())
    return figure, f"How far every token looks around itself, as its mean dilation; shares of the pools, itself first: {shares}."


def _context(seen: Captured, query: Point):
    similarity = seen.maps["similarity"]
    ratio = seen.size[0] / seen.size[1]
    rows, columns = math.isqrt(int(len(similarity) * ratio)), math.isqrt(int(len(similarity) / ratio))  # the patches, which come last
    figure, (axes,) = _figure(1)
    _overlay(axes, seen.image, similarity[-rows * columns :].unflatten(0, (rows, columns)), seen.extent)
    return figure, f"Cosine of every token and the mean of all, which is added to it, {similarity.min():.2f} to {similarity.max():.2f}."


PICTURES: dict[type[nn.Module], Callable] = {
    zoo.layers.ATConv: _kernels,
    zoo.layers.AttentionGate: _gate,
    zoo.layers.BiLevelRoutingAttention: _routing,
    zoo.layers.ContextBroadcast: _context,
    zoo.layers.DAS: _deformable,
    zoo.layers.HaloAttention: _halo,
    zoo.layers.HiLoAttention: _high_and_low,
    zoo.layers.PolarizedSelfAttention: _polarized,
    zoo.layers.SelectiveKernelUnit: _selective,
    zoo.layers.TokenAwareAvgPool: _token_aware,
}
WITH_QUERY = {zoo.layers.BiLevelRoutingAttention, zoo.layers.HaloAttention, zoo.layers.HiLoAttention}  # whose pictures depend on it


def pictured(model: nn.Module) -> set[type[nn.Module]]:
    """The kinds of layers of `model` that have a picture of their own."""
    return {type(module) for module in model.modules()} & set(PICTURES)


def region_of(query: Point, size: tuple[int, int], regions: tuple[int, int]) -> int:
    """The region, counted in reading order, that holds a point given as fractions of the map."""
    row, column = (int(f * n) // math.ceil(n / r) for f, n, r in zip(query, size, regions, strict=True))
    return row * regions[1] + column


def region_box(region: int, size: tuple[int, int], regions: tuple[int, int]) -> tuple[int, int, int, int]:
    """First row and column of a region's positions on the map, and how many of either."""
    step = [math.ceil(n / r) for n, r in zip(size, regions, strict=True)]
    first = [place * length for place, length in zip(divmod(region, regions[1]), step, strict=True)]
    return *first, *(max(min(length, n - start), 0) for length, n, start in zip(step, size, first, strict=True))


def sampling_points(offset: Tensor) -> Tensor:
    """Offsets (2·k², H, W) of a k×k kernel → rows and columns (k², 2, H, W) at which it samples."""
    places, (h, w) = offset.unflatten(0, (-1, 2)), offset.shape[1:]
    side = math.isqrt(len(places))
    around = torch.arange(side) - side // 2
    kernel = torch.stack(torch.meshgrid(around, around, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    here = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return here + kernel + places


def _spread(length: int) -> Iterable[int]:
    """Three positions of a side, or as many as there are."""
    return sorted({length // 6, length // 2, length - 1 - length // 6})


def _prepare(info: ModelInfo, picture: Image.Image) -> tuple[Tensor, np.ndarray]:
    """The input of the model, (1, C, H, W), and what can be seen of it, (H, W, 3) from 0 to 1."""
    image = timm.data.create_transform(**info.data_config, is_training=False)(picture)
    mean, std = (torch.tensor(info.data_config[key])[:, None, None] for key in ("mean", "std"))
    shown = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
    return image[None], shown.numpy()


@contextlib.contextmanager
def _sizes(model: nn.Module):
    """By module: height and width of the map that it is given, channels first or last as the layer takes them."""
    sizes = {}

    def note(name: str, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            channels_last = type(module) in CHANNELS_LAST
            sizes[name] = tuple(args[0].shape[1:3] if channels_last else args[0].shape[2:])

    hooks = [module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
             for name, module in model.named_modules() if type(module) in PICTURES]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


CHANNELS_LAST = {zoo.layers.BiLevelRoutingAttention, zoo.layers.HiLoAttention, zoo.layers.TokenAwareAvgPool}


def _figure(count: int):
    require("seeing", "visualize", "matplotlib")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * count, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.set_axis_off()
    return figure, axes


def _overlay(axes, image: np.ndarray, heat: Tensor, extent: tuple[float, ...]) -> None:
    axes.imshow(image, extent=extent)
    axes.imshow(heat.float().cpu().numpy(), extent=extent, cmap="inferno", alpha=0.6, interpolation="bilinear")


def _rectangle(box: tuple[int, int, int, int], **style):
    from matplotlib.patches import Rectangle
    row, column, height, width = box
    return Rectangle((column - 0.5, row - 0.5), width, height, **style)


def _render(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
