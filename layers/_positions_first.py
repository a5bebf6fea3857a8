"""Convolutions and norms of maps that lie in memory as (H, W, B, C): positions, then the batch, then channels.

Such a map of B samples is at once one channels-last image of C channels (rows of W·B positions), for 1×1 convolutions and
norms over channels, and one of B·C channels, for depthwise convolutions whose kernels differ between samples: none of them
copies a map. Shapes are (B, C, H, W) all the same. Maps in another layout are copied into this one. Exported graphs hold
the ordinary operators.
"""
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from zoo.kernels._exporting import is_exporting
from zoo.kernels._linear import linear

from ._plain import is_plain


@register_notrace_function
def positions_first(x: Tensor) -> Tensor:
    """x, copied into this layout where it is in another."""
    return x if is_exporting() else x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1×1 convolution."""
    if is_exporting():
        return F.conv2d(x, weight, bias)
    return linear(x.permute(2, 3, 0, 1), weight.flatten(1), bias).permute(2, 3, 0, 1)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), of a 1×1 `nn.Conv2d`."""
    return pointwise(x, conv.weight, conv.bias) if is_plain(conv, nn.Conv2d) else conv(x)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution, zero padded, by kernels (C, 1, k, k) of odd size."""
    b, c, h, w = x.shape
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    if is_exporting() or b == 0:
        return F.conv2d(x, weight, bias, padding=padding, groups=c)
    image = x.permute(2, 3, 0, 1).reshape(1, h, w, b * c).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight.repeat(b, 1, 1, 1), bias.repeat(b), padding=padding, groups=b * c)
    return out.permute(0, 2, 3, 1).reshape(h, w, b, c).permute(2, 3, 0, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
