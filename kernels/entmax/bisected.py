"""α-entmax for any α by bisection, as an operator that keeps nothing but its result."""
import torch
from torch import Tensor

from .._backends import register_flops
from . import _gradient, _rows, reference


@torch.library.custom_op("zoo::entmax_bisected", mutates_args=())
def entmax_bisected(z: Tensor, alpha: Tensor) -> Tensor:
    return _rows.entmax(z, alpha)


@entmax_bisected.register_fake
def _(z: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(z)


entmax_bisected.register_autograd(_gradient.backward, setup_context=_gradient.save)
register_flops(entmax_bisected, reference.flops)


def entmax(z: Tensor, alpha: float | Tensor) -> Tensor:
    """See `zoo.kernels.entmax`."""
    return entmax_bisected(z, alpha if isinstance(alpha, Tensor) else torch.full((), alpha, dtype=torch.float64, device=z.device))
