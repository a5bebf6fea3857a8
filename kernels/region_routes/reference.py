import torch
import torch.nn.functional as F
from torch import Tensor

from .._regions import cut, divides, inside, pad_to_grid, region_size


def region_means(x: Tensor, regions: tuple[int, int], size: tuple[int, int]) -> Tensor:
    height, width = x.shape[1:3]
    if divides(height, width, regions, size):
        return F.avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).flatten(1, 2)
    total = cut(pad_to_grid(x, regions, size), regions, size)[:, 0].sum(2)
    return total / inside(height, width, regions, size, x.device).sum(1, keepdim=True).clamp(min=1).to(x.dtype)


def affinity(q: Tensor, k: Tensor, empty: Tensor | None) -> Tensor:
    scores = q @ k.transpose(1, 2)
    return scores if empty is None else scores.masked_fill(empty, -torch.inf)


def empty_regions(height: int, width: int, regions: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor | None:
    if divides(height, width, regions, size):
        return None
    return ~inside(height, width, regions, size, device).any(1)


def region_routes(q: Tensor, k: Tensor, regions: tuple[int, int], topk: int) -> tuple[Tensor, Tensor]:
    q_size, k_size = (region_size(*x.shape[1:3], regions) for x in (q, k))
    scores = affinity(
        region_means(q, regions, q_size),
        region_means(k, regions, k_size),
        empty_regions(*k.shape[1:3], regions, k_size, k.device),
    )
    scores, routes = scores.topk(topk, dim=-1)
    return routes, scores
