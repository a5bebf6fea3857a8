"""Per-sample depthwise convolution by its definition: a product of each kernel with the neighbourhoods of all positions."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def inhibited(kernels: Tensor, theta: Tensor) -> Tensor:
    """kernels - sigmoid(theta) · their mean, for (B, C, k, k) and (C,)."""
    return kernels - theta.sigmoid()[:, None, None] * kernels.mean((2, 3), keepdim=True)


def depthwise_dynamic_conv2d(x: Tensor, kernels: Tensor) -> Tensor:
    """See `zoo.kernels.depthwise_dynamic_conv2d`. A convolution by unit kernels lays the neighbourhoods side by side."""
    (b, c, h, w), (rows, columns) = x.shape, kernels.shape[2:]
    units = torch.eye(rows * columns, dtype=x.dtype, device=x.device).reshape(-1, 1, rows, columns)
    neighbours = F.conv2d(x.reshape(b * c, 1, h, w), units, padding=(rows // 2, columns // 2)).flatten(2)
    return (kernels.reshape(b * c, 1, rows * columns) @ neighbours).squeeze(1).reshape(b, c, h, w)  # a length of 1 would make guards of h


def flops(x: tuple, kernels: tuple) -> int:
    """Of the products, from shapes in the place of tensors."""
    return 2 * math.prod(x) * math.prod(kernels[2:])
