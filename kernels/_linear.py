"""Linear maps of the last dimension, faster on a CPU."""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ._backends import in_forward_mode, in_functorch
from ._exporting import is_exporting, known

_AVAILABLE = torch.backends.mkldnn.is_available()
_SMALL = 20480  # elements of a single image, up to which torch's own code convolves instead of oneDNN's
_NARROWEST = 16  # channels on either side: below, oneDNN has slow code only


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, as `F.linear`, of x (..., C) and `weight` (Co, C).

    Plain float32 tensors on a CPU go through oneDNN: it has kernels for every instruction set, adds the bias on the way and minds no
    odd widths, where the BLAS behind `F.linear` was measured at 0.4 to 0.95 of its speed on a processor with AVX-512, at half on
    another. It is the inner product, and in compiled graphs, which take that of constant weights only, a 1×1 convolution of maps
    (B, H, W, C). The result differs by rounding only. Elsewhere it is `F.linear`.
    """
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return F.conv2d(x.contiguous().permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _inner_product(x, weight, bias)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` does more than `F.linear` does: what records or transforms operators, and other kinds of tensors, meet that."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.dtype == weight.dtype == torch.float32
    if not plain or not _AVAILABLE or x.device.type != "cpu" or is_exporting():
        return False
    if torch.compiler.is_compiling():
        return x.ndim == 4 and (known((x.shape[0] > 1,)) or known((x.numel() > _SMALL,)))
    fits = x.ndim > 1 and x.numel() > 0 and min(weight.shape) >= _NARROWEST
    return fits and not torch.is_autocast_enabled("cpu") and not in_functorch() and not in_forward_mode()


def _inner_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):  # for parts of a matrix oneDNN has slow code only
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)


class _Linear(torch.autograd.Function):
    """With the gradient that torch's operator lacks, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _inner_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


if _AVAILABLE:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
        return 2 * torch.Size(x).numel() * weight[0]
