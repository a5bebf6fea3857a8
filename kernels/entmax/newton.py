"""α-entmax by Newton's steps, as an operator that keeps nothing but its result."""
import math

import torch
from torch import Tensor

from .._backends import register_flops
from . import _gradient, reference

SCORES_AT_ONCE = {"cpu": 1 << 18}  # elements of a block of rows, which stays in the caches
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


@torch.library.custom_op("zoo::entmax_newton", mutates_args=())
def entmax_newton(z: Tensor, alpha: Tensor | None, number: float) -> Tensor:
    """α is the tensor, or else the number."""
    rows = z.reshape(-1, z.shape[-1])
    out = torch.empty_like(rows)
    alphas = alpha.expand(*z.shape[:-1], 1).reshape(-1, 1) if alpha is not None and alpha.numel() > 1 else None
    step = max(1, SCORES_AT_ONCE.get(z.device.type, SCORES_AT_ONCE_ELSEWHERE) // rows.shape[-1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        given = number if alpha is None else alpha if alphas is None else alphas[block]
        out[block] = _of_rows(rows[block], given)
    return out.view(z.shape)


def _of_rows(z: Tensor, alpha: float | Tensor) -> Tensor:
    x = reference.with_largest_zero(z)
    alpha = alpha.to(x.dtype) if isinstance(alpha, Tensor) else alpha
    s = x.new_zeros(len(x), 1)
    eps = torch.finfo(x.dtype).eps
    for _ in range(math.ceil(math.log2(x.shape[-1] / eps**0.5))):  # a step quarters the product of error and slope, at least
        p, slopes = _powers(x - s, alpha)
        total = p.sum(-1, keepdim=True)
        # of the norm (Σp)^{α-1}, which is convex in s, and linear where all weights are equal
        step = torch.expm1((alpha - 1) * total.log()) * total ** (2 - alpha) / ((alpha - 1) * slopes.sum(-1, keepdim=True))
        s = s + step.clamp_min(0)
        if z.device.type == "cpu" and not (step > eps * (1 + s)).any():
            break
    p = _powers(x - s, alpha)[0]
    return torch.where(z == -torch.inf, 0, p).to(z.dtype)


def _powers(y: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """p = u^{1/(α-1)} of u = [1 + (α - 1) y]₊, and its derivative in y, p / u on the support."""
    if isinstance(alpha, Tensor) or alpha not in (1.5, 2.0):
        u = ((alpha - 1) * y).clamp_min_(-1)
        p = (u.log1p() / (alpha - 1)).exp_()
        return p, torch.where(p > 0, p / (1 + u), 0)
    u = (1 + (alpha - 1) * y).clamp_min_(0)
    return (u, (u > 0).to(u.dtype)) if alpha == 2 else (u.square(), u)


@entmax_newton.register_fake
def _(z: Tensor, alpha: Tensor | None, number: float) -> Tensor:
    return torch.empty_like(z)


entmax_newton.register_autograd(_gradient.backward, setup_context=_gradient.save)
register_flops(entmax_newton, reference.flops)


def entmax(z: Tensor, alpha: float | Tensor) -> Tensor:
    """See `zoo.kernels.entmax`."""
    return entmax_newton(z, alpha, 0.0) if isinstance(alpha, Tensor) else entmax_newton(z, None, float(alpha))
