"""The similarity of attention rows over blocks of queries, as an operator with its own gradient.

As all rows aᵢ are compared with the same mean m, Σᵢ cos(aᵢ, m) = ⟨m / |m|, Σᵢ aᵢ / |aᵢ|⟩: one pass over the rows adds up both
vectors, and the backward pass makes the rows again.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference

SCORES_AT_ONCE = {"cpu": 1 << 18}  # elements: 1 MiB of float32, so that the caches hold all that is made of them
SCORES_AT_ONCE_ELSEWHERE = 1 << 26
SHORTEST = 1e-8  # of the lengths divided by, as in torch's cosine similarity


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Of queries."""
    step = max(1, SCORES_AT_ONCE.get(q.device.type, SCORES_AT_ONCE_ELSEWHERE) // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[2], step))


def _attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.matmul(q, k.mT).mul_(scale).softmax(-1)


def _unit(a: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """a without what is not above the threshold and of length 1, which entries are kept, and the length (…, 1) before."""
    kept = a > threshold / a.shape[-1]
    a = a * kept
    length = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return a / length, kept, length


def _through_unit(grad: Tensor, unit: Tensor, kept: Tensor, length: Tensor) -> Tensor:
    """The gradient of `_unit`'s argument from that of its first result."""
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)) / length * kept


@torch.library.custom_op("zoo::attention_similarity", mutates_args=())
def attention_similarity_forward(q: Tensor, k: Tensor, threshold: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity, and of the attention rows (averaged over heads) their mean (B, 1, M) and the sum of their units (B, 1, M)."""
    inner = torch.promote_types(q.dtype, torch.float32)
    mean, units = (torch.zeros(q.shape[0], 1, k.shape[2], dtype=inner, device=q.device) for _ in range(2))
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(inner).contiguous()
        for block in _blocks(q, k):
            rows = _attention(q[:, :, block].to(inner), keys, scale).mean(1)
            mean += rows.sum(1, keepdim=True)
            units += _unit(rows, threshold)[0].sum(1, keepdim=True)
    mean /= q.shape[2]
    return (_unit(mean, threshold)[0] * units).sum() / (q.shape[0] * q.shape[2]), mean, units


@attention_similarity_forward.register_fake
def _(q: Tensor, k: Tensor, threshold: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = q.new_empty(q.shape[0], 1, k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    return mean.new_empty(()), mean, torch.empty_like(mean)


@torch.library.custom_op("zoo::attention_similarity_backward", mutates_args=())
def attention_similarity_backward(
    grad: Tensor, q: Tensor, k: Tensor, threshold: float, scale: float, mean: Tensor, units: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    inner, (_, heads, queries, _) = mean.dtype, q.shape
    grad_q, grad_k = (torch.zeros(x.shape, dtype=inner, device=x.device) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(inner).contiguous()
        unit_mean, *of_mean = _unit(mean, threshold)
        grad = grad / (q.shape[0] * queries)
        from_mean = _through_unit(grad * units, unit_mean, *of_mean) / queries
        for block in _blocks(q, k):
            block_q = q[:, :, block].to(inner)
            attention = _attention(block_q, keys, scale)
            grad_rows = from_mean + _through_unit(grad * unit_mean, *_unit(attention.mean(1), threshold))
            grad_scores = attention * (grad_rows / heads)[:, None]
            grad_scores -= attention.mul_(grad_scores.sum(-1, keepdim=True))
            grad_scores *= scale
            grad_q[:, :, block] = torch.matmul(grad_scores, keys)
            grad_k += torch.matmul(grad_scores.mT, block_q)
    return grad_q.to(q.dtype), grad_k.to(k.dtype)


@attention_similarity_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, threshold: float, scale: float, mean: Tensor, units: Tensor
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


register_gradient(
    attention_similarity_forward, attention_similarity_backward, reference.attention_similarity, reference.flops, kept=(1, 2))


def attention_similarity(q: Tensor, k: Tensor, threshold: float, scale: float) -> Tensor:
    """See `zoo.kernels.attention_similarity`. The attention is made anew in the backward pass."""
    return attention_similarity_forward(q, k, threshold, scale)[0]
