"""What heads of self-attention look at, in numbers (Teaching Matters, arXiv 2212.03862).

Attention A is (images, layers, heads, T, T), rows of queries; T are prefix tokens and rows × columns patches. S is the part of
patches, S' the same with rows of sum 1 (rows of sum 0 stay 0).

Differences from the authors' code (mwalmer-umd/vit_analysis, analysis/attention_metrics.py): maps need not be square; a step to the next
patch is (rows - 1)⁻¹ down and (columns - 1)⁻¹ to the right; any number of prefix tokens; `aligned` is the mean over images, theirs the sum.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Grid(NamedTuple):
    """How tokens lie on the picture: prefix tokens come first, then patches row by row."""

    prefix: int
    rows: int
    columns: int


class Offset(NamedTuple):
    """Where heads look, as seen from the query: how far from it the centre of mass lies, to the right and down.

    Each (layers, heads). To the right and down axes go from -1 to 1, over the whole map of moves, twice as wide as the picture.
    """

    distance: Tensor
    x: Tensor
    y: Tensor


def check(attention: Tensor, grid: Grid) -> None:
    """Raises ValueError unless attention is (images, layers, heads, T, T) of the grid's tokens."""
    tokens = grid.prefix + grid.rows * grid.columns
    if attention.ndim != 5 or attention.shape[3:] != (tokens, tokens):
        raise ValueError(f"attention must be (images, layers, heads, T, T) with T = {grid.prefix} + {grid.rows}·{grid.columns} = {tokens}, "
                         f"got shape {tuple(attention.shape)}")


def _spatial(attention: Tensor, grid: Grid) -> Tensor:
    check(attention, grid)
    return attention[..., grid.prefix:, grid.prefix:]


def _normalized(spatial: Tensor) -> Tensor:
    total = spatial.sum(-1, keepdim=True)
    return spatial / torch.where(total == 0, 1, total)


def distance(attention: Tensor, grid: Grid) -> Tensor:
    """Mean over queries of Σ_keys S' · distance, on the unit square: (images, layers, heads), 0 to √2."""
    axes = [torch.linspace(0, 1, n, dtype=attention.dtype, device=attention.device) if n > 1 else attention.new_zeros(1)
            for n in (grid.rows, grid.columns)]
    places = torch.cartesian_prod(*axes)
    return (_normalized(_spatial(attention, grid)) * torch.cdist(places, places)).sum(-1).mean(-1)


def position_deviation(attention: Tensor, grid: Grid) -> Tensor:
    """How much attention depends on the query: the deviation of S over queries, mean over keys, (images, layers, heads)."""
    return _spatial(attention, grid).std(-2).mean(-1)


def head_deviation(attention: Tensor, grid: Grid) -> Tensor:
    """How much heads differ: the deviation of S over heads, mean over queries and keys, (images, layers)."""
    return _spatial(attention, grid).std(2).mean((-2, -1))


def on_tokens(attention: Tensor, grid: Grid, queries: str = "all") -> Tensor:
    """Mean attention that every token gets, over images and queries: (layers, heads, T).

    Args:
        queries: "all"; "cls", the first token; "spc", the patches; "spcpure", the patches, with what they give to prefix tokens left out
            and rows scaled to sum 1.
    """
    check(attention, grid)
    if queries == "all":
        rows = attention
    elif queries == "cls":
        rows = attention[..., :1, :]
    elif queries == "spc":
        rows = attention[..., grid.prefix:, :]
    elif queries == "spcpure":
        rows = F.pad(_normalized(_spatial(attention, grid)), (grid.prefix, 0))
    else:
        raise ValueError(f"queries must be all, cls, spc or spcpure, got {queries!r}")
    return rows.mean((0, -2))


def aligned(attention: Tensor, grid: Grid) -> Tensor:
    """S' moved so that the query lies in the middle, mean over images and queries: (layers, heads, 2·rows - 1, 2·columns - 1)."""
    mean = _normalized(_spatial(attention, grid)).mean(0)
    rows, columns = grid[1:]
    mean = mean.unflatten(-1, (rows, columns)).unflatten(-3, (rows, columns))  # (layers, heads, queries, keys), of two axes each
    out = mean.new_zeros(*mean.shape[:2], 2 * rows - 1, 2 * columns - 1)
    for i in range(rows):
        for j in range(columns):
            out[..., rows - 1 - i:2 * rows - 1 - i, columns - 1 - j:2 * columns - 1 - j] += mean[:, :, i, j]
    return out / (rows * columns)


def offset(attention: Tensor, grid: Grid) -> Offset:
    """The centre of mass of `aligned`. Heads whose centre is off 0 and whose spread is small look at a neighbour."""
    mass = aligned(attention, grid)
    mass = mass / mass.sum((-2, -1), keepdim=True)
    y, x = (torch.linspace(-1, 1, n, dtype=mass.dtype, device=mass.device) if n > 1 else mass.new_zeros(1) for n in mass.shape[-2:])
    down, right = (mass.sum(-1) * y).sum(-1), (mass.sum(-2) * x).sum(-1)
    return Offset(torch.hypot(down, right), right, down)
