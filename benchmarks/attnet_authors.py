"""AttNet in the formulation of the paper (arXiv 2510.20092, section IV) in plain PyTorch: the rival of `zoo benchmark`.

Everything is NCHW and contiguous: the context is projected before it is pooled, the per-sample convolution is one with as
many groups as there are samples times channels, and norms, layer scale and gates are separate passes over the map.
"""
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn


class AttentiveConv(nn.Module):
    """Equations 6 to 10: context-to-kernel translation, differential kernel modulation, convolution, projection."""

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__()
        self.kernel_size = kernel_size
        self.context, self.value, self.out = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        self.translate = nn.Linear(kernel_size**2, kernel_size**2)
        self.theta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        k = self.kernel_size
        kernels = self.translate(F.gelu(F.adaptive_avg_pool1d(self.context(x).flatten(2), k * k)))
        kernels = kernels - torch.sigmoid(self.theta)[:, None] * kernels.mean(2, keepdim=True)
        maps = self.value(x).reshape(1, b * c, h, w)
        out = F.conv2d(maps, kernels.reshape(b * c, 1, k, k), padding=k // 2, groups=b * c)
        return self.out(out.reshape(b, c, h, w))


class GatedUnit(nn.Module):
    """Convolutional GLU: a depthwise 3×3 on the branch that is activated."""

    def __init__(self, dim: int, hidden: int, norm: bool):
        super().__init__()
        self.expand = nn.Conv2d(dim, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = RmsNorm2d(hidden, eps=1e-6) if norm else nn.Identity()
        self.reduce = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=1)
        return self.reduce(self.norm(F.gelu(self.depthwise(gate)) * value))


class Block(nn.Module):
    def __init__(self, dim: int, ratio: float, norm: bool, scale: bool):
        super().__init__()
        self.norm1, self.mixer = LayerNorm2d(dim), AttentiveConv(dim)
        self.norm2, self.unit = LayerNorm2d(dim), GatedUnit(dim, int(2 * int(dim * ratio) / 3), norm)
        self.scales = nn.ParameterList([nn.Parameter(torch.full((dim, 1, 1), 1e-6)) for _ in range(2)]) if scale else [1.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x)) * self.scales[0]
        return x + self.unit(self.norm2(x)) * self.scales[1]


WIDTHS = {  # widths, depths, norm in the gated unit, layer scale
    "attnet_xxs": ((32, 64, 128, 240), (2, 2, 4, 2), False, False),
    "attnet_xs": ((40, 80, 160, 320), (2, 2, 7, 2), False, True),
    "attnet_s": ((40, 80, 160, 320), (2, 3, 10, 3), False, False),
    "attnet_t1": ((48, 96, 224, 384), (2, 3, 12, 3), True, True),
    "attnet_t2": ((64, 128, 288, 512), (3, 3, 16, 3), True, True),
    "attnet_t3": ((72, 144, 320, 576), (4, 4, 26, 4), True, True),
    "attnet_t4": ((96, 192, 384, 768), (5, 5, 28, 5), True, True),
}


def _down(width: int, dim: int) -> list[nn.Module]:
    return [nn.Conv2d(width, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim)]


def build(name: str) -> nn.Module:
    """The network `name` of the zoo in the authors' formulation, random weights."""
    dims, depths, norm, scale = WIDTHS[name]
    layers = [*_down(3, dims[0] // 2), nn.GELU()]
    for i, (dim, depth, ratio) in enumerate(zip(dims, depths, (8, 8, 4, 4), strict=True)):
        layers += _down(dims[i - 1] if i else dims[0] // 2, dim)
        layers += [Block(dim, ratio, norm, scale) for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], 1000))
