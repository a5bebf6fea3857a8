"""Deformable convolution around one `grid_sample` of all samples, for one graph that holds at every size.

Gradients at whole positions are left to rounding.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Pair, positions


def grid_of(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Positions (N, K, Ho, Wo) on a map → the coordinates of `grid_sample` without aligned corners, (N, K·Ho, Wo, 2)."""
    return torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).flatten(1, 2)


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`; computed in the dtypes of the arguments."""
    (b, c, height, width), (out_channels, group_width, *kernel) = x.shape, weight.shape
    taps, out_size = kernel[0] * kernel[1], offset.shape[2:]
    offset_groups = offset.shape[1] // (2 * taps)
    y, z = (p.flatten(0, 1) for p in positions(offset, kernel, stride, padding, dilation))
    grid = grid_of(y, z, height, width)
    maps = x.reshape(b * offset_groups, c // offset_groups, height, width)
    sampled = F.grid_sample(maps, grid, align_corners=False)  # (B·g, C/g, K·Ho, Wo)
    if mask is not None:
        sampled = sampled * mask.reshape(b * offset_groups, 1, taps * out_size[0], out_size[1])
    columns = sampled.reshape(b, c // group_width, group_width * taps, out_size[0] * out_size[1])
    out = weight.reshape(c // group_width, -1, group_width * taps) @ columns
    out = out.reshape(b, out_channels, *out_size)
    return out if bias is None else out + bias[:, None, None]
