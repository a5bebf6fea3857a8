"""The fully attentional block, FAN (arXiv 2204.12451), with token-aware average pooling (arXiv 2303.11126) where asked for."""
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.models.xcit import LPI
from torch import Tensor, nn

from ._attention import attend, attention
from ._initialization import fan_out_normal_
from ._linear import linear
from ._tracing import notrace_module
from .token_aware_avg_pool import TokenAwareAvgPool


@notrace_module
class TokenMixing(nn.Module):
    """Multi-head attention between all tokens of a map: out = proj(softmax(Q Kᵀ / √d) V).

    (B, H, W, C) → (B, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = (nn.Linear(dim, width, device=device, dtype=dtype) for width in (dim, 2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.proj, attend(*self._qkv(x)).transpose(1, 2).reshape(*x.shape[:3], self.proj.in_features))

    def attention(self, x: Tensor) -> Tensor:
        """softmax(Q Kᵀ / √d), (B, heads, H·W, H·W), for looking at: `forward` does not make it."""
        q, k, _ = self._qkv(x)
        return attention(q, k)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, height, width, _ = x.shape
        heads = (b, height * width, self.num_heads, self.proj.in_features // self.num_heads)
        q, k, v = (y.reshape(heads).transpose(1, 2) for y in (linear(self.q, x), *linear(self.kv, x).chunk(2, -1)))
        return q, k, v


class DepthwiseMlp(nn.Module):
    """fc2(h + γ ⊙ lpi(h)), h = fc1(x), lpi = dwconv3×3, GELU, BatchNorm, dwconv3×3 (XCiT's local patch interaction).

    (B, H, W, C) → (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int, **dd: Any):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = LPI(hidden, **dd)
        self.gamma = nn.Parameter(torch.empty(hidden, **dd))
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)
        fan_out_normal_(self.dwconv.conv1)
        fan_out_normal_(self.dwconv.conv2)

    def forward(self, x: Tensor) -> Tensor:
        x = linear(self.fc1, x)
        lpi = self.dwconv  # whose own forward takes tokens in a row
        local = lpi.conv2(lpi.bn(lpi.act(lpi.conv1(x.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)
        return linear(self.fc2, torch.addcmul(x, self.gamma, local))


@notrace_module
class ChannelProcessing(nn.Module):
    """Channel attention over an MLP (arXiv 2204.12451, section 3.2).

        a_c = τ_h · sigmoid(Σ_p softmax_p(q(x))[p, c] · mean_{c' ∈ h} softmax_p(x)[p, c']),  h the head of channel c
        out = a ⊙ LayerNorm(mlp(x)),  mlp as in `DepthwiseMlp`

    (B, H, W, C) → (B, H, W, C).
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.mlp = DepthwiseMlp(dim, hidden, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)[:, None, None] * self.norm(self.mlp(x))

    def attention(self, x: Tensor) -> Tensor:
        """a, (B, C)."""
        q, k = (y.flatten(1, 2).softmax(1).unflatten(-1, (len(self.temperature), -1)) for y in (self.q(x), x))
        scores = q.permute(0, 2, 3, 1) @ k.mean(-1).mT[..., None]
        return (self.temperature * scores.sigmoid()).flatten(1)


class FullyAttentionalBlock(nn.Module):
    """Block of FAN (arXiv 2204.12451, figure 3): attention between tokens, then between channels.

        x ← x + γ₁ ⊙ TokenMixing(LayerNorm(pool(x))),  x ← x + γ₂ ⊙ ChannelProcessing(LayerNorm(x))

    (B, H, W, C) → (B, H, W, C), any height and width, any floating dtype.

    Args:
        dim: C.
        num_heads: of both kinds of attention.
        mlp_ratio: hidden width of the MLP over C.
        num_scales: of `TokenAwareAvgPool`, which reads what attention would; None: no pool, as in plain FAN.
        drop_path: rate of stochastic depth.
        device, dtype: of the parameters, as in torch.

    Differences from the authors' code (NVlabs/FAN, models/fan.py; guoyongcs/TAPADL, TAPADL_FAN/models/tap_fan.py): maps need not be
    square, and attention is not materialised.

    Raises:
        ValueError: at construction, if num_heads does not divide dim.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, num_scales: int | None = None, drop_path: float = 0.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.pool = nn.Identity() if num_scales is None else TokenAwareAvgPool(dim, num_scales, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = TokenMixing(dim, num_heads, **dd)
        self.ls1 = LayerScale(dim, init_values=1.0, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ChannelProcessing(dim, num_heads, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values=1.0, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(self.pool(x)))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
