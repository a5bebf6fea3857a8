"""The derivatives of α-entmax from its result alone, in operations that autograd differentiates again."""
from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """The result, which the product with the values keeps anyway, and α."""
    _, alpha, ctx.alpha = inputs
    ctx.save_for_backward(output, *([] if alpha is None else [alpha]))


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """s = p^{2-α} on the support, t = s / Σs:  dz = s ⊙ dp - t ⟨s, dp⟩,

        dα = ⟨dp, (p - t) / (α-1)² - (h - t Σh) / (α-1)⟩,  h = p ln p

    p - t is made of differences that are small themselves as α nears 1.
    """
    result, *given = ctx.saved_tensors
    inner = torch.promote_types(result.dtype, torch.float32)
    alpha = given[0].to(inner) if given else ctx.alpha
    p, dp, inside = result.to(inner), grad.to(inner), result > 0
    logarithm = torch.where(inside, p, 1).log()
    s = torch.where(inside, ((2 - alpha) * logarithm).exp(), 0)
    total = torch.where(inside.any(-1, keepdim=True), s.sum(-1, keepdim=True), 1)
    t = s / total
    grad_z = (s * dp - t * (s * dp).sum(-1, keepdim=True)).to(grad.dtype)
    if not given or not ctx.needs_input_grad[1]:
        return grad_z, None, None
    excess = p * torch.expm1((1 - alpha) * logarithm)  # s - p
    h = p * logarithm
    from_p = (p * excess.sum(-1, keepdim=True) - excess) / total  # p - t
    of_alpha = from_p / (alpha - 1) ** 2 - (h - t * h.sum(-1, keepdim=True)) / (alpha - 1)
    return grad_z, (dp * of_alpha).sum_to_size(given[0].shape).to(given[0].dtype), None
