"""Linear layers over the channels of maps, faster on a CPU."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels._exporting import known

from ._plain import is_plain

_CONVOLVES = torch.backends.mkldnn.is_available()
SMALL = 20480  # elements, by torch's choice of what convolves


def convolves(batch: int, elements: int) -> bool:
    """Whether oneDNN is known to run a convolution of so many images and of so many elements: of a single small one torch's own does."""
    return _CONVOLVES and (known((batch > 1,)) or known((elements > SMALL,)))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), of an `nn.Linear` and a map (B, H, W, C): y = x Wᵀ + b at every position.

    In float32 on a CPU it runs as a 1×1 convolution: oneDNN has kernels for every instruction set and adds the bias on the way,
    while the BLAS behind `nn.Linear` was measured at half the speed on an AMD EPYC. The result differs by rounding only.
    """
    on_map = isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4
    if on_map and is_plain(layer, nn.Linear) and convolves(x.shape[0], x.numel()):
        return F.conv2d(x.contiguous().permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
    return layer(x)
