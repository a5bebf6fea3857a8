"""A2N's attention in attention (arXiv 2104.09497): a branch with attention beside one without, weighed against each other by the input."""
from typing import Any

import torch
from torch import Tensor, nn

from ._capture import report
from ._tracing import notrace_module

SLOPE = 0.2


class PixelAttentionBranch(nn.Module):
    """k4(k3(y) ⊙ sigmoid(k2(LReLU(k1(y))))), a gate for every number of the map; k1, k3 and k4 are 3×3 without bias, k2 1×1 with."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.k1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.k2 = nn.Conv2d(dim, dim, 1, **dd)
        self.k3 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.k4 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)

    def gate(self, y: Tensor) -> Tensor:
        """(B, C, H, W), in (0, 1)."""
        return self.k2(self.act(self.k1(y))).sigmoid()

    def forward(self, y: Tensor) -> Tensor:
        gate = self.gate(y)
        report(self, gate=gate)
        return self.k4(self.k3(y) * gate)


@notrace_module
class AttentionInAttention(nn.Module):
    """Attention that decides how much of attention there is: A2N's block (arXiv 2104.09497, section 3.3).

    With LReLU of slope 0.2, 1×1 convolutions W_in, W_out without bias, and linear layers W₁ (C → C/reduction), W₂ (→ 2) without bias:

        y = LReLU(W_in X)
        π = softmax(W₂ ReLU(W₁ mean(y)) / temperature)                                         (B, 2)
        attention(y) = k4(k3(y) ⊙ sigmoid(k2(LReLU(k1(y)))))                                   k1, k3, k4 3×3, k2 1×1
        out = X + W_out LReLU(π₀ attention(y) + π₁ plain(y))                                   plain a convolution without bias

    (B, dim, H, W) → (B, dim, H, W), any height and width, any floating dtype. `zoo.capture` gets the `weights` π, (B, 2), that of the
    branch with attention first, and of its child `attention` the `gate`, (B, C, H, W).

    Args:
        dim: C.
        reduction: of the channels between W₁ and W₂; at least one stays.
        temperature: divides the two logits; at 30 the weights stay near ½ for long.
        plain_kernel: side of `plain`: 3 in A2N, 1 in A2N-M.
        device, dtype: as in timm.

    The authors' code is haoyuc/A2N, code/model/aan.py: AAB, in which nothing differs.

    Raises:
        ValueError: arguments outside what is said above, at construction.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 4,
        temperature: float = 30.0,
        plain_kernel: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or reduction < 1:
            raise ValueError(f"dim and reduction must be at least 1, got {dim} and {reduction}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if plain_kernel < 1 or plain_kernel % 2 == 0:
            raise ValueError(f"plain_kernel must be odd, got {plain_kernel}")
        self.dim, self.temperature = dim, temperature
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        hidden = max(dim // reduction, 1)
        self.conv_in = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.weigh = nn.Sequential(nn.Linear(dim, hidden, bias=False, **dd), nn.ReLU(inplace=True), nn.Linear(hidden, 2, bias=False, **dd))
        self.attention = PixelAttentionBranch(dim, **dd)
        self.plain = nn.Conv2d(dim, dim, plain_kernel, padding=plain_kernel // 2, bias=False, **dd)
        self.conv_out = nn.Conv2d(dim, dim, 1, bias=False, **dd)

    def weights(self, y: Tensor) -> Tensor:
        """(B, 2): how much the branch with attention counts, and how much the one without."""
        return (self.weigh(y.mean((2, 3))) / self.temperature).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv_in(x))
        weights = self.weights(y)
        report(self, weights=weights)
        of_attention, of_plain = weights.to(y.dtype)[:, :, None, None, None].unbind(1)
        mixed = of_attention * self.attention(y) + of_plain * self.plain(y)
        return x + self.conv_out(self.act(mixed))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, temperature={self.temperature:g}"
