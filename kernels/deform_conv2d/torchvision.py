"""Deformable convolution by torchvision's operator, on every device that it has, in at least float32."""
import torch
from torch import Tensor
from torchvision import ops

from .reference import Pair


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    upcast = (t if t is None else t.to(inner) for t in (x, offset, weight, bias))
    return ops.deform_conv2d(*upcast, stride, padding, dilation, mask if mask is None else mask.to(inner)).to(x.dtype)
