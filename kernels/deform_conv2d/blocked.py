"""Deformable convolution some images, or some rows of one image, at a time, as an operator with its own gradient.

The samples of a block are columns of a matrix product. They are never held for more than one block, and taken again in the
backward pass.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import grid_of, positions

SAMPLES_AT_ONCE = 1 << 22  # elements: 16 MiB of float32


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
    images = max(1, SAMPLES_AT_ONCE // (per_row * max(1, height)))
    threads = torch.get_num_threads()
    if images > threads:
        images -= images % threads
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


def _per_group(weight: Tensor, shape: _Shape, images: int) -> Tensor:
    """(n·groups, Co/groups, C/groups·K), n times the same."""
    weight = weight.reshape(1, shape.groups, weight.shape[0] // shape.groups, -1)
    return weight.expand(images, -1, -1, -1).reshape(images * shape.groups, *weight.shape[2:])


@torch.library.custom_op("zoo::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`. Any floating dtypes, at least float32 inside; the dtype of x comes back."""
    shape = _shape(x, offset, weight, stride, padding, dilation)
    inner = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape[0], weight.shape[0], *shape.out_size)
    with torch.autocast(x.device.type, enabled=False):
        for images, row_blocks in _blocks(x.shape[0], shape):
            maps = _padded(x[images], shape, inner)
            parts, kernels = _parts(len(maps), shape), _per_group(weight.to(inner), shape, len(maps))
            for rows in row_blocks:
                block = out[images, :, rows]
                grid = _grid(offset[images, :, rows].to(inner), shape, rows.start, parts)
                columns = _masked(_sample(_maps(maps, shape, parts), grid), None if mask is None else mask[images, :, rows].to(inner), shape)
                columns = columns.view(len(kernels), kernels.shape[2], -1)
                block.copy_(torch.bmm(kernels, columns).view(block.shape))
        if bias is not None:
            out += bias[:, None, None]
    return out


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])


@torch.library.custom_op("zoo::deform_conv2d_backward", mutates_args=())
def deform_conv2d_backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, weight and mask (of no elements where there is no mask)."""
    shape = _shape(x, offset, weight, stride, padding, dilation)
    inner = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_offset = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, offset))
    grad_weight = weight.new_zeros(shape.groups, weight.shape[0] // shape.groups, weight[0].numel(), dtype=inner)
    grad_mask = x.new_empty(0) if mask is None else torch.empty_like(mask, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        for images, row_blocks in _blocks(x.shape[0], shape):
            maps = _padded(x[images], shape, inner)
            parts, kernels = _parts(len(maps), shape), _per_group(weight.to(inner), shape, len(maps))
            grad_maps = None
            for rows in row_blocks:
                above = grad[images, :, rows].to(inner).reshape(*kernels.shape[:2], -1)
                grid = _grid(offset[images, :, rows].to(inner), shape, rows.start, parts)
                factors = None if mask is None else mask[images, :, rows].to(inner)
                samples = _sample(_maps(maps, shape, parts), grid)
                columns = _masked(samples, factors, shape).view(*kernels.shape[::2], -1)
                grad_weight += torch.bmm(above, columns.transpose(1, 2)).view(-1, *grad_weight.shape).sum(0)
                grad_samples = torch.bmm(kernels.transpose(1, 2), above).view(samples.shape)
                if mask is not None:
                    dots = (grad_samples * samples).view(len(maps), shape.offset_groups, -1, shape.taps, *factors.shape[2:]).sum(2)
                    grad_mask[images, :, rows] = dots.flatten(1, 2).to(mask.dtype)
                    grad_samples = _masked(grad_samples, factors, shape).view(samples.shape)
                grads = torch.ops.aten.grid_sampler_2d_backward(
                    grad_samples, _maps(maps, shape, parts), grid, 0, 0, False, [True, True])  # bilinear, zeros outside
                grad_maps = grads[0] if grad_maps is None else grad_maps.add_(grads[0])
                per_part = grads[1].view(len(maps), shape.offset_groups, parts, shape.taps, -1, shape.out_size[1], 2)
                per_position = per_part.sum(2) / per_part.new_tensor([shape.padded[1] / 2, shape.padded[0] / 2])
                per_position = per_position.flip(-1).permute(0, 1, 2, 5, 3, 4)  # (n, g, K, 2, rows, Wo)
                grad_offset[images, :, rows] = per_position.flatten(1, 3).to(offset.dtype)
            if grad_maps is None:
                grad_x[images] = 0
            else:
                grad_x[images] = grad_maps.view(maps.shape)[:, :, : shape.size[0], : shape.size[1]]
    return grad_x, grad_offset, grad_weight.view(weight.shape).to(weight.dtype), grad_mask


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
