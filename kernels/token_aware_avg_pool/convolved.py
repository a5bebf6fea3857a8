"""Token-aware average pooling with a depthwise convolution for every pool, which ONNX has as one operator and shifts as two dozen."""
import torch.nn.functional as F
from torch import Tensor


def token_aware_avg_pool(x: Tensor, weights: Tensor) -> Tensor:
    """See `zoo.kernels.token_aware_avg_pool`; computed in the dtypes of the arguments."""
    first, *others = (weight * avg_pool(x, dilation) for dilation, weight in enumerate(weights.split(1, -1)))
    return sum(others, start=first)


def avg_pool(x: Tensor, dilation: int) -> Tensor:
    """See `reference.avg_pool`."""
    if dilation == 0:
        return x
    channels = x.shape[-1]
    ninths = x.new_full((channels, 1, 3, 3), 1 / 9)
    return F.conv2d(x.permute(0, 3, 1, 2), ninths, padding=dilation, dilation=dilation, groups=channels).permute(0, 2, 3, 1)
