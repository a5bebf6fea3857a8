"""LITv2 in the formulation of the paper (arXiv 2205.13213) in plain PyTorch: the rival of `zoo benchmark`.

Tokens lie as (B, N, C) and are turned into maps for every depthwise convolution; attention is two matrix products around a
softmax; token merging is torchvision's deformable convolution. For sizes that 32 divides.
"""
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


class HiLo(nn.Module):
    """Section 3.2: heads within windows, and heads that look at the windows' means."""

    def __init__(self, dim: int, num_heads: int, window: int, alpha: float = 0.9):
        super().__init__()
        self.window, self.head_dim = window, dim // num_heads
        self.lo_heads = num_heads if window == 1 else int(alpha * num_heads)
        self.hi_heads = num_heads - self.lo_heads
        hi, lo = self.hi_heads * self.head_dim, self.lo_heads * self.head_dim
        self.pool = nn.AvgPool2d(window, window)
        self.q, self.kv, self.lo_proj = nn.Linear(dim, lo), nn.Linear(dim, 2 * lo), nn.Linear(lo, lo)
        if hi:
            self.qkv, self.hi_proj = nn.Linear(dim, 3 * hi), nn.Linear(hi, hi)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v

    def hi(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s, m, d = self.window, self.hi_heads, self.head_dim
        x = x.reshape(b, h // s, s, w // s, s, c).transpose(2, 3)
        q, k, v = self.qkv(x).reshape(b, h * w // s**2, s * s, 3, m, d).permute(3, 0, 1, 4, 2, 5)
        out = self.attend(q, k, v).transpose(2, 3).reshape(b, h // s, w // s, s, s, m * d)
        return self.hi_proj(out.transpose(2, 3).reshape(b, h, w, m * d))

    def lo(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        m, d = self.lo_heads, self.head_dim
        q = self.q(x).reshape(b, h * w, m, d).transpose(1, 2)
        if self.window > 1:
            x = self.pool(x.permute(0, 3, 1, 2)).reshape(b, c, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(b, -1, 2, m, d).permute(2, 0, 3, 1, 4)
        return self.lo_proj(self.attend(q, k, v).transpose(1, 2).reshape(b, h, w, m * d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.hi(x), self.lo(x)), -1) if self.hi_heads else self.lo(x)


class Block(nn.Module):
    """Tokens (B, N, C) of a square map."""

    def __init__(self, dim: int, attention: nn.Module | None):
        super().__init__()
        self.norm1, self.attention = (None, None) if attention is None else (nn.LayerNorm(dim), attention)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.fc2, self.act = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.GELU()
        self.conv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(n**0.5)
        if self.attention is not None:
            x = x + self.attention(self.norm1(x).reshape(b, side, side, c)).reshape(b, n, c)
        maps = self.fc1(self.norm2(x)).transpose(1, 2).view(b, 4 * c, side, side)
        return x + self.fc2(self.act(self.conv(maps).flatten(2).transpose(1, 2)))


class Merging(nn.Module):
    """Tokens to tokens, through torchvision's deformable convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.offset, self.conv = nn.Conv2d(dim, 8, 2, stride=2), DeformConv2d(dim, 2 * dim, 2, stride=2)
        self.norm, self.act = nn.BatchNorm2d(2 * dim), nn.GELU()
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(n**0.5)
        x = x.reshape(b, side, side, c).permute(0, 3, 1, 2).contiguous()
        return self.act(self.norm(self.conv(x, self.offset(x)))).flatten(2).transpose(1, 2)


class Patches(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, dim, 4, stride=4), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).flatten(2).transpose(1, 2))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


SIZES = {  # width, depths, heads of the first stage: table 2 of the paper
    "litv2_s": (96, (2, 2, 6, 2), 3),
    "litv2_m": (96, (2, 2, 18, 2), 3),
    "litv2_b": (128, (2, 2, 18, 2), 4),
    "litv2_b_384": (128, (2, 2, 18, 2), 4),
}


def build(name: str) -> nn.Module:
    """The network `name` of the zoo in the authors' formulation, random weights."""
    width, depths, heads = SIZES[name]
    layers: list[nn.Module] = [Patches(width)]
    for i, (depth, window) in enumerate(zip(depths, (None, None, 2, 1), strict=True)):
        dim = width * 2**i
        layers += [Merging(dim // 2)] if i else []
        layers += [Block(dim, window and HiLo(dim, heads * 2**i, window)) for _ in range(depth)]
    return nn.Sequential(*layers, nn.LayerNorm(dim), Pool(), nn.Linear(dim, 1000))
