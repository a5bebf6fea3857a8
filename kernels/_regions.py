"""Maps cut into a fixed grid of regions of equal size, shared by the routing operators."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._exporting import known


def region_size(height: int, width: int, regions: Sequence[int]) -> tuple[int, int]:
    """Height and width of the smallest regions whose grid covers the map: ⌈H/rows⌉, ⌈W/columns⌉."""
    # Of positive numbers: exported to ONNX, -(-a // b) would round towards zero.
    return (height + regions[0] - 1) // regions[0], (width + regions[1] - 1) // regions[1]


def divides(height: int, width: int, regions: Sequence[int], size: Sequence[int]) -> bool:
    """Whether the grid is known to cover the map exactly."""
    return known((height == regions[0] * size[0], width == regions[1] * size[1]))


def settled(height: int, width: int, regions: Sequence[int], size: Sequence[int]) -> bool:
    """Whether it is known if the grid covers the map exactly. Of the free sizes of a graph it is not, unless they always or never do."""
    return divides(height, width, regions, size) or known((height != regions[0] * size[0],)) or known((width != regions[1] * size[1],))


def pad_to_grid(x: Tensor, regions: Sequence[int], size: Sequence[int]) -> Tensor:
    """(B, H, W, C) → (B, rows·h, columns·w, C), zeros at the bottom and on the right."""
    height, width = x.shape[1:3]
    if divides(height, width, regions, size):
        return x
    return F.pad(x, (0, 0, 0, regions[1] * size[1] - width, 0, regions[0] * size[0] - height))


def cut(x: Tensor, regions: Sequence[int], size: Sequence[int], heads: int = 1) -> Tensor:
    """(B, rows·h, columns·w, heads·d) → (B, heads, rows·columns, h·w, d)."""
    (rows, columns), (h, w) = regions, size
    x = x.reshape(x.shape[0], rows, h, columns, w, heads, x.shape[-1] // heads)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(x.shape[0], heads, rows * columns, h * w, x.shape[-1])


def paste(x: Tensor, regions: Sequence[int], size: Sequence[int]) -> Tensor:
    """(B, heads, rows·columns, h·w, d) → (B, rows·h, columns·w, heads·d): the inverse of `cut`."""
    (rows, columns), (h, w) = regions, size
    b, heads, _, _, d = x.shape
    x = x.reshape(b, heads, rows, columns, h, w, d).permute(0, 2, 4, 3, 5, 1, 6)
    return x.reshape(b, rows * h, columns * w, heads * d)


def positions(height: int, width: int, regions: Sequence[int], size: Sequence[int], device: torch.device) -> Tensor:
    """Where every position of the regions lies on the flattened map: (rows·columns, h·w), −1 off the map."""
    (rows, columns), (h, w) = regions, size
    row = torch.arange(rows, device=device)[:, None, None, None] * h + torch.arange(h, device=device)[:, None]
    column = torch.arange(columns, device=device)[:, None, None] * w + torch.arange(w, device=device)
    index = (row * width + column).masked_fill((row >= height) | (column >= width), -1)
    return index.reshape(rows * columns, h * w)


def places(positions: Tensor, count: int) -> Tensor:
    """The inverse of `positions` of a map of `count`: where each of them is in the flattened regions, (count,)."""
    # The smallest, of which there is one each: an inverse of one operator in ONNX, where divisions take a dozen.
    return positions.masked_fill(positions < 0, count).flatten().topk(count, largest=False).indices


def regions_at(x: Tensor, positions: Tensor) -> Tensor:
    """(B, H, W, C) → (B, rows·columns, h·w, C) by index; what is off the map repeats its first position."""
    return x.flatten(1, 2).index_select(1, positions.clamp(min=0).flatten()).unflatten(1, positions.shape)


def check_routes(operator: str, routes: Tensor, regions: int) -> None:
    """Of the values on the CPU only: elsewhere they cannot be read without waiting."""
    if routes.device.type != "cpu" or not routes.numel():
        return
    ordered = routes.sort(-1).values
    for route in (ordered[..., 0].min().item(), ordered[..., -1].max().item()):
        if not 0 <= route < regions:
            raise ValueError(f"{operator}: routes must be 0 to {regions - 1} (the regions), got {route}")
    if (twice := ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{operator}: routes must have no region twice for the same region, got {ordered[..., 1:][twice][0].item()} again")
