"""α-entmax of some rows at a time, so that what is made on the way stays in the caches."""
import torch
from torch import Tensor

from . import reference

SCORES_AT_ONCE = {"cpu": 1 << 18}  # elements
SCORES_AT_ONCE_ELSEWHERE = 1 << 26


def entmax(z: Tensor, alpha: float | Tensor) -> Tensor:
    """See `zoo.kernels.entmax`."""
    rows = z.reshape(-1, z.shape[-1])
    out = torch.empty_like(rows)
    alphas = alpha.expand(*z.shape[:-1], 1).reshape(-1, 1) if isinstance(alpha, Tensor) and alpha.numel() > 1 else None
    step = max(1, SCORES_AT_ONCE.get(z.device.type, SCORES_AT_ONCE_ELSEWHERE) // max(1, rows.shape[-1]))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        out[block] = reference.entmax(rows[block], alpha if alphas is None else alphas[block])
    return out.view(z.shape)
