"""Deformable convolution some images, or some rows of one image, at a time, as an operator with its own gradient.

The samples are never held for more than one block, and taken again in the backward pass: `gathered` from channels-last maps
where channels are not in groups, else `sampled`. What comes out lies in memory as what went in, contiguous or channels-last.
"""
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import gathered, sampled
from .blocks import shape_of


def _format(t: Tensor) -> torch.memory_format:
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _empty_out(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(x.shape[0], weight.shape[0], *offset.shape[2:], dtype=x.dtype, device=x.device, memory_format=_format(x))


def _empty_like(t: Tensor | None) -> Tensor:
    return torch.empty(0) if t is None else torch.empty_like(t, memory_format=_format(t))


@torch.library.custom_op("zoo::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`. Any floating dtypes, at least float32 inside; the dtype of x comes back."""
    shape = shape_of(x, offset, weight, stride, padding, dilation)
    out, way = _empty_out(x, offset, weight), gathered if gathered.suits(shape) else sampled
    with torch.autocast(x.device.type, enabled=False):
        way.forward(x, offset, weight, bias, mask, shape, out)
    return out


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:
    return _empty_out(x, offset, weight)


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
    shape = shape_of(x, offset, weight, stride, padding, dilation)
    grad_x, grad_offset, grad_mask = _empty_like(x), _empty_like(offset), _empty_like(mask)
    way = gathered if gathered.suits(shape) else sampled
    with torch.autocast(x.device.type, enabled=False):
        grad_weight = way.backward(grad, x, offset, weight, mask, shape, grad_x, grad_offset, grad_mask)
    return grad_x, grad_offset, grad_weight.contiguous(memory_format=_format(weight)), grad_mask


@deform_conv2d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(x), _empty_like(offset), _empty_like(weight), _empty_like(mask)


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
