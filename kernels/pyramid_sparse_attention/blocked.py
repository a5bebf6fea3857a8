"""Pyramid sparse attention, one block of queries of a head at a time over the rows that it keeps, as an operator with its own gradient.

The forward pass holds the scores of one block; the backward pass recomputes them from the logarithm of the softmax's denominator.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference
from ._pyramid import check_levels, counts, kept


def _kept_rows(levels: Tensor, of_rows: Tensor, queries: int, query_block: int, key_block: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Of every block of queries with any: which head of which image it is of, its queries, and the rows that it keeps."""
    for head, of_head in enumerate(levels.flatten(0, 1)):
        chosen = kept(of_head, key_block) & (of_rows > 0)
        for block, rows in enumerate(chosen):
            if (index := rows.nonzero().squeeze(1)).numel():
                yield head, slice(block * query_block, min((block + 1) * query_block, queries)), index


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's denominator."""
    inner = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=inner)


@torch.library.custom_op("zoo::pyramid_sparse_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Any floating dtypes, at least float32 inside; that of q comes back. Also what `_empty_results` says."""
    check_levels(levels)
    out, logsumexp = (x.zero_() for x in _empty_results(q, v))
    inner, of_rows = logsumexp.dtype, counts(tokens, levels.shape[3], key_block, q.device)
    bias = of_rows.to(inner).log()
    queries, keys, values, results, denominators = (x.flatten(0, 1) for x in (q, k, v, out, logsumexp))
    with torch.autocast(q.device.type, enabled=False):
        for head, block, rows in _kept_rows(levels, of_rows, q.shape[2], query_block, key_block):
            own, picked = keys[head].index_select(0, rows).to(inner), values[head].index_select(0, rows).to(inner)
            scores = torch.addmm(bias[rows], queries[head, block].to(inner), own.t(), alpha=scale)
            highest = scores.amax(-1, keepdim=True)
            exponentials = scores.sub_(highest).exp_()
            total = exponentials.sum(-1, keepdim=True)
            results[head, block] = (exponentials @ picked).div_(total)
            denominators[head, block] = total.log_().add_(highest).squeeze(1)
    return out, logsumexp


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


@torch.library.custom_op("zoo::pyramid_sparse_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of the pyramids."""
    inner, of_rows = logsumexp.dtype, counts(tokens, levels.shape[3], key_block, q.device)
    bias = of_rows.to(inner).log()
    sums = [torch.zeros_like(x, dtype=inner, memory_format=torch.contiguous_format) for x in (q, k, v)]
    grad_q, grad_k, grad_v = (x.flatten(0, 1) for x in sums)
    above, queries, keys, values, results, denominators = (x.flatten(0, 1) for x in (grad, q, k, v, out, logsumexp))
    with torch.autocast(q.device.type, enabled=False):
        for head, block, rows in _kept_rows(levels, of_rows, q.shape[2], query_block, key_block):
            own, picked = keys[head].index_select(0, rows).to(inner), values[head].index_select(0, rows).to(inner)
            of_block, of_grad = queries[head, block].to(inner), above[head, block].to(inner)
            share = (of_grad * results[head, block]).sum(-1, keepdim=True)
            attention = torch.addmm(bias[rows], of_block, own.t(), alpha=scale).sub_(denominators[head, block, None]).exp_()
            grad_scores = (of_grad @ picked.t()).sub_(share).mul_(attention).mul_(scale)
            grad_q[head, block] = grad_scores @ own
            grad_k[head].index_add_(0, rows, grad_scores.t() @ of_block)
            grad_v[head].index_add_(0, rows, attention.t() @ of_grad)
    of_q, of_k, of_v = (x.to(like.dtype) for x, like in zip(sums, (q, k, v), strict=True))
    return of_q, of_k, of_v


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float,
    out: Tensor, logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


register_gradient(_forward, _backward, reference.pyramid_sparse_attention, reference.flops, kept=(0, 1))


def pyramid_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, tokens: int, query_block: int, key_block: int, scale: float
) -> Tensor:
    """See `reference`. Scores are not kept."""
    return _forward(q, k, v, levels, tokens, query_block, key_block, scale)[0]
