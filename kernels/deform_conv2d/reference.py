"""Deformable convolution in plain PyTorch: where it samples, and the definition spelled out around `grid_sample`.

In the shapes, g are the offset groups and K the taps of the kernel.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def positions(offset: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Row and column of every sample, each (B, g, K, Ho, Wo), of offsets (B, g·K·2, Ho, Wo) that begin at output row `first_row`."""
    height, width = offset.shape[2:]
    offset = offset.unflatten(1, (-1, kernel[0] * kernel[1], 2))
    along = dict(dtype=offset.dtype, device=offset.device)
    taps_y, taps_x = (torch.arange(k, **along) * d - p for k, d, p in zip(kernel, dilation, padding, strict=True))
    rows, columns = torch.arange(first_row, first_row + height, **along) * stride[0], torch.arange(width, **along) * stride[1]
    y = (taps_y[:, None, None] + rows[:, None]).repeat_interleave(kernel[1], 0)  # (K, Ho, 1)
    x = (taps_x[:, None, None] + columns).repeat(kernel[0], 1, 1)  # (K, 1, Wo)
    return offset[:, :, :, 0] + y, offset[:, :, :, 1] + x


def grid_of(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Positions (N, K, Ho, Wo) on a map → the coordinates of `grid_sample` without aligned corners, (N, K·Ho, Wo, 2)."""
    return torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).flatten(1, 2)


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The definition, for one graph that holds at every size. Gradients at whole positions are left to rounding."""
    (b, c, height, width), (out_channels, group_width, *kernel) = x.shape, weight.shape
    taps, out_size = kernel[0] * kernel[1], offset.shape[2:]
    offset_groups = offset.shape[1] // (2 * taps)
    grid = grid_of(*(p.flatten(0, 1) for p in positions(offset, kernel, stride, padding, dilation)), height, width)
    maps = x.reshape(b * offset_groups, c // offset_groups, height, width)
    sampled = F.grid_sample(maps, grid, align_corners=False)  # (B·g, C/g, K·Ho, Wo)
    if mask is not None:
        sampled = sampled * mask.reshape(b * offset_groups, 1, taps * out_size[0], out_size[1])
    columns = sampled.reshape(b, c // group_width, group_width * taps, out_size[0] * out_size[1])
    out = weight.reshape(c // group_width, -1, group_width * taps) @ columns
    out = out.reshape(b, out_channels, *out_size)
    return out if bias is None else out + bias[:, None, None]
