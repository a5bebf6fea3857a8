"""Per-sample depthwise convolution in PyTorch: one convolution with a group for every sample and channel."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import is_exporting
from .._layout import in_layout_of


def inhibited(kernels: Tensor, theta: Tensor) -> Tensor:
    """kernels - sigmoid(theta) · their mean, for (B, C, k, k) and (C,)."""
    return kernels - theta.sigmoid()[:, None, None] * kernels.mean((2, 3), keepdim=True)


def depthwise_dynamic_conv2d(x: Tensor, kernels: Tensor) -> Tensor:
    """Picks the formulation that suits the memory layout, which the result keeps."""
    if is_exporting() and not isinstance(x.shape[0], int) or x.shape[0] == 0:
        return unfolded(x, kernels)
    if is_exporting() or x.is_contiguous() or x.stride(1) != 1:
        return grouped(x, kernels)
    return in_layout_of(x, positions_first(x, kernels))


def grouped(x: Tensor, kernels: Tensor) -> Tensor:
    """The definition: samples are groups of channels of one sample."""
    b, c, h, w = x.shape
    return _convolve(x.reshape(1, b * c, h, w), kernels).reshape(b, c, h, w)


def positions_first(x: Tensor, kernels: Tensor) -> Tensor:
    """The same where channels lie innermost: with the batch beside them, the one sample is channels-last.

    Convolutions prefer that, and where the batch already lies beside the channels nothing is copied.
    """
    b, c, h, w = x.shape
    maps = x.permute(2, 3, 0, 1).reshape(1, h, w, b * c).permute(0, 3, 1, 2)
    return _convolve(maps, kernels).permute(0, 2, 3, 1).reshape(h, w, b, c).permute(2, 3, 0, 1)


def unfolded(x: Tensor, kernels: Tensor) -> Tensor:
    """The same as a product with the neighbourhoods, which a convolution by unit kernels lays side by side: slower, but without a
    number of groups."""
    (b, c, h, w), (rows, columns) = x.shape, kernels.shape[2:]
    units = torch.eye(rows * columns, dtype=x.dtype, device=x.device).reshape(-1, 1, rows, columns)
    neighbours = F.conv2d(x.reshape(b * c, 1, h, w), units, padding=(rows // 2, columns // 2)).flatten(2)
    return (kernels.reshape(b * c, 1, rows * columns) @ neighbours).squeeze(1).reshape(b, c, h, w)  # a length of 1 would make guards of h


def _convolve(maps: Tensor, kernels: Tensor) -> Tensor:
    b, c, rows, columns = kernels.shape
    return F.conv2d(maps, kernels.reshape(b * c, 1, rows, columns), padding=(rows // 2, columns // 2), groups=b * c)
