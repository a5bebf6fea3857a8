import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting
from .._regions import cut, divides, pad_to_grid, positions, region_size, regions_at

Grid = tuple[int, int]


def region_means(x: Tensor, regions: Grid, size: Grid) -> Tensor:
    height, width = x.shape[1:3]
    if not is_exporting() and divides(height, width, regions, size):
        return F.avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).flatten(1, 2)
    own = positions(height, width, regions, size, x.device)
    on_map = (own >= 0).to(x.dtype)
    if is_exporting():  # by index: a graph for every size, whether the grid divides it or not
        total = (regions_at(x, own) * on_map[..., None]).sum(2)
    else:
        total = cut(pad_to_grid(x, regions, size), regions, size).squeeze(1).sum(2)
    return total / on_map.sum(1, keepdim=True).clamp(min=1)


def region_routes(q_means: Tensor, k_means: Tensor, k_map: Grid, regions: Grid, topk: int) -> tuple[Tensor, Tensor]:
    affinity = q_means @ k_means.transpose(1, 2)
    size = region_size(*k_map, regions)
    if is_exporting() or not divides(*k_map, regions, size):
        first = positions(*k_map, regions, size, k_means.device)[:, 0]  # off the map, where the whole region is
        affinity = affinity.masked_fill(first < 0, -torch.inf)
    scores, routes = affinity.topk(topk, dim=-1)
    return routes, scores
