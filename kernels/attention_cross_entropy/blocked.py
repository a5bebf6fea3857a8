"""The cross entropy of softmax attention and linear attention over blocks of queries, as an operator with its own gradient."""
from collections.abc import Iterator

import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference
from .reference import EPS

SCORES_AT_ONCE = {"cpu": 1 << 18}  # elements: 1 MiB of float32, so that the caches hold all that is made of them
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Of queries."""
    step = max(1, SCORES_AT_ONCE.get(q.device.type, SCORES_AT_ONCE_ELSEWHERE) // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[2], step))


def _inner(q: Tensor, of_q: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, of_q.dtype), torch.float32)


@torch.library.custom_op("zoo::attention_cross_entropy", mutates_args=())
def attention_cross_entropy_forward(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float) -> Tensor:
    inner = _inner(q, of_q)
    total = torch.zeros((), dtype=inner, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        k, of_k = k.to(inner).contiguous(), of_k.to(inner).contiguous()
        for block in _blocks(q, k):
            attention = torch.matmul(q[:, :, block].to(inner), k.mT).mul_(scale).softmax(-1)
            weights = torch.matmul(of_q[:, :, block].to(inner), of_k.mT)
            total += (weights.sum(-1) + EPS).log().sum() - (attention * weights.log_()).sum()
    return total / q.shape[:3].numel()


@attention_cross_entropy_forward.register_fake
def _(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float) -> Tensor:
    return q.new_empty((), dtype=_inner(q, of_q))


@torch.library.custom_op("zoo::attention_cross_entropy_backward", mutates_args=())
def attention_cross_entropy_backward(
    grad: Tensor, q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all four, from rows that are made again."""
    inner = _inner(q, of_q)
    gradients = [torch.zeros(x.shape, dtype=inner, device=x.device) for x in (q, k, of_q, of_k)]
    with torch.autocast(q.device.type, enabled=False):
        keys, features = k.to(inner).contiguous(), of_k.to(inner).contiguous()
        grad = grad / q.shape[:3].numel()
        for block in _blocks(q, k):
            queries, query_features = q[:, :, block].to(inner), of_q[:, :, block].to(inner)
            attention = torch.matmul(queries, keys.mT).mul_(scale).softmax(-1)
            weights = torch.matmul(query_features, features.mT)
            of_weights = grad * (1 / (weights.sum(-1, keepdim=True) + EPS) - attention / weights)
            logarithms = weights.log_()
            of_logits = grad * scale * attention * ((attention * logarithms).sum(-1, keepdim=True) - logarithms)
            gradients[0][:, :, block] = torch.matmul(of_logits, keys)
            gradients[1] += torch.matmul(of_logits.mT, queries)
            gradients[2][:, :, block] = torch.matmul(of_weights, features)
            gradients[3] += torch.matmul(of_weights.mT, query_features)
    of_each = [gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, of_q, of_k), strict=True)]
    return of_each[0], of_each[1], of_each[2], of_each[3]


@attention_cross_entropy_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), of_q.new_empty(of_q.shape), of_k.new_empty(of_k.shape)


register_gradient(
    attention_cross_entropy_forward, attention_cross_entropy_backward, reference.attention_cross_entropy, reference.flops)


def attention_cross_entropy(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, scale: float) -> Tensor:
    """See `zoo.kernels.attention_cross_entropy`. Rows are made anew in the backward pass."""
    return attention_cross_entropy_forward(q, k, of_q, of_k, scale)
