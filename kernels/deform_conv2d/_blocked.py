"""Makes an operator with its own gradient of a way to compute deformable convolution some images or rows at a time.

The samples are never held for more than one block, and taken again in the backward pass. What comes out lies in memory as what
went in, contiguous or channels-last.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference
from ._blocks import shape_of


def _format(t: Tensor) -> torch.memory_format:
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _empty_out(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(x.shape[0], weight.shape[0], *offset.shape[2:], dtype=x.dtype, device=x.device, memory_format=_format(x))


def _empty_like(t: Tensor | None) -> Tensor:
    return torch.empty(0) if t is None else torch.empty_like(t, memory_format=_format(t))


def register(name: str, forward: Callable[..., None], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`zoo::deform_conv2d_{name}`: as `zoo.kernels.deform_conv2d`, of any floating dtypes, at least float32 inside, that of x comes back.

    Args:
        forward: (x, offset, weight, bias, mask, shape, out) fills `out`.
        backward: (grad, x, offset, weight, mask, shape, grad_x, grad_offset, grad_mask) fills the last three and returns the gradient of
            weight.
    """
    @torch.library.custom_op(f"zoo::deform_conv2d_{name}", mutates_args=())
    def compute(
        x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int],
    ) -> Tensor:
        out = _empty_out(x, offset, weight)
        with torch.autocast(x.device.type, enabled=False):
            forward(x, offset, weight, bias, mask, shape_of(x, offset, weight, stride, padding, dilation), out)
        return out

    @compute.register_fake
    def _(
        x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int],
    ) -> Tensor:
        return _empty_out(x, offset, weight)

    @torch.library.custom_op(f"zoo::deform_conv2d_{name}_backward", mutates_args=())
    def compute_backward(
        grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        shape = shape_of(x, offset, weight, stride, padding, dilation)
        grad_x, grad_offset, grad_mask = _empty_like(x), _empty_like(offset), _empty_like(mask)
        with torch.autocast(x.device.type, enabled=False):
            grad_weight = backward(grad, x, offset, weight, mask, shape, grad_x, grad_offset, grad_mask)
        grad_bias = torch.empty(0) if bias is None else grad.sum((0, 2, 3), dtype=bias.dtype)
        return grad_x, grad_offset, grad_weight.contiguous(memory_format=_format(weight)), grad_bias, grad_mask

    @compute_backward.register_fake
    def _(
        grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        grad_x, grad_offset, grad_weight, grad_bias, grad_mask = map(_empty_like, (x, offset, weight, bias, mask))
        return grad_x, grad_offset, grad_weight, grad_bias, grad_mask

    register_gradient(compute, compute_backward, reference.deform_conv2d, reference.flops)
    return compute
