"""A linear layer over the channels of maps."""
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from zoo.kernels._exporting import is_exporting

_CONVOLVES = torch.backends.mkldnn.is_available()


@register_notrace_module
class PointwiseLinear(nn.Linear):
    """`nn.Linear`, with its arguments and parameters, for (B, H, W, C) maps: y = x Wᵀ + b at every position.

    In float32 on a CPU it runs as a 1×1 convolution: oneDNN has kernels for every instruction set and adds the bias on the way,
    while the BLAS behind `nn.Linear` was measured at half the speed on an AMD EPYC. The result differs by rounding only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _CONVOLVES and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4 and not is_exporting():
            return F.conv2d(x.contiguous().permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        return super().forward(x)
