"""Token-aware average pooling, one dilation at a time, as an operator with its own gradient.

Pools are depthwise convolutions, which run faster than sums of shifted maps. The backward pass takes them again, so that training
keeps the map and the weights only.
"""
import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference
from .convolved import avg_pool


@torch.library.custom_op("zoo::token_aware_avg_pool", mutates_args=())
def _forward(x: Tensor, weights: Tensor) -> Tensor:
    """In at least float32; the dtype of x comes back."""
    inner = torch.promote_types(x.dtype, torch.float32)
    map_, (first, *others) = x.to(inner), weights.to(inner).unbind(-1)
    with torch.autocast(x.device.type, enabled=False):
        out = map_.mul(first[..., None]).contiguous()
        for dilation, weight in enumerate(others, 1):
            out.addcmul_(weight[..., None], avg_pool(map_, dilation))
    return out.to(x.dtype)


@_forward.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::token_aware_avg_pool_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights. Every pool is its own adjoint."""
    inner = torch.promote_types(x.dtype, torch.float32)
    grad, map_ = grad.to(inner), x.to(inner)
    grad_x, grad_weights = torch.zeros(x.shape, dtype=inner, device=x.device), []
    with torch.autocast(x.device.type, enabled=False):
        for dilation, weight in enumerate(weights.to(inner).unbind(-1)):
            grad_x += avg_pool(grad * weight[..., None], dilation)
            grad_weights.append((grad * avg_pool(map_, dilation)).sum(-1))
    return grad_x.to(x.dtype), torch.stack(grad_weights, -1).to(weights.dtype)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


register_gradient(_forward, _backward, reference.token_aware_avg_pool, reference.flops)


def token_aware_avg_pool(x: Tensor, weights: Tensor) -> Tensor:
    """See `zoo.kernels.token_aware_avg_pool`."""
    return _forward(x, weights)
