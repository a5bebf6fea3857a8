"""Deformable convolution by torchvision's operator, on every device that it has, in at least float32."""
import torch
from torch import Tensor
from torchvision import ops


def deform_conv2d(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> Tensor:
    """See `zoo.kernels.deform_conv2d`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    bias, mask = (t if t is None else t.to(inner) for t in (bias, mask))
    return ops.deform_conv2d(x.to(inner), offset.to(inner), weight.to(inner), bias, stride, padding, dilation, mask).to(x.dtype)
