"""BiFormer in the formulation of the paper (arXiv 2303.08810, algorithm 1) in plain PyTorch: the rival of `zoo benchmark`.

Regions are cut out of the map, the keys and values of the routed regions are gathered (copied top-k times), and
attention is two matrix products around a softmax. The widths are read off the zoo's model of the same name.
"""
import torch
from torch import Tensor, nn


def _cut(x: Tensor, regions: int) -> Tensor:
    """(B, H, W, C) → (B, S², h, w, C)."""
    b, height, width, c = x.shape
    x = x.reshape(b, regions, height // regions, regions, width // regions, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, regions * regions, height // regions, width // regions, c)


def _paste(x: Tensor, regions: int) -> Tensor:
    """(B, S², h, w, C) → (B, H, W, C)."""
    b, _, h, w, c = x.shape
    return x.reshape(b, regions, regions, h, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, regions * h, regions * w, c)


def _depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


class GatheredRoutingAttention(nn.Module):
    """Algorithm 1 of the paper with the keys and values gathered."""

    def __init__(self, dim: int, num_heads: int, regions: int, topk: int):
        super().__init__()
        self.num_heads, self.regions, self.topk, self.scale = num_heads, regions, topk, dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = _depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        s, m, k = self.regions, self.num_heads, self.topk
        q, key, value = self.qkv(_cut(x, s)).chunk(3, dim=-1)
        b, r, h, w, c = q.shape
        context = self.lepe(_paste(value, s).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        affinity = q.detach().mean((2, 3)) @ key.detach().mean((2, 3)).transpose(1, 2)
        routes = affinity.topk(k, dim=-1).indices
        kv = torch.cat([key, value], -1).reshape(b, 1, r, h * w, 2 * c).expand(-1, r, -1, -1, -1)
        kv = kv.gather(2, routes[..., None, None].expand(-1, -1, -1, h * w, 2 * c))
        key, value = kv.reshape(b * r, k * h * w, 2, m, c // m).permute(2, 0, 3, 1, 4)
        q = q.reshape(b * r, h * w, m, c // m).transpose(1, 2)
        attention = ((q * self.scale) @ key.transpose(-2, -1)).softmax(-1)
        out = _paste((attention @ value).transpose(1, 2).reshape(b, r, h, w, c), s)
        return self.proj(out + context)


class GlobalAttention(nn.Module):
    """Attention over the whole map, with a depthwise branch over the input."""

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = _depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        out = (attention @ v).transpose(1, 2).reshape(b, h, w, c)
        return self.proj(out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, position: bool):
        super().__init__()
        self.position = _depthwise(dim, 3) if position else None
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, int(mlp_ratio * dim)), nn.GELU(), nn.Linear(int(mlp_ratio * dim), dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = x + self.position(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


def _down(width: int, dim: int, first: bool, swin: bool) -> nn.Sequential:
    if swin:
        conv = nn.Conv2d(width, dim, 4 if first else 2, stride=4 if first else 2)
        return nn.Sequential(conv, nn.BatchNorm2d(dim)) if first else nn.Sequential(nn.BatchNorm2d(width), conv)
    if first:
        return nn.Sequential(nn.Conv2d(width, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2), nn.GELU(),
                             nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim))
    return nn.Sequential(nn.Conv2d(width, dim, 3, 2, 1), nn.BatchNorm2d(dim))


WIDTHS = {  # widths, depths, MLP ratio, Swin layout: table 2 of the paper
    "biformer_tiny": ((64, 128, 256, 512), (2, 2, 8, 2), 3, False),
    "biformer_small": ((64, 128, 256, 512), (4, 4, 18, 4), 3, False),
    "biformer_base": ((96, 192, 384, 768), (4, 4, 18, 4), 3, False),
    "biformer_stl": ((96, 192, 384, 768), (2, 2, 6, 2), 4, True),
}


def build(name: str) -> nn.Module:
    """The network `name` of the zoo in the authors' formulation, random weights, for sizes that 224 divides."""
    dims, depths, mlp_ratio, swin = WIDTHS[name]
    layers: list[nn.Module] = []
    for i, (dim, depth, topk) in enumerate(zip(dims, depths, (1, 4, 16, None), strict=True)):
        layers.append(_down(dims[i - 1] if i else 3, dim, i == 0, swin))
        for _ in range(depth):
            attention = GatheredRoutingAttention(dim, dim // 32, 7, topk) if topk else GlobalAttention(dim)
            layers.append(Block(dim, attention, mlp_ratio, position=not swin))
    return nn.Sequential(*layers, nn.BatchNorm2d(dims[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dims[-1], 1000))
