"""Attention of queries to keys as layers share it: (B, …, positions, d), with one or more dimensions of heads."""
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels._backends import in_forward_mode
from zoo.kernels._exporting import is_exporting


def attention(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √d), 0 where `mask` is false."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if mask is None else torch.where(mask, scores, -torch.inf)).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / √d) V; `mask`, which has no batch, leaves every query a key."""
    if is_exporting() or in_forward_mode():  # a third of what exporters make of torch's function, which carries no tangents
        return attention(q, k, mask) @ v
    heads = q.shape[1:-2]
    if mask is not None:
        mask = mask.expand(*heads, *mask.shape[-2:]).flatten(0, -3)
    q, k, v = (y.flatten(1, -3) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).unflatten(1, heads)
