"""Routed attention over lists of regions, a block of query regions at a time, as an operator with its own gradient.

The forward pass holds gathered keys and scores of one block only; the backward pass recomputes them route by route from the
logarithm of the softmax's denominator, so that it never copies keys and values top-k times.
"""
import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 1 << 20}  # elements: 4 MiB of float32, which the caches hold
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


def _blocks(regions: int, scores_per_region: int, device: torch.device) -> list[slice]:
    step = max(1, SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ELSEWHERE) // scores_per_region)
    return [slice(start, start + step) for start in range(0, regions, step)]


def _bias(on_map: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores: (r, s), 0 on the map and the lowest number off it."""
    return None if on_map is None else torch.zeros_like(on_map, dtype=dtype).masked_fill_(~on_map, torch.finfo(dtype).min)


@torch.library.custom_op("zoo::routed_attention", mutates_args=())
def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, on_map: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q Kᵀ) V for every query region, K and V being the key and value regions that `rows` names.

    Args:
        q: (N, t, d) query regions; k: (M, s, d) and v: (M, s, e) key and value regions; any floating dtype, float32 inside.
        rows: (N, n) int64, the key regions of every query region.
        on_map: (r, s) bool, where key region i has positions `on_map[i % r]` only; None: all of them.
        weights: (N, n) factors of the picked keys and values.

    Returns:
        (N, t, e), and the logarithm of the softmax's denominator (N, t, 1).
    """
    (regions, t, _), (s, e), n = q.shape, v.shape[1:], rows.shape[1]
    inner = torch.promote_types(q.dtype, torch.float32)
    out, logsumexp = q.new_empty(regions, t, e), q.new_empty(regions, t, 1, dtype=inner)
    bias = _bias(on_map, inner)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(regions, t * n * s, q.device):
            picked = rows[block].flatten()
            keys, values = (x.index_select(0, picked).to(inner) for x in (k, v))
            if weights is not None:
                factors = weights[block].to(inner).reshape(-1, 1, 1)
                keys, values = keys * factors, values * factors
            scores = torch.bmm(q[block].to(inner), keys.reshape(-1, n * s, keys.shape[-1]).transpose(1, 2)).mul_(scale)
            if bias is not None:
                scores += bias[picked % len(bias)].reshape(-1, 1, n * s)
            highest = scores.amax(-1, keepdim=True)
            exponentials = scores.sub_(highest).exp_()
            total = exponentials.sum(-1, keepdim=True)
            out[block] = torch.bmm(exponentials, values.reshape(-1, n * s, e)).div_(total)
            logsumexp[block] = total.log_().add_(highest)
    return out, logsumexp


@routed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, on_map: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    regions, t, _ = q.shape
    return q.new_empty(regions, t, v.shape[-1]), q.new_empty(regions, t, 1, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("zoo::routed_attention_backward", mutates_args=())
def routed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, on_map: Tensor | None, weights: Tensor | None,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and weights (with no columns where there are no weights)."""
    (regions, t, _), s, inner = q.shape, k.shape[1], logsumexp.dtype
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=inner, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad_weights = q.new_zeros(regions, 0 if weights is None else rows.shape[1], dtype=inner)
    bias = _bias(on_map, inner)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(regions, t * s, q.device):
            queries, above = q[block].to(inner), grad[block].to(inner)
            share = (above * out[block]).sum(-1, keepdim=True)
            for route, picked in enumerate(rows[block].unbind(1)):
                keys, values = (x.index_select(0, picked).to(inner) for x in (k, v))
                factors = None if weights is None else weights[block, route].to(inner).reshape(-1, 1, 1)
                scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
                grad_attention = torch.bmm(above, values.transpose(1, 2))
                if factors is not None:
                    scores, grad_attention = scores.mul_(factors), grad_attention.mul_(factors)
                if bias is not None:
                    scores += bias[picked % len(bias)][:, None]
                attention = scores.sub_(logsumexp[block]).exp_()
                grad_scores = grad_attention.sub_(share).mul_(attention).mul_(scale)
                grad_keys, grad_values = torch.bmm(grad_scores.transpose(1, 2), queries), torch.bmm(attention.transpose(1, 2), above)
                if factors is not None:
                    grad_weights[block, route] = (grad_keys * keys).sum((1, 2)) + (grad_values * values).sum((1, 2))
                    grad_scores, grad_keys, grad_values = grad_scores * factors, grad_keys * factors, grad_values * factors
                grad_q[block].baddbmm_(grad_scores, keys)
                grad_k.index_add_(0, picked, grad_keys)
                grad_v.index_add_(0, picked, grad_values)
    grad_q, grad_k, grad_v = grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
    return grad_q, grad_k, grad_v, grad_weights if weights is None else grad_weights.to(weights.dtype)


@routed_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, on_map: Tensor | None, weights: Tensor | None,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, logsumexp.new_empty(q.shape[0], 0) if weights is None else torch.empty_like(weights)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rows, scale, on_map, weights = inputs
    ctx.scale = scale
    ctx.save_for_backward(q, k, v, rows, on_map, weights, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, rows, on_map, weights, out, logsumexp = ctx.saved_tensors
    *grads, grad_weights = routed_attention_backward(grad, q, k, v, rows, ctx.scale, on_map, weights, out, logsumexp)
    return *grads, None, None, None, None if weights is None else grad_weights


routed_attention.register_autograd(_backward, setup_context=_setup_context)
