"""Region means by average pooling, or by sums where the grid does not divide the map; routes, masked only where regions lie off it."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import known
from .._regions import cut, divides, pad_to_grid, region_size, settled
from .reference import Grid


def region_means(x: Tensor, regions: Grid) -> Tensor:
    """See `zoo.kernels.region_means`."""
    height, width = x.shape[1:3]
    h, w = size = region_size(height, width, regions)
    if divides(height, width, regions, size):
        return F.avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).flatten(1, 2)
    dd: dict[str, Any] = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    if not settled(height, width, regions, size):
        of_rows, of_columns = (_shares(n, count, **dd) for n, count in zip((height, width), regions, strict=True))
        means = of_columns @ (of_rows @ x.to(dd["dtype"]).flatten(2)).unflatten(2, (width, -1))  # (B, rows, columns, C)
        return means.flatten(1, 2).to(x.dtype)
    rows = (height - h * torch.arange(regions[0], **dd)).clamp(1, h)  # on the map
    columns = (width - w * torch.arange(regions[1], **dd)).clamp(1, w)
    sums = cut(pad_to_grid(x, regions, size), regions, size).squeeze(1).sum(2, dtype=dd["dtype"])
    return (sums / (rows[:, None] * columns).flatten()[:, None]).to(x.dtype)


def _shares(length: int, regions: int, **dd: Any) -> Tensor:
    """What the positions of a side contribute to the means of its regions, (regions, length): one graph for all lengths."""
    size = (length + regions - 1) // regions
    member = (torch.arange(length, device=dd["device"]) // size == torch.arange(regions, device=dd["device"])[:, None]).to(dd["dtype"])
    return member / member.sum(1, keepdim=True).clamp(min=1)


def region_routes(q_means: Tensor, k_means: Tensor, k_map: Grid, regions: Grid, topk: int) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.region_routes`; of the means."""
    affinity = q_means @ k_means.transpose(1, 2)
    # Rows and columns of regions that begin on the map.
    rows, columns = ((length + n - 1) // n for length, n in zip(k_map, region_size(*k_map, regions=regions), strict=True))
    if not known((rows == regions[0], columns == regions[1])):
        row, column = (torch.arange(n, device=affinity.device) for n in regions)
        off_map = (row >= rows)[:, None] | (column >= columns)
        affinity = affinity.masked_fill(off_map.flatten(), -torch.inf)
    scores, routes = affinity.topk(topk, dim=-1)
    return routes, scores
