"""Linear layers over the channels of maps, faster on a CPU."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels._exporting import is_exporting

from ._plain import is_plain

_CONVOLVES = torch.backends.mkldnn.is_available()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), of an `nn.Linear` and a map (B, H, W, C): y = x Wᵀ + b at every position.

    In float32 on a CPU it runs as a 1×1 convolution: oneDNN has kernels for every instruction set and adds the bias on the way,
    while the BLAS behind `nn.Linear` was measured at half the speed on an AMD EPYC. The result differs by rounding only.
    """
    on_map = isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4
    if _CONVOLVES and on_map and is_plain(layer, nn.Linear) and not is_exporting():
        return F.conv2d(x.contiguous().permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
    return layer(x)
