"""Token-aware average pooling, TAP (arXiv 2303.11126)."""
from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels import token_aware_avg_pool

from ._capture import report
from ._initialization import fan_out_normal_
from ._tracing import notrace_module


@notrace_module
class TokenAwareAvgPool(nn.Module):
    """Lets every token choose how far it looks around before attention (arXiv 2303.11126, section 3.1).

        out[p] = Σ_k w[p, k] · pool_k(x)[p],  w = softmax_k(conv3×3(BatchNorm(conv3×3(x))))
        pool_0(x) = x,  pool_k(x) the mean over 3×3 tokens k apart, those outside the map being 0

    (B, H, W, C) → (B, H, W, C), any height and width, any floating dtype. With one scale it is the identity. `zoo.capture` gets
    the `weights` w, (B, H, W, K).

    Args:
        dim: C.
        num_scales: K, of the pools.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (guoyongcs/TAPADL, TAPADL_FAN/models/tap_fan.py): maps need not be square, and
    no K maps are kept for the backward pass (see `zoo.kernels.token_aware_avg_pool`).

    Raises:
        ValueError: arguments outside what is said above, at construction; a map of another shape, in `forward`.
    """

    def __init__(
        self, dim: int, num_scales: int = 4, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or num_scales < 1:
            raise ValueError(f"dim and num_scales must be at least 1, got {dim} and {num_scales}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim, self.num_scales = dim, num_scales
        self.conv1 = nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(num_scales, **dd)
        self.conv2 = nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_out_normal_(self.conv1)
        fan_out_normal_(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        report(self, weights=weights)
        return token_aware_avg_pool(x, weights)

    def weights(self, x: Tensor) -> Tensor:
        """w, (B, H, W, K), positive and of sum 1."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"TokenAwareAvgPool: x must be (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        return self.conv2(self.norm(self.conv1(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1).softmax(-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_scales={self.num_scales}"
