"""Routing attention by plain gather: the definition, and what exported graphs hold.

In the shapes, b is the batch, m the heads, r the regions, n the routes of a region, t and s the positions of a query and of
a key region, d and e the widths of a head's keys and values.
"""
import math

import torch
from torch import Tensor

from .._regions import places, positions, region_size, regions_at

Grid = tuple[int, int]


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """See `zoo.kernels.routing_attention`: every query region beside copies of the key and value regions that it is routed to.

    Regions are cut out and pasted by index: a graph traced at one size then holds at every size.
    """
    height, width = q.shape[1:3]
    own = positions(height, width, regions, region_size(height, width, regions), q.device)  # (r, t)
    weights_of_keys = attention(q, k, routes, regions, num_heads, kv_size, scale, weights)
    out = (weights_of_keys.to(v.dtype) @ _gather(v, routes, regions, num_heads, kv_size, weights)).transpose(2, 3).flatten(1, 2).flatten(2)
    return out.index_select(1, places(own, height * width)).reshape(*q.shape[:3], v.shape[-1])


def attention(
    q: Tensor, k: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """The attention itself, (b, r, m, t, n·s); 0 to keys outside the map."""
    own = positions(*q.shape[1:3], regions=regions, size=region_size(*q.shape[1:3], regions=regions), device=q.device)  # (r, t)
    q_r = regions_at(q, own).unflatten(-1, (num_heads, -1)).transpose(2, 3)  # (b, r, m, t, d)
    k_r = _gather(k, routes, regions, num_heads, kv_size, weights)
    scores = ((q_r * scale) @ k_r.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    on_map = positions(*k.shape[1:3], regions=regions, size=kv_size, device=k.device) >= 0  # (r, s)
    on_map = on_map.index_select(0, routes.flatten()).reshape(*routes.shape[:2], 1, 1, -1)
    return torch.where(on_map, scores, torch.finfo(scores.dtype).min).softmax(-1) * on_map


def _gather(x: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, weights: Tensor | None) -> Tensor:
    """The routed regions of keys or values beside every query region, (b, r, m, n·s, d)."""
    own = positions(*x.shape[1:3], regions=regions, size=kv_size, device=x.device)  # (r, s)
    out = regions_at(x, own).flatten(0, 1).index_select(0, rows_of(routes, 1).flatten())
    out = out.reshape(*routes.shape[:2], -1, x.shape[-1])  # (b, r, n·s, c)
    if weights is not None:
        out = out * weights.repeat_interleave(kv_size[0] * kv_size[1], dim=2)[..., None]
    return out.unflatten(-1, (num_heads, -1)).transpose(2, 3)


def rows_of(routes: Tensor, num_heads: int) -> Tensor:
    """The routed regions as rows of the flattened (b, m, r): (b, m, r, n)."""
    b, r, _ = routes.shape
    first = r * torch.arange(b * num_heads, device=routes.device).reshape(b, num_heads, 1, 1)
    return first + routes[:, None]


def flops(q: tuple, k: tuple, v: tuple, routes: tuple, regions: Grid, num_heads: int, kv_size: Grid, *_: object) -> int:
    """Of the products, from shapes in the place of tensors: all positions of the regions count, those off the map too."""
    h, w = region_size(*q[1:3], regions=regions)
    return 2 * math.prod(routes) * h * w * kv_size[0] * kv_size[1] * (q[3] + v[3])
