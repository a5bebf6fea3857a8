"""Routing attention in PyTorch: the definition, and two formulations of it that run faster and in less memory.

In the shapes, b is the batch, m the heads, r the regions, n the routes of a region, t and s the positions of a query and of
a key region, d and e the widths of a head's keys and values.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting
from .._regions import cut, divides, pad_to_grid, paste, places, positions, region_size, regions_at
from .blocked import routed_attention

Grid = tuple[int, int]
DENSE_KEYS = 256  # up to this many keys, masking the unrouted ones is cheaper than moving the routed ones
DENSE_SHARE, DENSE_REGION = 4, 16  # so it is where a quarter of all regions is routed, of at most 16 positions each


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """Picks the formulation that suits the shapes."""
    if is_exporting():
        return gathered(q, k, v, routes, regions, num_heads, kv_size, scale, weights)
    few_keys = k.shape[1] * k.shape[2] <= DENSE_KEYS
    most_routed = regions[0] * regions[1] <= DENSE_SHARE * routes.shape[-1] and kv_size[0] * kv_size[1] <= DENSE_REGION
    if weights is None and (few_keys or most_routed):
        return dense(q, k, v, routes, regions, num_heads, kv_size, scale)
    return blocked(q, k, v, routes, regions, num_heads, kv_size, scale, weights)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """The definition: every query region beside copies of the key and value regions that it is routed to.

    Regions are cut out and pasted by index: a graph traced at one size then holds at every size.
    """
    height, width = q.shape[1:3]
    own = positions(height, width, regions, region_size(height, width, regions), q.device)  # (r, t)
    attention = gathered_attention(q, k, routes, regions, num_heads, kv_size, scale, weights)
    out = (attention.to(v.dtype) @ _gather(v, routes, regions, num_heads, kv_size, weights)).transpose(2, 3).flatten(1, 2).flatten(2)
    return out.index_select(1, places(own, height * width)).reshape(*q.shape[:3], v.shape[-1])


def gathered_attention(
    q: Tensor, k: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """The attention itself, (b, r, m, t, n·s); 0 to keys outside the map."""
    own = positions(*q.shape[1:3], regions, region_size(*q.shape[1:3], regions), q.device)  # (r, t)
    q_r = regions_at(q, own).unflatten(-1, (num_heads, -1)).transpose(2, 3)  # (b, r, m, t, d)
    k_r = _gather(k, routes, regions, num_heads, kv_size, weights)
    scores = ((q_r * scale) @ k_r.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    on_map = positions(*k.shape[1:3], regions, kv_size, k.device) >= 0  # (r, s)
    on_map = on_map.index_select(0, routes.flatten()).reshape(*routes.shape[:2], 1, 1, -1)
    return torch.where(on_map, scores, torch.finfo(scores.dtype).min).softmax(-1) * on_map


def _gather(x: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, weights: Tensor | None) -> Tensor:
    """The routed regions of keys or values beside every query region, (b, r, m, n·s, d)."""
    own = positions(*x.shape[1:3], regions, kv_size, x.device)  # (r, s)
    out = regions_at(x, own).flatten(0, 1).index_select(0, _rows(routes, 1).flatten())
    out = out.reshape(*routes.shape[:2], -1, x.shape[-1])  # (b, r, n·s, c)
    if weights is not None:
        out = out * weights.repeat_interleave(kv_size[0] * kv_size[1], dim=2)[..., None]
    return out.unflatten(-1, (num_heads, -1)).transpose(2, 3)


def dense(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float) -> Tensor:
    """Attention over the whole map in which a query sees only the regions that its own is routed to."""
    (b, height, width, _), (kv_height, kv_width), (rows, columns) = q.shape, k.shape[1:3], regions
    h, w = region_size(height, width, regions)
    routed = torch.zeros(b, rows * columns, rows * columns, dtype=torch.bool, device=q.device).scatter_(2, routes, True)
    mask = routed.reshape(b, rows, 1, columns, 1, rows, 1, columns, 1).expand(-1, -1, h, -1, w, -1, kv_size[0], -1, kv_size[1])
    mask = mask.reshape(b, rows * h, columns * w, rows * kv_size[0], columns * kv_size[1])[:, :height, :width, :kv_height, :kv_width]
    mask = mask.reshape(b, 1, height * width, kv_height * kv_width)
    q, k, v = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def blocked(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: Tensor | None
) -> Tensor:
    """Some query regions at a time, everything recomputed in the backward pass: neither gathered keys nor scores are kept."""
    height, width = q.shape[1:3]
    size = region_size(height, width, regions)
    q_r = cut(pad_to_grid(q, regions, size), regions, size, num_heads)
    k_r, v_r = (cut(pad_to_grid(x, regions, kv_size), regions, kv_size, num_heads) for x in (k, v))
    on_map = None if divides(*k.shape[1:3], regions, kv_size) else positions(*k.shape[1:3], regions, kv_size, k.device) >= 0
    if weights is not None:
        weights = weights[:, None].expand(-1, num_heads, -1, -1).flatten(0, 2)
    out, _ = routed_attention(
        *(x.flatten(0, 2) for x in (q_r, k_r, v_r)), _rows(routes, num_heads).flatten(0, 2), scale, on_map, weights
    )
    return paste(out.reshape(*q_r.shape[:-1], v_r.shape[-1]), regions, size)[:, :height, :width]


def _rows(routes: Tensor, num_heads: int) -> Tensor:
    """The routed regions as rows of the flattened (b, m, r): (b, m, r, n)."""
    b, r, _ = routes.shape
    first = r * torch.arange(b * num_heads, device=routes.device).reshape(b, num_heads, 1, 1)
    return first + routes[:, None]
