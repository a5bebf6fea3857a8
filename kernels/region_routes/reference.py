"""Region means and routes by their definition, and what exported graphs hold."""
import torch
from torch import Tensor

from .._regions import positions, region_size, regions_at

Grid = tuple[int, int]


def region_means(x: Tensor, regions: Grid) -> Tensor:
    """See `zoo.kernels.region_means`. By index: a graph for every size, whether the grid divides it or not."""
    own = positions(*x.shape[1:3], regions=regions, size=region_size(*x.shape[1:3], regions=regions), device=x.device)
    on_map = (own >= 0).to(torch.promote_types(x.dtype, torch.float32))
    return ((regions_at(x, own) * on_map[..., None]).sum(2) / on_map.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


def region_routes(q_means: Tensor, k_means: Tensor, k_map: Grid, regions: Grid, topk: int) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.region_routes`; of the means."""
    own = positions(*k_map, regions=regions, size=region_size(*k_map, regions=regions), device=k_means.device)
    first = own[:, 0]  # off the map, where the whole region is
    scores, routes = (q_means @ k_means.transpose(1, 2)).masked_fill(first < 0, -torch.inf).topk(topk, dim=-1)
    return routes, scores
