"""Maps of two or three spatial dimensions alike: (B, C, H, W) and (B, C, D, H, W)."""
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from zoo.kernels._backends import in_functorch
from zoo.kernels._exporting import is_exporting, known

Norm = Literal["batch", "instance", "group"]
GROUP_WIDTH = 8

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
SIZES = {2: "H, W", 3: "D, H, W"}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_MODE = {2: "bilinear", 3: "trilinear"}


def check_spatial(spatial_dims: int, norm: str) -> None:
    if spatial_dims not in CONV:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
    if norm not in Norm.__args__:
        raise ValueError(f"norm must be one of {', '.join(Norm.__args__)}, got {norm!r}")


class _GroupNorm(nn.GroupNorm):
    """With the operator itself: the functional form refuses a single position."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def norm_layer(norm: Norm, spatial_dims: int, dim: int, **dd: Any) -> nn.Module:
    """Batch norm; instance norm with factors and offsets, which takes maps of one position; groups of 8 channels.

    Where 8 does not divide the channels, groups have the largest common divisor.
    """
    if norm == "batch":
        return _BATCH_NORM[spatial_dims](dim, **dd)
    return _GroupNorm(dim if norm == "instance" else dim // math.gcd(dim, GROUP_WIDTH), dim, **dd)


@register_notrace_function
def resize(x: Tensor, to: Sequence[int] | int) -> Tensor:
    """Bi- or trilinear interpolation between the centres of positions (align_corners=False), to sizes or by a factor."""
    if isinstance(to, int):
        return F.interpolate(x, scale_factor=float(to), mode=_MODE[x.ndim - 2])
    if known(n == wanted for n, wanted in zip(x.shape[2:], to, strict=True)):
        return x
    return F.interpolate(x, tuple(to), mode=_MODE[x.ndim - 2])


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int, mode: Literal["constant", "replicate"] = "constant") -> Tensor:
    """x with zeros, or its last slices again, at the ends until `multiple` divides every size; x itself where it does."""
    sizes = [(n + multiple - 1) // multiple * multiple for n in x.shape[2:]]
    if is_exporting() and mode == "replicate":  # by index, which asks nothing of the sizes
        for dim, (n, size) in enumerate(zip(x.shape[2:], sizes, strict=True), 2):
            x = x.index_select(dim, torch.arange(size, device=x.device).clamp(max=n - 1))
        return x
    missing = [size - n for size, n in zip(sizes, x.shape[2:], strict=True)]
    if known(n == 0 for n in missing):
        return x
    return F.pad(x, [pad for n in reversed(missing) for pad in (0, n)], mode=mode)


@register_notrace_function
def crop(x: Tensor, size: Sequence[int], by_index: bool = False) -> Tensor:
    """The first positions of every spatial dimension; exported by index where that x is as large has to be taken for granted.

    torch.export guards slices by their sizes, with what it cannot prove of all, and no indices; ONNX has more operators of these.
    """
    for dim, n in enumerate(size, 2):
        if not is_exporting():
            x = x.narrow(dim, 0, n)
        else:
            x = x.index_select(dim, torch.arange(n, device=x.device)) if by_index else torch.narrow_copy(x, dim, 0, n)
    return x


@register_notrace_function
def channels_last(x: Tensor) -> Tensor:
    """x, on the CPU with channels last in memory, where convolutions are up to twice as fast."""
    if x.device.type != "cpu" or is_exporting() or in_functorch():
        return x
    return x.clone(memory_format=CHANNELS_LAST[x.ndim - 2])  # a copy, since `contiguous` leaves one channel as it is
