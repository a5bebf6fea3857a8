"""Deformable convolution of channels-last maps without groups: every sample is a weighted sum of four rows of C numbers.

That is an embedding bag, which reads whole rows and is many times as fast as `grid_sample`. The samples of a block are the rows
of a matrix product with the kernel; they are taken again in the backward pass.

In the shapes, N = images · rows · Wo · K are the samples of a block.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._linear import linear
from ._blocked import register
from ._blocks import Shape, blocks
from .reference import positions

POSITIONS_AT_ONCE = 2048  # output positions, enough for the matrix product and few enough for the caches


class _Axis(NamedTuple):
    """The places before and after every sample along one axis, their weights, and whether they are on the map; each (2, N)."""

    at: Tensor
    weight: Tensor
    inside: Tensor

    def grad_of_places(self, grad_weight: Tensor) -> Tensor:
        """Gradient of the weights → that of the places of the samples, (N,)."""
        before, after = grad_weight * self.inside
        return after - before


class _Samples(NamedTuple):
    """The samples of a block: `index` and `weight`, (N, 4), are the rows of the table around each and their weights."""

    y: _Axis
    x: _Axis
    index: Tensor
    weight: Tensor

    def grad_of_places(self, grad_weight: Tensor) -> Tensor:
        """Gradient of `weight` → that of the places of the samples, (N, 2)."""
        grad = grad_weight.T.reshape(2, 2, -1)
        along_y, along_x = (grad * self.x.weight).sum(1), (grad * self.y.weight[:, None]).sum(0)
        return torch.stack((self.y.grad_of_places(along_y), self.x.grad_of_places(along_x)), -1)


def _axis(place: Tensor, length: int) -> _Axis:
    place = place.clamp(-2, length + 1)
    low = place.floor()
    share = place - low
    at = torch.stack((low, low + 1))
    inside = (at >= 0) & (at < length)
    # Clamped as integers, an undefined place is some place on the map.
    return _Axis(at.int().clamp_(0, length - 1), torch.stack((1 - share, share)) * inside, inside)


def _samples(offset: Tensor, shape: Shape, first_row: int) -> _Samples:
    """Of offsets (n, K·2, rows, Wo)."""
    height, width = shape.size
    y, x = (p.permute(0, 1, 3, 4, 2).flatten() for p in positions(offset, shape.kernel, *shape.geometry, first_row))
    y, x = _axis(y, height), _axis(x, width)
    image = torch.arange(len(offset), dtype=torch.int32).repeat_interleave(y.at.shape[1] // len(offset))
    index, weight = ((image * height + y.at)[:, None] * width + x.at, y.weight[:, None] * x.weight)  # (2, 2, N)
    return _Samples(y, x, index.flatten(0, 1).T.contiguous(), weight.flatten(0, 1).T.contiguous())


def _gather(table: Tensor, index: Tensor, factors: Tensor) -> Tensor:
    """(n·H·W, C) → (N, C)."""
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=factors)


def _gather_backward(grad: Tensor, table: Tensor, index: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of the factors, by the operators that autograd would use."""
    n, four = len(grad), index.shape[1]
    bags = torch.arange(n, dtype=index.dtype)
    starts, sizes, bags = bags * four, torch.full_like(bags, four), bags.repeat_interleave(four)
    index = index.flatten()
    grad_factors = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, index, starts, bags, 0)
    grad_table = torch.ops.aten._embedding_bag_dense_backward(
        grad, index, bags, sizes, index.new_empty(0), len(table), False, 0, factors.flatten())
    return grad_table, grad_factors.view(n, four)


class _Block(NamedTuple):
    """What forward and backward pass know of a block: its place in the batch, its table, samples, mask (N, 1) and columns."""

    images: slice
    rows: slice
    table: Tensor
    samples: _Samples
    mask: Tensor | None
    factors: Tensor
    columns: Tensor


def _blocks(x: Tensor, offset: Tensor, mask: Tensor | None, shape: Shape, inner: torch.dtype) -> Iterator[_Block]:
    for images, row_blocks in blocks(len(x), shape, POSITIONS_AT_ONCE):
        table = x[images].permute(0, 2, 3, 1).to(inner).reshape(-1, shape.channels)
        for rows in row_blocks:
            samples = _samples(offset[images, :, rows].to(inner), shape, rows.start)
            factors, block_mask = samples.weight, None
            if mask is not None:
                block_mask = mask[images, :, rows].to(inner).permute(0, 2, 3, 1).reshape(-1, 1)
                factors = factors * block_mask
            columns = _gather(table, samples.index, factors).view(-1, shape.taps * shape.channels)
            yield _Block(images, rows, table, samples, block_mask, factors, columns)


def _kernels(weight: Tensor, inner: torch.dtype) -> Tensor:
    """(Co, K·C)."""
    return weight.to(inner).permute(0, 2, 3, 1).reshape(len(weight), -1)


def _forward(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, shape: Shape, out: Tensor) -> None:
    """Fills `out`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    kernels, bias = _kernels(weight, inner), None if bias is None else bias.to(inner)
    for block in _blocks(x, offset, mask, shape, inner):
        into = out.permute(0, 2, 3, 1)[block.images, block.rows]
        into.copy_(linear(block.columns, kernels, bias).view(into.shape))


def _backward(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, shape: Shape,
    grad_x: Tensor, grad_offset: Tensor, grad_mask: Tensor,
) -> Tensor:
    """Fills the gradients of x, offset and mask, and returns that of weight."""
    inner = torch.promote_types(x.dtype, torch.float32)
    kernels = _kernels(weight, inner)
    grad, grad_x, grad_offset = (t.permute(0, 2, 3, 1) for t in (grad, grad_x.zero_(), grad_offset))
    grad_kernels = torch.zeros_like(kernels)
    for images, rows, table, samples, block_mask, factors, columns in _blocks(x, offset, mask, shape, inner):
        above = grad[images, rows].to(inner).reshape(len(columns), -1)
        grad_kernels += above.t() @ columns
        grad_samples = linear(above, kernels.t()).reshape(-1, shape.channels)
        grad_table, grad_factors = _gather_backward(grad_samples, table, samples.index, factors)
        grad_x[images] += grad_table.view(grad_x[images].shape)
        if block_mask is not None:
            into = grad_mask.permute(0, 2, 3, 1)[images, rows]
            into.copy_((grad_factors * samples.weight).sum(1).view(into.shape))
            grad_factors = grad_factors * block_mask
        into = grad_offset[images, rows]
        into.copy_(samples.grad_of_places(grad_factors).view(into.shape))
    return grad_kernels.view(len(weight), *shape.kernel, -1).permute(0, 3, 1, 2).to(weight.dtype)


deform_conv2d = register("gathered", _forward, _backward)
