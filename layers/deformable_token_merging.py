"""Deformable token merging (LITv2, arXiv 2205.13213)."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import deform_conv2d
from zoo.kernels._exporting import is_exporting

from ._spatial import pad_to_multiple
from ._tracing import notrace_module


@notrace_module
class DeformableTokenMerging(nn.Module):
    """Patch merging whose patches find their own places (arXiv 2205.13213, section 3.3; from LITv1, arXiv 2105.14217).

        out = GELU(BN(deformable2×2(X, offsets(X)))),  both convolutions with stride 2

    (B, C, H, W) → (B, Co, ⌈H/stride⌉, ⌈W/stride⌉), any height and width, any floating dtype; fastest in channels-last memory.

    Args:
        dim: C.
        out_dim: Co, default 2C.
        stride: 2, or 1 for patches at every place, the last ones with a row and a column of zeros.
        device, dtype: of the parameters, as in torch.

    The offsets begin at zero; the authors let the weight that predicts them learn at 1/100 of the rate (ziplab/LITv2,
    classification/optimizer.py). Difference from the authors' code (classification/models/patch_embed.py): odd sizes are padded by a row or
    column of zeros (theirs: an error).

    Raises:
        ValueError: a dimension below 1 or another stride, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, stride: int = 2, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        if dim < 1 or out_dim < 1:
            raise ValueError(f"dim and out_dim must be at least 1, got {dim} and {out_dim}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.dim, self.stride = dim, stride
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.offset = nn.Conv2d(dim, 8, 2, stride, **dd)
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.norm, self.act = nn.BatchNorm2d(out_dim, **dd), nn.GELU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight[0].numel())  # as nn.Conv2d does
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        for zero in self.offset.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"DeformableTokenMerging: x must be (B, {self.dim}, H, W), got shape {tuple(x.shape)}")
        # Where a size is even, stride 2 leaves a further row or column of zeros alone, and a graph need not ask.
        x = F.pad(x, (0, 1, 0, 1)) if is_exporting() or self.stride == 1 else pad_to_multiple(x, 2)
        return self.act(self.norm(deform_conv2d(x, self.offset(x), self.weight, self.bias, stride=self.stride)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, out_dim={len(self.weight)}"
