"""Polarized self-attention (arXiv 2107.00782)."""
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._capture import report
from ._plain import is_plain
from ._tracing import notrace_module

Layout = Literal["parallel", "sequential"]


@notrace_module
class PolarizedSelfAttention(nn.Module):
    """A gate per channel and a gate per position, each at full resolution along its own axis (arXiv 2107.00782, section 3.1).

    With X of N positions, 1×1 convolutions q, v (C → 1 and C → C/2) and Q, V (C → C/2) without bias:

        channel:  a_c = sigmoid(up(Σ_n softmax_n(q(X))_n · v(X)_n))                            (B, C, 1, 1)
        spatial:  a_n = sigmoid(softmax_n(mean(Q(X))ᵀ V(X)_n))   in the parallel layout,       (B, 1, H, W)
                  a_n = sigmoid(mean(Q(X))ᵀ softmax_n(V(X))_n)   in the sequential one
        parallel:    out = a_c ⊙ X + a_n ⊙ X
        sequential:  Y = a_c ⊙ X, out = a_n(Y) ⊙ Y

    (B, dim, H, W) → (B, dim, H, W), any height and width, any floating dtype. `up` is a 1×1 convolution without bias in the
    parallel layout, and 1×1 to C/8, LayerNorm, ReLU, 1×1 in the sequential one. `zoo.capture` gets the `channel` gate
    (B, C, 1, 1) and the `spatial` one (B, 1, H, W).

    Args:
        dim: C, at least 2.
        layout: "parallel" or "sequential".
        device, dtype: as in timm.

    Differences from the authors' code (DeLightCMU/PSA, semantic-segmentation/network/PSA.py: PSA_p and PSA_s): none in what is
    computed. Sums over positions change places with the convolutions beside them, which are linear: the parallel layout then
    costs O(NC + C²) instead of O(NC²), the sequential one a third of what it did. Where `spatial_value` has hooks or is not
    what was built here (pruning, adapters), the parallel layout calls it.

    Raises:
        ValueError: arguments outside what is said above, at construction.
    """

    def __init__(
        self,
        dim: int,
        layout: Layout = "parallel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        if layout not in Layout.__args__:
            raise ValueError(f"layout must be parallel or sequential, got {layout!r}")
        self.dim, self.layout = dim, layout
        inner = dim // 2
        narrow = max(inner // 4, 1)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)

        self.channel_query = nn.Conv2d(dim, 1, 1, bias=False, **dd)
        self.channel_value = nn.Conv2d(dim, inner, 1, bias=False, **dd)
        if layout == "parallel":
            self.channel_up = nn.Conv2d(inner, dim, 1, bias=False, **dd)
        else:
            self.channel_up = nn.Sequential(
                nn.Conv2d(inner, narrow, 1, **dd), nn.LayerNorm([narrow, 1, 1], **dd), nn.ReLU(), nn.Conv2d(narrow, dim, 1, **dd))
        self.spatial_query = nn.Conv2d(dim, inner, 1, bias=False, **dd)
        self.spatial_value = nn.Conv2d(dim, inner, 1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.channel_query, self.channel_value, self.spatial_query, self.spatial_value):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")

    def channel_gate(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1), in (0, 1)."""
        attention = self.channel_query(x).flatten(2).softmax(-1)
        pooled = (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(-1)
        return self.channel_up(self.channel_value(pooled)).sigmoid()

    def spatial_gate(self, x: Tensor) -> Tensor:
        """(B, 1, H, W), in (0, 1)."""
        query = self.spatial_query(x.mean((2, 3), keepdim=True)).flatten(1)
        if self.layout == "parallel" and is_plain(self.spatial_value, nn.Conv2d):
            key = F.linear(query, self.spatial_value.weight.flatten(1).t())  # queryᵀ V(x) = (Vᵀ query)ᵀ x
            scores = (key.unsqueeze(1) @ x.flatten(2)).softmax(-1)
        elif self.layout == "parallel":
            scores = (query.unsqueeze(1) @ self.spatial_value(x).flatten(2)).softmax(-1)
        else:
            scores = query.unsqueeze(1) @ self.spatial_value(x).flatten(2).softmax(-1)
        return scores.to(x.dtype).unflatten(2, x.shape[2:]).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel_gate(x)
        if self.layout == "sequential":
            x = x * channel
        spatial = self.spatial_gate(x)
        report(self, channel=channel, spatial=spatial)
        return x * (spatial if self.layout == "sequential" else channel + spatial)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, layout={self.layout}"
