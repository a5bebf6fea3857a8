"""Routing attention over lists of regions, a block of query regions at a time, as an operator with its own gradient.

The forward pass holds gathered keys and scores of one block only; the backward pass recomputes them route by route from the
logarithm of the softmax's denominator, so that it never copies keys and values top-k times.

In the shapes, N are the query regions of all images and heads, M their key regions, the rest is as in `reference`.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import register_gradient
from .._regions import check_routes, cut, divides, pad_to_grid, paste, positions, region_size
from . import reference

SCORES_AT_ONCE = {"cpu": 1 << 20}  # elements: 4 MiB of float32, which the caches hold
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


def _blocks(regions: int, scores_per_region: int, device: torch.device) -> list[slice]:
    step = max(1, SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ELSEWHERE) // scores_per_region)
    return [slice(start, start + step) for start in range(0, regions, step)]


def _bias(on_map: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores: (r, s), 0 on the map and the lowest number off it."""
    return None if on_map is None else torch.zeros_like(on_map, dtype=dtype).masked_fill_(~on_map, torch.finfo(dtype).min)


class _Problem(NamedTuple):
    """Maps as lists of regions, and what they are attended with."""

    q: Tensor  # (N, t, d)
    k: Tensor  # (M, s, d)
    v: Tensor  # (M, s, e)
    rows: Tensor  # (N, n) int64, the key regions of every query region
    on_map: Tensor | None  # (r, s) bool, where key region i has positions `on_map[i % r]` only; None: all of them
    weights: Tensor | None  # (N, n), factors of the picked keys and values


def _problem(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], weights: Tensor | None
) -> _Problem:
    on_map = None
    if not divides(*k.shape[1:3], regions=regions, size=kv_size):
        on_map = positions(*k.shape[1:3], regions=regions, size=kv_size, device=k.device) >= 0
    if weights is not None:
        weights = weights[:, None].expand(-1, num_heads, -1, -1).flatten(0, 2)
    size = region_size(*q.shape[1:3], regions=regions)
    keys, values = (_cut(x, regions, kv_size, num_heads) for x in (k, v))
    rows = reference.rows_of(routes, num_heads).flatten(0, 2)
    return _Problem(_cut(q, regions, size, num_heads), keys, values, rows, on_map, weights)


def _cut(x: Tensor, regions: list[int], size: tuple[int, int] | list[int], num_heads: int) -> Tensor:
    return cut(pad_to_grid(x, regions, size), regions, size, num_heads).flatten(0, 2)


def _pasted(x: Tensor, like: Tensor, regions: list[int], size: tuple[int, int] | list[int]) -> Tensor:
    """(B·heads·r, h·w, d) → (B, H, W, heads·d), in the dtype and size of `like`, contiguous."""
    x = paste(x.unflatten(0, (len(like), -1, regions[0] * regions[1])), regions, size)
    return x[:, : like.shape[1], : like.shape[2]].to(like.dtype).contiguous()


def _empty_results(q: Tensor, v: Tensor, regions: list[int], num_heads: int) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's denominator, (N, t, 1)."""
    (b, height, width, _), (h, w) = q.shape, region_size(*q.shape[1:3], regions=regions)
    logsumexp = q.new_empty(b * num_heads * regions[0] * regions[1], h * w, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(b, height, width, v.shape[-1]), logsumexp


@torch.library.custom_op("zoo::routing_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Any floating dtypes, at least float32 inside; that of q comes back. Also what `_empty_results` says."""
    check_routes("routing_attention", routes, regions[0] * regions[1])
    problem = _problem(q, k, v, routes, regions, num_heads, kv_size, weights)
    (count, t, _), (s, e), n = problem.q.shape, problem.v.shape[1:], problem.rows.shape[1]
    like, logsumexp = _empty_results(q, v, regions, num_heads)
    inner = logsumexp.dtype
    out, bias = q.new_empty(count, t, e), _bias(problem.on_map, inner)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(count, t * n * s, q.device):
            picked = problem.rows[block].flatten()
            keys, values = (x.index_select(0, picked).to(inner) for x in (problem.k, problem.v))
            if problem.weights is not None:
                factors = problem.weights[block].to(inner).reshape(-1, 1, 1)
                keys, values = keys * factors, values * factors
            scores = torch.bmm(problem.q[block].to(inner), keys.reshape(-1, n * s, keys.shape[-1]).transpose(1, 2)).mul_(scale)
            if bias is not None:
                scores += bias[picked % len(bias)].reshape(-1, 1, n * s)
            highest = scores.amax(-1, keepdim=True)
            exponentials = scores.sub_(highest).exp_()
            total = exponentials.sum(-1, keepdim=True)
            out[block] = torch.bmm(exponentials, values.reshape(-1, n * s, e)).div_(total)
            logsumexp[block] = total.log_().add_(highest)
    return _pasted(out, like, regions, region_size(*q.shape[1:3], regions=regions)), logsumexp


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v, regions, num_heads)


@torch.library.custom_op("zoo::routing_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None, out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and weights (of no elements where there are no weights)."""
    problem = _problem(q, k, v, routes, regions, num_heads, kv_size, weights)
    size, inner = region_size(*q.shape[1:3], regions=regions), logsumexp.dtype
    grad, out = (_cut(x, regions, size, num_heads) for x in (grad, out))
    (count, t, _), s = problem.q.shape, problem.k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=inner, memory_format=torch.contiguous_format) for x in problem[:3])
    grad_weights = torch.empty_like(problem.rows, dtype=inner)
    bias = _bias(problem.on_map, inner)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(count, t * s, q.device):
            queries, above = problem.q[block].to(inner), grad[block].to(inner)
            share = (above * out[block]).sum(-1, keepdim=True)
            for route, picked in enumerate(problem.rows[block].unbind(1)):
                keys, values = (x.index_select(0, picked).to(inner) for x in (problem.k, problem.v))
                factors = None if problem.weights is None else problem.weights[block, route].to(inner).reshape(-1, 1, 1)
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
    grad_q, grad_k, grad_v = _pasted(grad_q, q, regions, size), _pasted(grad_k, k, regions, kv_size), _pasted(grad_v, v, regions, kv_size)
    if weights is None:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_weights.view(len(q), num_heads, *weights.shape[1:]).sum(1).to(weights.dtype)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: list[int], num_heads: int, kv_size: list[int], scale: float,
    weights: Tensor | None, out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = q, k, v, q.new_empty(0) if weights is None else weights
    grad_q, grad_k, grad_v, grad_weights = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return grad_q, grad_k, grad_v, grad_weights


register_gradient(_forward, _backward, reference.routing_attention, reference.flops, kept=(0, 1))


def routing_attention(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, regions: tuple[int, int], num_heads: int, kv_size: tuple[int, int], scale: float,
    weights: Tensor | None,
) -> Tensor:
    """See `zoo.kernels.routing_attention`. Neither gathered keys nor scores are kept."""
    return _forward(q, k, v, routes, regions, num_heads, kv_size, scale, weights)[0]
