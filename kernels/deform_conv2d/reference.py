"""Deformable convolution by its definition: where it samples, bilinear interpolation, and a product with the kernel.

In the shapes, g are the offset groups and K the taps of the kernel.
"""
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = Sequence[int]  # of rows and of columns


def positions(offset: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Row and column of every sample, each (B, g, K, Ho, Wo), of offsets (B, g·K·2, Ho, Wo) that begin at output row `first_row`."""
    height, width = offset.shape[2:]
    offset = offset.unflatten(1, (-1, kernel[0] * kernel[1], 2))
    dd: dict[str, Any] = dict(dtype=offset.dtype, device=offset.device)
    taps_y, taps_x = (torch.arange(k, **dd) * d - p for k, d, p in zip(kernel, dilation, padding, strict=True))
    rows, columns = torch.arange(first_row, first_row + height, **dd) * stride[0], torch.arange(width, **dd) * stride[1]
    y = (taps_y[:, None, None] + rows[:, None]).repeat_interleave(kernel[1], 0)  # (K, Ho, 1)
    x = (taps_x[:, None, None] + columns).repeat(kernel[0], 1, 1)  # (K, 1, Wo)
    return offset[:, :, :, 0] + y, offset[:, :, :, 1] + x


def around(place: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of places on an axis, the pixel before and the one after: index, and weight, which is 0 off the map."""
    place = place.clamp(-2, length + 1)
    before = place.floor()
    share = place - before
    for at, weight in ((before, 1 - share), (before + 1, share)):
        # Clamped as integers, an undefined place is some place on the map.
        yield at.long().clamp(0, length - 1), weight * ((at >= 0) & (at < length))


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`. Computed in at least float32, whatever floating dtypes the arguments have."""
    inner, dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    x, offset, weight = (t.to(inner) for t in (x, offset, weight))
    bias, mask = (None if t is None else t.to(inner) for t in (bias, mask))
    (b, c, height, width), (out_channels, group_width, *kernel) = x.shape, weight.shape
    y, z = positions(offset, kernel, stride, padding, dilation)
    (offset_groups, taps), out_size = y.shape[1:3], offset.shape[2:]
    maps = x.reshape(b, offset_groups, c // offset_groups, height * width)
    samples = torch.zeros((), dtype=inner, device=x.device)
    for row, row_weight in around(y, height):
        for column, column_weight in around(z, width):
            index = (row * width + column).flatten(2)[:, :, None].expand(-1, -1, maps.shape[2], -1)
            samples = samples + maps.gather(3, index) * (row_weight * column_weight).flatten(2)[:, :, None]  # (B, g, C/g, K·Ho·Wo)
    if mask is not None:
        samples = samples * mask.reshape(b, offset_groups, 1, taps * out_size[0] * out_size[1])
    columns = samples.reshape(b, c // group_width, group_width * taps, out_size[0] * out_size[1])
    out = (weight.reshape(c // group_width, -1, group_width * taps) @ columns).reshape(b, out_channels, *out_size)
    return (out if bias is None else out + bias[:, None, None]).to(dtype)


def flops(x: tuple, offset: tuple, weight: tuple, *_: object) -> int:
    """Those of the convolution, without the interpolation, from shapes in the place of tensors."""
    return 2 * math.prod(weight) * offset[0] * offset[2] * offset[3]
