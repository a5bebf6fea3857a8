"""Token-aware average pooling in PyTorch, one dilation at a time, as an operator with its own gradient.

There, pools are depthwise convolutions, which run faster than sums of shifted maps. The backward pass takes them again, so
that training keeps the map and the weights only.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting


def avg_pool(x: Tensor, dilation: int) -> Tensor:
    """Mean over 3×3 positions `dilation` apart, those outside the map being 0; the map itself at dilation 0."""
    if dilation == 0:
        return x
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, dilation, dilation, dilation, dilation))
    rows = sum(padded.narrow(1, shift, height) for shift in (0, dilation, 2 * dilation))
    return sum(rows.narrow(2, shift, width) for shift in (0, dilation, 2 * dilation)) / 9


def convolved(x: Tensor, dilation: int) -> Tensor:
    """The same as a convolution."""
    if dilation == 0:
        return x
    channels = x.shape[-1]
    ninths = x.new_full((channels, 1, 3, 3), 1 / 9)
    return F.conv2d(x.permute(0, 3, 1, 2), ninths, padding=dilation, dilation=dilation, groups=channels).permute(0, 2, 3, 1)


def token_aware_avg_pool(x: Tensor, weights: Tensor) -> Tensor:
    """The definition."""
    pool = convolved if is_exporting() else avg_pool  # one operator of ONNX, where shifts take two dozen
    first, *others = (weight * pool(x, dilation) for dilation, weight in enumerate(weights.split(1, -1)))
    return sum(others, start=first)


@torch.library.custom_op("zoo::token_aware_avg_pool", mutates_args=())
def recomputed(x: Tensor, weights: Tensor) -> Tensor:
    """The same in at least float32; the gradient takes the pools again."""
    inner = torch.promote_types(x.dtype, torch.float32)
    map_, weights = x.to(inner), weights.to(inner).unbind(-1)
    with torch.autocast(x.device.type, enabled=False):
        out = map_.mul(weights[0][..., None]).contiguous()
        for dilation, weight in enumerate(weights[1:], 1):
            out.addcmul_(weight[..., None], convolved(map_, dilation))
    return out.to(x.dtype)


@recomputed.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::token_aware_avg_pool_backward", mutates_args=())
def recomputed_backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights. Every pool is its own adjoint."""
    inner = torch.promote_types(x.dtype, torch.float32)
    grad, map_ = grad.to(inner), x.to(inner)
    grad_x, grad_weights = torch.zeros(x.shape, dtype=inner, device=x.device), []
    with torch.autocast(x.device.type, enabled=False):
        for dilation, weight in enumerate(weights.to(inner).unbind(-1)):
            grad_x += convolved(grad * weight[..., None], dilation)
            grad_weights.append((grad * convolved(map_, dilation)).sum(-1))
    return grad_x.to(x.dtype), torch.stack(grad_weights, -1).to(weights.dtype)


@recomputed_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return recomputed_backward(grad, *ctx.saved_tensors)


recomputed.register_autograd(_backward, setup_context=_setup_context)
