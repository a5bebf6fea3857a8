"""The cross entropy of softmax attention and linear attention by its definition, which holds both at once."""
import math

import torch
from torch import Tensor

EPS = 1e-12  # of the sum of a row, as in `zoo.layers.HedgehogAttention`


def attention_cross_entropy(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float) -> Tensor:
    """See `zoo.kernels.attention_cross_entropy`."""
    inner = torch.promote_types(torch.promote_types(q.dtype, of_q.dtype), torch.float32)
    q, k, of_q, of_k = (x.to(inner) for x in (q, k, of_q, of_k))
    weights = of_q @ of_k.mT
    logarithms = weights.log() - (weights.sum(-1, keepdim=True) + EPS).log()
    return -((scale * q @ k.mT).softmax(-1) * logarithms).sum(-1).mean()


def flops(q: tuple, k: tuple, of_q: tuple, of_k: tuple, *_: object) -> int:
    """Of the products, from shapes in the place of tensors."""
    return 2 * k[2] * (math.prod(q) + math.prod(of_q))
