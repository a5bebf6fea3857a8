"""SimPool (arXiv 2309.06891)."""
from typing import Any

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module
from .efficient_probing import check_tokens


@notrace_module
class SimPool(nn.Module):
    """Pools tokens by their likeness to their own mean (arXiv 2309.06891).

        y = LayerNorm(x),  a = softmax_n((W_q mean_n(x)) · (W_k y_n) / √C),  out = Σ_n a_n y_n

    (B, N, C) → (B, C), any number of tokens, any floating dtype. `zoo.capture` gets the `attention` a, (B, 1, N).

    Args:
        dim: C.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (billpsomas/efficient-probing, poolings/simpool.py, gamma None and one head): W_k is applied to the
    one query, not to all keys, which gives the same numbers for 1 / N of its products.

    Raises:
        ValueError: dim below 1, at construction; tokens of another shape, in `forward`.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.dim = self.out_features = dim
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.wq = nn.Linear(dim, dim, bias=False, **dd)
        self.wk = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("SimPool", x, self.dim)
        y = self.norm_patches(x)
        q = self.wq(x.mean(1, keepdim=True)) * self.dim**-0.5 @ self.wk.weight
        attention = (q @ y.mT).softmax(-1)
        report(self, attention=attention)
        return (attention.to(y.dtype) @ y).squeeze(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
