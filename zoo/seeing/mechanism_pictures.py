"""A picture for each mechanism that shows what it did: drawn from the maps that a layer reported."""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo.layers
from zoo.seeing.attributions import grid
from zoo.seeing.figures import HEAT, new_figure, overlay, rectangle

Point = tuple[float, float]
PARTS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22")  # colours of the first, and so on


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


def _routing(seen: Captured, query: Point):
    regions, (height, width) = cast(tuple[int, int], seen.layer.regions), seen.size
    own = region_of(query, seen.size, regions)
    routes = seen.maps["routes"][own].tolist()
    share = seen.maps["attention"][own].mean((0, 1)).unflatten(0, (len(routes), -1)).sum(1).tolist()
    figure, (axes,) = new_figure(1)
    axes.imshow(seen.image, extent=seen.extent)
    boxes = [region_box(route, seen.size, regions) for route in routes]
    for box, weight in zip(boxes, share, strict=True):
        axes.add_patch(rectangle(box, facecolor=("yellow", 0.1 + 0.6 * weight / max(share)), edgecolor="black"))
    axes.add_patch(rectangle(region_box(own, seen.size, regions), fill=False, edgecolor="red", linewidth=2.5))
    count = sum(h * w > 0 for *_, h, w in boxes)  # some may lie off the map
    return figure, f"On this {height}x{width} map the red region attends to the {count} in yellow, the stronger the colour, the more."


def _deformable(seen: Captured, query: Point):
    points = sampling_points(seen.maps["offset"])
    figure, (left, right) = new_figure(2)
    left.imshow(seen.image, extent=seen.extent)
    for row in _spread(seen.size[0]):
        for column in _spread(seen.size[1]):
            y, x = points[:, :, row, column].unbind(1)
            left.plot(x, y, "o", markersize=4, markeredgecolor="white", markeredgewidth=0.5)
            left.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    left.set_xlim(seen.extent[:2])
    left.set_ylim(seen.extent[2:])
    overlay(right, seen.image, seen.maps["gate"].mean(0), seen.extent)
    return figure, "Left, where the deformable convolution samples for each red cross; right, the gate's mean over channels."


def _selective(seen: Captured, query: Point):
    weights = seen.maps["weights"].flatten(1)
    figure, (axes,) = new_figure(1)
    axes.boxplot([branch.tolist() for branch in weights], whis=(5, 95), showfliers=False)
    axes.set(ylim=(0, 1), xlabel="branch, from the smallest kernel to the largest", ylabel="weight over channels")
    axes.set_axis_on()
    means = ", ".join(f"{mean:.2f}" for mean in weights.mean(1).tolist())
    return figure, f"How the channels weigh the branches (boxes: quartiles, whiskers: 5 and 95 per cent); means {means}."


def _polarized(seen: Captured, query: Point):
    figure, (left, right) = new_figure(2)
    overlay(left, seen.image, seen.maps["spatial"][0], seen.extent)
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
    figure, (left, right) = new_figure(2)
    left.imshow(seen.image)
    limit = shown.abs().max().item() or 1.0
    bar = right.imshow(mosaic.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(bar, ax=right, shrink=0.8)
    return figure, f"The kernels that this image made for {len(shown)} of {len(kernels)} channels, evenly spaced."


def _gate(seen: Captured, query: Point):
    figure, (axes,) = new_figure(1)
    attention = seen.maps["attention"]
    overlay(axes, seen.image, attention[0], seen.extent)
    return figure, f"What the gate lets through, {attention.min():.2f} to {attention.max():.2f}."


def _high_and_low(seen: Captured, query: Point):
    length, (height, width) = cast(int, seen.layer.window), seen.size  # of a window's sides
    grid = tuple(math.ceil(n / length) for n in seen.size)
    row, column = (int(f * n) for f, n in zip(query, seen.size, strict=True))
    figure, (left, right) = new_figure(2)
    for axes in (left, right):
        axes.imshow(seen.image, extent=seen.extent)
        axes.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    if "hi" in seen.maps:
        window = row // length * grid[1] + column // length
        place = row % length * length + column % length
        share = seen.maps["hi"].mean(0)[window, place].tolist()
        top, first = row - row % length, column - column % length
        for i, weight in enumerate(share):
            box = (top + i // length, first + i % length, 1, 1)
            left.add_patch(rectangle(box, facecolor=("yellow", 0.1 + 0.6 * weight / max(share)), edgecolor="black"))
    if "lo" in seen.maps:
        low = seen.maps["lo"].mean(0)[row * width + column].unflatten(0, grid).repeat_interleave(length, 0)
        overlay(right, seen.image, low.repeat_interleave(length, 1)[:height, :width], seen.extent)
    return figure, (f"What the red cross attends to: left, its window of {length}x{length} positions, in the heads of high "
                    "frequencies; right, the means of all windows, in those of low ones.")


def _halo(seen: Captured, query: Point):
    layer, attention = seen.layer, seen.maps["attention"]
    block, halo, stride = cast(tuple[int, int, int], (layer.block_size, layer.halo_size, layer.stride))
    row, column = (int(f * n) for f, n in zip(query, seen.size, strict=True))
    own = attention[row // block, column // block].mean(0)[row % block // stride, column % block // stride]
    top, first = row // block * block - halo, column // block * block - halo
    window = block + 2 * halo
    figure, (axes,) = new_figure(1)
    axes.imshow(seen.image, extent=seen.extent)
    drawn = axes.imshow(own, extent=(first - 0.5, first + window - 0.5, top + window - 0.5, top - 0.5), cmap="inferno", alpha=0.6)
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    axes.add_patch(rectangle((top + halo, first + halo, block, block), fill=False, edgecolor="white", linewidth=1.5))
    axes.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    axes.set_xlim(min(seen.extent[0], first - 0.5), max(seen.extent[1], first + window - 0.5))
    axes.set_ylim(max(seen.extent[2], top + window - 0.5), min(seen.extent[3], top - 0.5))
    return figure, f"What the red cross attends to: its block of {block}x{block} positions (white) and a halo of {halo} around it."


def _token_aware(seen: Captured, query: Point):
    weights = seen.maps["weights"]
    figure, (axes,) = new_figure(1)
    overlay(axes, seen.image, weights @ torch.arange(weights.shape[-1], dtype=weights.dtype), seen.extent)
    shares = ", ".join(f"{share:.2f}" for share in weights.mean((0, 1)).tolist())
    return figure, f"How far every token looks around itself, as its mean dilation; shares of the pools, itself first: {shares}."


def _context(seen: Captured, query: Point):
    similarity = seen.maps["similarity"]
    figure, (axes,) = new_figure(1)
    overlay(axes, seen.image, _patches(similarity, seen.size), seen.extent)
    return figure, f"Cosine of every token and the mean of all, which is added to it, {similarity.min():.2f} to {similarity.max():.2f}."


def _picked_heads(seen: Captured, query: Point):
    layer, gates = cast(zoo.layers.MixtureOfHeads, seen.layer), seen.maps["gates"]
    gates = _patches(gates, seen.size) if gates.ndim == 2 else gates
    first, count = layer.shared_heads, gates.shape[2]
    columns = math.ceil(math.sqrt(count))
    tiles = F.pad(gates.permute(2, 0, 1), (0, 1, 0, 1), value=float("nan"))
    tiles = torch.cat([tiles, tiles.new_full((-count % columns, *tiles.shape[1:]), float("nan"))])
    figure, (left, right) = new_figure(2)
    left.imshow(seen.image)
    drawn = right.imshow(tiles.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="inferno", vmin=0)
    figure.colorbar(drawn, ax=right, shrink=0.8)
    return figure, (f"What every position of the map multiplies the output of each of {count} heads by: of the {count - first} that are "
                    f"not shared it picks {layer.active_heads}, and the others count 0.")


def _patches(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (N, …) of an image of this size as a map; the patches come last."""
    ratio = size[0] / size[1]
    rows, columns = math.isqrt(int(len(tokens) * ratio)), math.isqrt(int(len(tokens) / ratio))
    return tokens[-rows * columns :].unflatten(0, (rows, columns))


def _relational(seen: Captured, query: Point):
    attention, relations = seen.maps["attention"].mean(0), seen.maps["relations"]
    tokens, size = len(attention), seen.image.shape[:2]
    rows, columns = grid(tokens - 1, size) or grid(tokens, size) or (1, tokens)  # behind a class token, or none
    row, column = (int(f * n) for f, n in zip(query, (rows, columns), strict=True))
    place = tokens - rows * columns + row * columns + column
    received, related = (y[..., -rows * columns :].unflatten(-1, (rows, columns)) for y in (attention[place], relations[:, place]))
    strongest = int(related.flatten(1).std(1).argmax())
    figure, (left, right) = new_figure(2)
    overlay(left, seen.image, received, seen.extent)
    right.imshow(seen.image, extent=seen.extent)
    limit = related[strongest].abs().max().item() or 1.0
    drawn = right.imshow(related[strongest].numpy(), extent=seen.extent, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
    figure.colorbar(drawn, ax=right, shrink=0.8)
    for axes in (left, right):
        y, x = ((f + 0.5) * n / m - 0.5 for f, n, m in zip((row, column), seen.size, (rows, columns), strict=True))
        axes.plot(x, y, "+", color="red", markersize=10, markeredgewidth=2)
    return figure, ("Left, which patches the relational heads let the red cross receive from; right, how it is related to all, by the "
                    f"one of {len(relations)} relations that differs most.")


def _queries(seen: Captured, query: Point):
    attention = seen.maps["attention"]
    count, tokens = attention.shape
    size = seen.image.shape[:2]
    rows, columns = grid(tokens, size) or grid(tokens - 1, size) or (1, tokens)  # behind a class token, or none
    across = math.ceil(math.sqrt(count))
    figure, axes = new_figure(across, math.ceil(count / across))
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    for number, (each, weights) in enumerate(zip(axes, attention, strict=False), 1):
        each.imshow(seen.image, extent=extent)
        each.imshow(weights[-rows * columns :].unflatten(0, (rows, columns)).numpy(), extent=extent, **HEAT)
        each.set_title(f"query {number}: up to {weights.max():.2f}")
    return figure, f"Where each query of the head gathers its channels, on a map of {rows}x{columns} tokens, each in its own scale."


def _discovered(seen: Captured, query: Point):
    maps, mask = seen.maps["maps"], seen.maps["mask"] > 0
    parts, own = len(maps) - 1, maps.argmax(0)
    colours = torch.tensor([hex_colour(PARTS[part % len(PARTS)]) for part in range(parts)] + [(0.0, 0.0, 0.0)])[own]
    figure, (left, right) = new_figure(2)
    extent = (-0.5, own.shape[1] - 0.5, own.shape[0] - 0.5, -0.5)
    for axes, colour, strength in ((left, colours, 0.55 * (own < parts)), (right, torch.zeros(*own.shape, 3), 0.85 * ~mask)):
        axes.imshow(seen.image, extent=extent)
        axes.imshow(torch.cat([colour, strength[..., None]], -1).numpy(), extent=extent, interpolation="nearest")
    found = len(set(own.unique().tolist()) - {parts})
    return figure, (f"Left, the likeliest of {parts} parts for every patch, of which {found} are there; patches without a colour are of "
                    f"the background. Right, what is left to see: {int(mask.sum())} of {mask.numel()} patches.")


def _scans(seen: Captured, query: Point):
    steps, rates = seen.maps["steps"], cast(Tensor, seen.layer.A_logs).detach().float().exp().unflatten(0, (4, -1))
    height, width = steps.shape[2:]
    row, column = (int(f * n) for f, n in zip(query, (height, width), strict=True))
    held = torch.zeros(2, height, width)
    for k, (step, rate) in enumerate(zip(steps, rates, strict=True)):
        across, backwards = k % 2 == 1, k > 1  # column by column, from the end
        place = column * height + row if across else row * width + column
        line = (step.mT if across else step).flatten(1)
        if backwards:
            line, place = line.flip(1), height * width - 1 - place
        taken = line.cumsum(1)
        kept = (rate[:, :, None] * (taken - taken[:, place, None])[:, None]).clamp(max=0).exp().mean((0, 1))
        kept = torch.where(torch.arange(len(kept)) <= place, kept, 0)
        kept = kept.flip(0) if backwards else kept
        held[int(across)] += (kept.unflatten(0, (width, height)).mT if across else kept.unflatten(0, (height, width))) / 2
    figure, (shown, taken, *below) = new_figure(2, 2)
    shown.imshow(seen.image, extent=seen.extent)
    overlay(taken, seen.image, steps.mean((0, 1)), seen.extent)
    for axes, kept in zip(below, held, strict=True):
        overlay(axes, seen.image, kept, seen.extent)
    for axes in (shown, *below):
        axes.plot(column, row, "+", color="red", markersize=10, markeredgewidth=2)
    return figure, ("Above, on the right, how large a step the states take at each position, mean of channels and orders; below, how much "
                    "of what was written at each position they still hold at the red cross, by rows and by columns, in both directions.")


PICTURES: dict[type[nn.Module], Callable] = {
    zoo.layers.ATConv: _kernels,
    zoo.layers.AttentionGate: _gate,
    zoo.layers.BiLevelRoutingAttention: _routing,
    zoo.layers.ContextBroadcast: _context,
    zoo.layers.DAS: _deformable,
    zoo.layers.EfficientProbing: _queries,
    zoo.layers.HaloAttention: _halo,
    zoo.layers.HiLoAttention: _high_and_low,
    zoo.layers.MixtureOfHeads: _picked_heads,
    zoo.layers.PartDiscovery: _discovered,
    zoo.layers.PolarizedSelfAttention: _polarized,
    zoo.layers.RelationalAttention: _relational,
    zoo.layers.SelectiveKernelUnit: _selective,
    zoo.layers.SelectiveScan2d: _scans,
    zoo.layers.SimPool: _queries,
    zoo.layers.TokenAwareAvgPool: _token_aware,
}
COLOURS: dict[type[nn.Module], tuple[str, ...]] = {  # of `zoo.seeing.page.LEGEND`, in those pictures
    zoo.layers.ATConv: ("signs",),
    zoo.layers.AttentionGate: ("heat",),
    zoo.layers.BiLevelRoutingAttention: ("from", "routes"),
    zoo.layers.ContextBroadcast: ("heat",),
    zoo.layers.DAS: ("from", "samples", "heat"),
    zoo.layers.EfficientProbing: ("heat",),
    zoo.layers.HaloAttention: ("from", "block", "heat"),
    zoo.layers.HiLoAttention: ("from", "routes", "heat"),
    zoo.layers.MixtureOfHeads: ("heat",),
    zoo.layers.PartDiscovery: ("parts", "masked"),
    zoo.layers.PolarizedSelfAttention: ("heat",),
    zoo.layers.RelationalAttention: ("from", "heat", "relations"),
    zoo.layers.SelectiveKernelUnit: (),
    zoo.layers.SelectiveScan2d: ("from", "heat"),
    zoo.layers.SimPool: ("heat",),
    zoo.layers.TokenAwareAvgPool: ("heat",),
}
WITH_QUERY = {zoo.layers.BiLevelRoutingAttention, zoo.layers.HaloAttention, zoo.layers.HiLoAttention,
              zoo.layers.RelationalAttention, zoo.layers.SelectiveScan2d}  # whose pictures depend on it


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
    height, width = (max(min(length, n - start), 0) for length, n, start in zip(step, size, first, strict=True))
    return first[0], first[1], height, width


def sampling_points(offset: Tensor) -> Tensor:
    """Offsets (2·k², H, W) of a k×k kernel → rows and columns (k², 2, H, W) at which it samples."""
    places, (h, w) = offset.unflatten(0, (-1, 2)), offset.shape[1:]
    side = math.isqrt(len(places))
    around = torch.arange(side) - side // 2
    kernel = torch.stack(torch.meshgrid(around, around, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    here = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return here + kernel + places


def hex_colour(colour: str) -> tuple[float, float, float]:
    """#rrggbb as shares of red, green and blue."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _spread(length: int) -> Iterable[int]:
    """Three positions of a side, or as many as there are."""
    return sorted({length // 6, length // 2, length - 1 - length // 6})
