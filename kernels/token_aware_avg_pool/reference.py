"""Token-aware average pooling by its definition: every pool a sum of shifted maps."""
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor


def token_aware_avg_pool(x: Tensor, weights: Tensor) -> Tensor:
    """See `zoo.kernels.token_aware_avg_pool`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    x_inner, weights = x.to(inner), weights.to(inner)
    first, *others = (weight * avg_pool(x_inner, dilation) for dilation, weight in enumerate(weights.split(1, -1)))
    return sum(others, start=first).to(x.dtype)


def avg_pool(x: Tensor, dilation: int) -> Tensor:
    """Mean over 3×3 positions `dilation` apart, those outside the map being 0; the map itself at dilation 0."""
    if dilation == 0:
        return x
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, dilation, dilation, dilation, dilation))
    shifts = 0, dilation, 2 * dilation
    rows = reduce(add, (padded.narrow(1, shift, height) for shift in shifts))
    return reduce(add, (rows.narrow(2, shift, width) for shift in shifts)) / 9


def flops(*_: object) -> int:
    """Of the products of matrices, of which averages have none."""
    return 0
