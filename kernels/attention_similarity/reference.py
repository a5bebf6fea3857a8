"""The similarity of attention rows by its definition, which holds the attention of all queries at once."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_similarity(q: Tensor, k: Tensor, threshold: float, scale: float) -> Tensor:
    """See `zoo.kernels.attention_similarity`."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    return row_similarity((scale * q @ k.mT).softmax(-1).mean(1), threshold)


def row_similarity(attention: Tensor, threshold: float) -> Tensor:
    """The same of the attention (B, N, M) itself, already averaged over heads."""
    mean = attention.mean(1, keepdim=True)
    rows, mean = (a * (a > threshold / a.shape[-1]) for a in (attention, mean))
    return F.cosine_similarity(rows, mean, dim=-1).mean()


def flops(q: tuple, k: tuple, *_: object) -> int:
    """Of the products, from shapes in the place of tensors."""
    return 2 * math.prod(q) * k[2]
