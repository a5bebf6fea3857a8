"""Per-sample depthwise convolution where channels lie innermost: with the batch beside them, the one sample is channels-last.

Convolutions prefer that, and where the batch already lies beside the channels nothing is copied.
"""
from torch import Tensor

from .._layout import in_layout_of
from .grouped import convolved


def depthwise_dynamic_conv2d(x: Tensor, kernels: Tensor) -> Tensor:
    """See `zoo.kernels.depthwise_dynamic_conv2d`; of at least one sample."""
    b, c, h, w = x.shape
    maps = x.permute(2, 3, 0, 1).reshape(1, h, w, b * c).permute(0, 3, 1, 2)
    out = convolved(maps, kernels).permute(0, 2, 3, 1).reshape(h, w, b, c).permute(2, 3, 0, 1)
    return in_layout_of(x, out)
