"""The selective scan as an operator with its own gradient, for which one state in `CHUNK` is kept, the first of a chunk.

The backward pass goes over the chunks from the last to the first and computes the states of each again. Within a chunk a position takes
one operation, of states that the cache of a processor holds: half the time of `reference.recurrence`, which goes over all of them
several times.
"""
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._backends import register_gradient
from . import reference
from .reference import CHUNK, by_position, step_sizes


def _chunks(length: int) -> Iterator[tuple[int, slice]]:
    for k, first in enumerate(range(0, length, CHUNK)):
        yield k, slice(first, min(first + CHUNK, length))


def _empty_results(u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the first states of the chunks."""
    (batch, channels, length), (groups, states) = u.shape, B.shape[1:3]
    chunks = (length + CHUNK - 1) // CHUNK
    inner = torch.promote_types(u.dtype, torch.float32)
    return (torch.empty_like(u, memory_format=torch.contiguous_format),
            u.new_empty(chunks, batch, groups, channels // groups, states, dtype=inner))


def _by_state(x: Tensor, now: slice, groups: int) -> Tensor:
    """(B, D, L) → (T, B, G, D/G, 1) of these positions."""
    return by_position(x[..., now], groups).unsqueeze(-1)


def _by_channel(x: Tensor, now: slice, inner: torch.dtype) -> Tensor:
    """(B, G, N, L) → (T, B, G, 1, N) of these positions."""
    return x[..., now].to(inner).movedim(-1, 0).contiguous().unsqueeze(-2)


def _walk(decay: Sequence[Tensor], states: Sequence[Tensor], h: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + states_t, put in the place of states_t; returns the last."""
    for fade, now in zip(decay, states, strict=True):
        h = torch.addcmul(now, fade, h, out=now)
    return h


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """At least float32 inside; the dtype of u comes back. Also what `_empty_results` says."""
    y, firsts = _empty_results(u, A, B)
    groups, inner = B.shape[1], firsts.dtype
    with torch.autocast(u.device.type, enabled=False):
        x, steps, a = u.to(inner), step_sizes(delta, delta_bias, delta_softplus, inner), A.to(inner).unflatten(0, (groups, -1))
        drive, h = steps * x, u.new_zeros(firsts.shape[1:], dtype=inner)
        for k, now in _chunks(u.shape[2]):
            firsts[k] = h
            states = _by_state(drive, now, groups) * _by_channel(B, now, inner)
            h = _walk((_by_state(steps, now, groups) * a).exp_().unbind(), states.unbind(), firsts[k])
            out = (states * _by_channel(C, now, inner)).sum(-1).movedim(0, -1).flatten(1, 2)
            y[..., now] = out if D is None else out.addcmul_(D.to(inner)[:, None], x[..., now])
    return y, firsts


@_forward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    return _empty_results(u, A, B)


def _empty_gradients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_u, of_delta, of_a, of_b, of_c, of_d, of_bias = (
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (u, delta, A, B, C, D, delta_bias))
    return of_u, of_delta, of_a, of_b, of_c, of_d, of_bias


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all seven."""
    results = _empty_gradients(u, delta, A, B, C, D, delta_bias)
    grad_u, grad_delta, grad_a, grad_b, grad_c, grad_d, grad_bias = results
    groups, inner = B.shape[1], firsts.dtype
    with torch.autocast(u.device.type, enabled=False):
        above, x, steps = grad.to(inner), u.to(inner), step_sizes(delta, delta_bias, delta_softplus, inner)
        a, drive, of_steps = A.to(inner).unflatten(0, (groups, -1)), steps * x, torch.empty_like(steps)
        of_a, behind = torch.zeros_like(a), None  # the derivative by the last state of a chunk, of what comes after it
        for k, now in reversed(list(_chunks(u.shape[2]))):
            step, driven, cotangent = (_by_state(t, now, groups) for t in (steps, drive, above))
            b, c = (_by_channel(t, now, inner) for t in (B, C))
            decay = (step * a).exp_()
            states = torch.cat((firsts[None, k], driven * b))
            _walk(decay.unbind(), states[1:].unbind(), states[0])
            by_state = cotangent * c
            if behind is not None:
                by_state[-1] += behind
            _walk(decay[1:].unbind()[::-1], by_state[:-1].unbind()[::-1], by_state[-1])
            behind = decay[0] * by_state[0]
            grad_c[..., now] = (cotangent * states[1:]).sum(-2).movedim(0, -1)
            grad_b[..., now] = (driven * by_state).sum(-2).movedim(0, -1)
            by_drive = (by_state * b).sum(-1).movedim(0, -1).flatten(1, 2)
            by_exponent = decay.mul_(by_state).mul_(states[:-1])
            of_a += (by_exponent * step).sum((0, 1))
            of_steps[..., now] = (by_exponent * a).sum(-1).movedim(0, -1).flatten(1, 2).addcmul_(by_drive, x[..., now])
            by_drive *= steps[..., now]
            grad_u[..., now] = by_drive if D is None else by_drive.addcmul_(D.to(inner)[:, None], above[..., now])
        if delta_softplus:
            of_steps *= -torch.expm1(-steps)  # sigmoid(x) = 1 - exp(-softplus(x))
        grad_delta.copy_(of_steps)
        grad_a.copy_(of_a.flatten(0, 1))
        if D is not None:
            grad_d.copy_((above * x).sum((0, 2)))
        if delta_bias is not None:
            grad_bias.copy_(of_steps.sum((0, 2)))
    return results


@_backward.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, firsts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(u, delta, A, B, C, D, delta_bias)


register_gradient(_forward, _backward, reference.selective_scan, reference.flops, kept=(1,))


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """See `zoo.kernels.selective_scan`."""
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)[0]
