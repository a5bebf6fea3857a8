"""Routing attention over the whole map, in which a query sees only the regions that its own is routed to.

Where keys or regions are few, masking the unrouted ones is cheaper than moving the routed ones.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .._regions import region_size

Grid = tuple[int, int]


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: Grid, num_heads: int, kv_size: Grid, scale: float, weights: None = None
) -> Tensor:
    """See `zoo.kernels.routing_attention`; without weights."""
    (b, height, width, _), (kv_height, kv_width), (rows, columns) = q.shape, k.shape[1:3], regions
    h, w = region_size(height, width, regions)
    routed = torch.zeros(b, rows * columns, rows * columns, dtype=torch.bool, device=q.device).scatter_(2, routes, True)
    mask = routed.reshape(b, rows, 1, columns, 1, rows, 1, columns, 1).expand(-1, -1, h, -1, w, -1, kv_size[0], -1, kv_size[1])
    mask = mask.reshape(b, rows * h, columns * w, rows * kv_size[0], columns * kv_size[1])[:, :height, :width, :kv_height, :kv_width]
    mask = mask.reshape(b, 1, height * width, kv_height * kv_width)
    q, k, v = (x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width))
