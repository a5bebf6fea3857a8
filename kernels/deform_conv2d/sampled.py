"""Deformable convolution by `grid_sample`, for any groups: the samples of a block are columns of a matrix product."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ._blocked import register
from ._blocks import Shape, blocks
from .grid_sampled import grid_of
from .reference import positions

POSITIONS_AT_ONCE = 512  # output positions, enough for the matrix product; images of fewer are taken together


def _padded(x: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    (height, width), (padded_height, padded_width) = shape.size, shape.padded
    return F.pad(x.to(dtype), (0, padded_width - width, 0, padded_height - height)).contiguous()


def _parts(images: int, shape: Shape) -> int:
    """Parts to cut the channels into, because `grid_sample` has one thread for each map of the batch."""
    entries, channels = images * shape.offset_groups, shape.channels // shape.offset_groups
    return next(n for n in range(1, channels + 1) if n == channels or channels % n == 0 and entries * n >= torch.get_num_threads())


def _grid(offset: Tensor, shape: Shape, first_row: int, parts: int) -> Tensor:
    """Coordinates on the padded maps: (n·g·parts, K·rows, Wo, 2)."""
    exact = []
    for position, length, padded in zip(positions(offset, shape.kernel, *shape.geometry, first_row), shape.size, shape.padded, strict=True):
        position = position.clamp_(-2, length + 1)
        # Scaled, what lies less than two steps of the arithmetic below a whole position would be rounded up to it.
        below = 1 - padded * torch.finfo(offset.dtype).eps
        exact.append(torch.minimum(position, position.floor().add_(below)))
    y, x = (p[:, :, None].expand(-1, -1, parts, -1, -1, -1).flatten(0, 2) for p in exact)
    return grid_of(y, x, *shape.padded)


def _grad_of_positions(grad_grid: Tensor, images: int, shape: Shape, parts: int) -> Tensor:
    """Gradient of `_grid` → gradient of the offsets, (n, g·K·2, rows, Wo)."""
    grad = grad_grid.view(images, shape.offset_groups, parts, shape.taps, -1, shape.out_size[1], 2).sum(2)
    x, y = (g / (padded / 2) for g, padded in zip(grad.unbind(-1), reversed(shape.padded), strict=True))
    return torch.stack((y, x), 3).flatten(1, 3)


def _maps(maps: Tensor, shape: Shape, parts: int) -> Tensor:
    return maps.reshape(maps.shape[0] * shape.offset_groups * parts, -1, *shape.padded)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, align_corners=False)


def _masked(samples: Tensor, mask: Tensor | None, shape: Shape) -> Tensor:
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


def _kernels(weight: Tensor, shape: Shape, inner: torch.dtype) -> Tensor:
    return weight.to(inner).reshape(shape.groups, weight.shape[0] // shape.groups, -1)


def _forward(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, shape: Shape, out: Tensor) -> None:
    """Fills `out`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    kernels = _kernels(weight, shape, inner)
    added = None if bias is None else bias.to(inner).view(shape.groups, -1, 1)
    for images, row_blocks in blocks(x.shape[0], shape, POSITIONS_AT_ONCE):
        maps = _padded(x[images], shape, inner)
        n, parts = len(maps), _parts(len(maps), shape)
        for rows in row_blocks:
            block = out[images, :, rows]
            grid = _grid(offset[images, :, rows].to(inner), shape, rows.start, parts)
            factors = None if mask is None else mask[images, :, rows].to(inner)
            samples = _masked(_sample(_maps(maps, shape, parts), grid), factors, shape)
            columns = _side_by_side(samples, n, shape.groups, block[0, 0].numel())
            product = torch.bmm(kernels, columns) if added is None else torch.baddbmm(added, kernels, columns)
            block.copy_(_apart(product, n).reshape(block.shape))


def _backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, shape: Shape,
    grad_x: Tensor, grad_offset: Tensor, grad_mask: Tensor,
) -> Tensor:
    """Fills the gradients of x, offset and mask, and returns that of weight."""
    inner = torch.promote_types(x.dtype, torch.float32)
    kernels = _kernels(weight, shape, inner)
    grad_kernels = torch.zeros_like(kernels)
    for images, row_blocks in blocks(x.shape[0], shape, POSITIONS_AT_ONCE):
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
            if factors is not None:
                dots = (grad_samples * samples).view(n, shape.offset_groups, -1, shape.taps, *factors.shape[2:]).sum(2)
                grad_mask[images, :, rows] = dots.flatten(1, 2)
                grad_samples = _masked(grad_samples, factors, shape).view(samples.shape)
            grad_block, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad_samples, _maps(maps, shape, parts), grid, 0, 0, False, [True, True])  # bilinear, zeros outside
            grad_maps += grad_block.view(maps.shape)
            grad_offset[images, :, rows] = _grad_of_positions(grad_grid, n, shape, parts)
        grad_x[images] = grad_maps[:, :, : shape.size[0], : shape.size[1]]
    return grad_kernels.view(weight.shape).to(weight.dtype)


deform_conv2d = register("sampled", _forward, _backward)
