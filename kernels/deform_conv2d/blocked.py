"""Deformable convolution some images, or some rows of one image, at a time, as an operator with its own gradient.

The samples of a block are columns of a matrix product. They are never held for more than one block, and taken again in the
backward pass.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import grid_of, positions

SAMPLES_AT_ONCE = 1 << 22  # elements: 16 MiB of float32
POSITIONS_AT_ONCE = 512  # output positions, enough for the matrix product; images of fewer are taken together


class _Shape(NamedTuple):
    """Everything that is the same for all blocks."""

    size: tuple[int, int]
    padded: tuple[int, int]
    kernel: tuple[int, int]
    out_size: tuple[int, int]
    channels: int
    groups: int
    offset_groups: int
    geometry: tuple[tuple[int, int], ...]  # stride, padding, dilation

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def _shape(x: Tensor, offset: Tensor, weight: Tensor, *geometry: list[int]) -> _Shape:
    kernel, size = tuple(weight.shape[2:]), tuple(x.shape[2:])
    offset_groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
    # Scaling coordinates by a power of two is exact, so that whole positions stay whole.
    padded = tuple(1 << (length - 1).bit_length() for length in size)
    groups = x.shape[1] // weight.shape[1]
    return _Shape(size, padded, kernel, tuple(offset.shape[2:]), x.shape[1], groups, offset_groups, tuple(map(tuple, geometry)))


def _blocks(batch: int, shape: _Shape) -> Iterator[tuple[slice, list[slice]]]:
    """Images of the batch, and the output rows to take of all of them at a time."""
    height, width = shape.out_size
    per_row = max(1, shape.channels * shape.taps * width)
    rows = max(1, SAMPLES_AT_ONCE // per_row)
    images = max(1, min(SAMPLES_AT_ONCE // (per_row * max(1, height)), POSITIONS_AT_ONCE // max(1, height * width)))
    for start in range(0, batch, images):
        yield slice(start, start + images), [slice(row, row + rows) for row in range(0, height, rows)]


def _padded(x: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    (height, width), (padded_height, padded_width) = shape.size, shape.padded
    return F.pad(x.to(dtype), (0, padded_width - width, 0, padded_height - height)).contiguous()


def _parts(images: int, shape: _Shape) -> int:
    """Parts to cut the channels into, because `grid_sample` has one thread for each map of the batch."""
    entries, channels = images * shape.offset_groups, shape.channels // shape.offset_groups
    return next(n for n in range(1, channels + 1) if n == channels or channels % n == 0 and entries * n >= torch.get_num_threads())


def _grid(offset: Tensor, shape: _Shape, first_row: int, parts: int) -> Tensor:
    """Coordinates on the padded maps: (n·g·parts, K·rows, Wo, 2)."""
    exact = []
    for position, length, padded in zip(positions(offset, shape.kernel, *shape.geometry, first_row), shape.size, shape.padded, strict=True):
        position = position.clamp_(-2, length + 1)
        # Scaled, what lies less than two steps of the arithmetic below a whole position would be rounded up to it.
        below = 1 - padded * torch.finfo(offset.dtype).eps
        exact.append(torch.minimum(position, position.floor().add_(below)))
    y, x = (p[:, :, None].expand(-1, -1, parts, -1, -1, -1).flatten(0, 2) for p in exact)
    return grid_of(y, x, *shape.padded)


def _grad_of_positions(grad_grid: Tensor, images: int, shape: _Shape, parts: int) -> Tensor:
    """Gradient of `_grid` → gradient of the offsets, (n, g·K·2, rows, Wo)."""
    grad = grad_grid.view(images, shape.offset_groups, parts, shape.taps, -1, shape.out_size[1], 2).sum(2)
    x, y = (g / (padded / 2) for g, padded in zip(grad.unbind(-1), reversed(shape.padded), strict=True))
    return torch.stack((y, x), 3).flatten(1, 3)


def _maps(maps: Tensor, shape: _Shape, parts: int) -> Tensor:
    return maps.reshape(maps.shape[0] * shape.offset_groups * parts, -1, *shape.padded)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, align_corners=False)


def _masked(samples: Tensor, mask: Tensor | None, shape: _Shape) -> Tensor:
    """Any shape of (n, C, K, rows, Wo), times (n, g·K, rows, Wo)."""
    if mask is None:
        return samples
    n, (rows, width) = mask.shape[0], mask.shape[2:]
    return samples.view(n, shape.offset_groups, -1, shape.taps, rows, width) * mask.view(n, shape.offset_groups, 1, shape.taps, rows, width)


def _side_by_side(x: Tensor, images: int, groups: int, positions: int) -> Tensor:
    """(n, groups·c, P) in any shape → (groups, c, n·P); of a single image a view."""
    return x.reshape(images, groups, -1, positions).permute(1, 2, 0, 3).reshape(groups, -1, images * positions)


def _apart(x: Tensor, images: int) -> Tensor:
    """(groups, c, n·P) → (n, groups, c, P)."""
    return x.unflatten(2, (images, -1)).permute(2, 0, 1, 3)


@torch.library.custom_op("zoo::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`. Any floating dtypes, at least float32 inside; the dtype of x comes back."""
    shape = _shape(x, offset, weight, stride, padding, dilation)
    inner = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape[0], weight.shape[0], *shape.out_size)
    kernels = weight.to(inner).reshape(shape.groups, weight.shape[0] // shape.groups, -1)
    added = None if bias is None else bias.to(inner).view(shape.groups, -1, 1)
    with torch.autocast(x.device.type, enabled=False):
        for images, row_blocks in _blocks(x.shape[0], shape):
            maps = _padded(x[images], shape, inner)
            n, parts = len(maps), _parts(len(maps), shape)
            for rows in row_blocks:
                block = out[images, :, rows]
                grid = _grid(offset[images, :, rows].to(inner), shape, rows.start, parts)
                factors = None if mask is None else mask[images, :, rows].to(inner)
                samples = _masked(_sample(_maps(maps, shape, parts), grid), factors, shape)
                columns = _side_by_side(samples, n, shape.groups, block[0, 0].numel())
                product = torch.bmm(kernels, columns) if bias is None else torch.baddbmm(added, kernels, columns)
                block.copy_(_apart(product, n).reshape(block.shape))
    return out


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])


@register_flop_formula(torch.ops.zoo.deform_conv2d)
def flops(x_shape: tuple, offset_shape: tuple, weight_shape: tuple, *_, out_shape: tuple, **__) -> int:
    """Those of the convolution, without the interpolation."""
    return 2 * math.prod(weight_shape) * out_shape[0] * out_shape[2] * out_shape[3]


@torch.library.custom_op("zoo::deform_conv2d_backward", mutates_args=())
def deform_conv2d_backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, weight and mask (of no elements where there is no mask)."""
    shape = _shape(x, offset, weight, stride, padding, dilation)
    inner = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_offset = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, offset))
    grad_mask = x.new_empty(0) if mask is None else torch.empty_like(mask, memory_format=torch.contiguous_format)
    kernels = weight.to(inner).reshape(shape.groups, weight.shape[0] // shape.groups, -1)
    grad_kernels = torch.zeros_like(kernels)
    with torch.autocast(x.device.type, enabled=False):
        for images, row_blocks in _blocks(x.shape[0], shape):
            maps = _padded(x[images], shape, inner)
            n, parts = len(maps), _parts(len(maps), shape)
            grad_maps = torch.zeros_like(maps)
            for rows in row_blocks:
                above = grad[images, :, rows].to(inner)
                factors = None if mask is None else mask[images, :, rows].to(inner)
                count = above[0, 0].numel()
                above = _side_by_side(above, n, shape.groups, count)
                grid = _grid(offset[images, :, rows].to(inner), shape, rows.start, parts)
                samples = _sample(_maps(maps, shape, parts), grid)
                columns = _side_by_side(_masked(samples, factors, shape), n, shape.groups, count)
                grad_kernels.baddbmm_(above, columns.transpose(1, 2))
                grad_samples = _apart(torch.bmm(kernels.transpose(1, 2), above), n).reshape(samples.shape)
                if mask is not None:
                    dots = (grad_samples * samples).view(n, shape.offset_groups, -1, shape.taps, *factors.shape[2:]).sum(2)
                    grad_mask[images, :, rows] = dots.flatten(1, 2)
                    grad_samples = _masked(grad_samples, factors, shape).view(samples.shape)
                grad_block, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                    grad_samples, _maps(maps, shape, parts), grid, 0, 0, False, [True, True])  # bilinear, zeros outside
                grad_maps += grad_block.view(maps.shape)
                grad_offset[images, :, rows] = _grad_of_positions(grad_grid, n, shape, parts)
            grad_x[images] = grad_maps[:, :, : shape.size[0], : shape.size[1]]
    grad_weight = grad_kernels.view(weight.shape).to(weight.dtype)
    return grad_x, grad_offset, grad_weight, grad_mask


@deform_conv2d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_offset, grad_weight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, offset, weight))
    grad_mask = x.new_empty(0) if mask is None else torch.empty_like(mask, memory_format=torch.contiguous_format)
    return grad_x, grad_offset, grad_weight, grad_mask


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, offset, weight, bias, mask, *ctx.geometry = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, offset, weight, mask)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, weight, mask = ctx.saved_tensors
    grad_x, grad_offset, grad_weight, grad_mask = deform_conv2d_backward(grad, x, offset, weight, mask, *ctx.geometry)
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return grad_x, grad_offset, grad_weight, grad_bias, None if mask is None else grad_mask, None, None, None


deform_conv2d.register_autograd(_backward, setup_context=_setup_context)
