"""Pyramid sparse attention with scores of every query and all levels: the definition, and what exported graphs hold."""
import torch
from torch import Tensor

from ._pyramid import counts, kept


def pyramid_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> Tensor:
    """See `zoo.kernels.pyramid_sparse_attention`; k and v are `_pyramid.pyramid`s of `tokens` keys and values."""
    return attention(q, k, levels, tokens, query_block, key_block, scale).to(v.dtype) @ v


def attention(q: Tensor, k: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float) -> Tensor:
    """Of every query over the rows of the pyramid, (B, heads, N, rows)."""
    of_rows = counts(tokens, levels.shape[3], key_block, q.device)
    chosen = kept(levels, key_block) & (of_rows > 0)  # of every block of queries
    blocks = torch.arange(q.shape[2], device=q.device) // query_block
    chosen = chosen.index_select(2, blocks)
    scores = ((q * scale) @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores + of_rows.clamp(min=1).to(scores.dtype).log()
    return torch.where(chosen, scores, torch.finfo(scores.dtype).min).softmax(-1) * chosen


def flops(q: tuple, k: tuple, v: tuple, *_: object) -> int:
    """Of the products, from shapes in the place of tensors: with all levels of all blocks, as what is left out is no shape."""
    b, heads, queries, d = q
    return 2 * b * heads * queries * k[2] * (d + v[3])
