"""Laplacian pyramids of maps (Burt and Adelson), and where maps change steeply, as in InSPyReNet (arXiv 2209.09475)."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

from zoo.kernels._exporting import is_exporting, known

RADIUS = 3  # of the Gaussian, whose deviation is 1


@register_notrace_function
def reduce(x: Tensor) -> Tensor:
    """Half the size, (B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉): every second position of G * x, with reflection at the borders.

    G is g gᵀ of 7 × 7, g_i ∝ exp(-i² / 2), of sum 1. The authors' ImagePyramid.reduce (plemeri/InSPyReNet, lib/modules/layers.py).

    Raises:
        ValueError: sizes below 4, which have no three positions to reflect.
    """
    if not is_exporting() and min(x.shape[2:]) <= RADIUS:
        raise ValueError(f"reduce: x must be (B, C, H, W) of at least {RADIUS + 1} on a side, got shape {tuple(x.shape)}")
    return _smooth(x, 1.0)[..., ::2, ::2]


@register_notrace_function
def expand(x: Tensor) -> Tensor:
    """Twice the size, (B, C, H, W) → (B, C, 2H, 2W): 4 G * u, u zeros but at even places, where x is, with reflection at the borders.

    As in `reduce`; the authors' ImagePyramid.expand. Raises ValueError for sizes below 2.
    """
    if not is_exporting() and min(x.shape[2:]) < 2:
        raise ValueError(f"expand: x must be (B, C, H, W) of at least 2 on a side, got shape {tuple(x.shape)}")
    spread = F.pad(x[..., :, None, :, None], (0, 1, 0, 0, 0, 1)).flatten(4, 5).flatten(2, 3)
    return _smooth(spread, 4.0)


@register_notrace_function
def reconstruct(x: Tensor, laplacian: Tensor) -> Tensor:
    """expand(x) + laplacian, which is interpolated (corner to corner) where its size is another; the authors' ImagePyramid.reconstruct."""
    x = expand(x)
    return x + to_size(laplacian, x.shape[2:], align_corners=True)


def residual(x: Tensor) -> Tensor:
    """What `reduce` loses: x - expand(reduce(x)), of x's shape, at odd sizes with the nearest of the larger map's positions.

    The authors' ImagePyramid.deconstruct, of one step.
    """
    back = expand(reduce(x))
    return x - (back if back.shape == x.shape else F.interpolate(back, x.shape[2:], mode="nearest"))


@register_notrace_function
def to_size(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear interpolation to a size; x itself where it has it."""
    if known(n == wanted for n, wanted in zip(x.shape[2:], size, strict=True)):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def transition(x: Tensor, kernel: int) -> Tensor:
    """1 where the sigmoid of x changes by more than a half within an ellipse of `kernel` × `kernel`, an odd number, and else 0.

    (B, C, H, W) → the same shape, without gradient: dilation minus erosion of σ(x), above 0.5. The ellipse is OpenCV's MORPH_ELLIPSE; what
    is outside of the map counts for neither. The authors' Transition (plemeri/InSPyReNet, lib/modules/layers.py).
    """
    p = x.detach().sigmoid()
    return (_dilate(p, kernel) + _dilate(-p, kernel) > 0.5).to(x.dtype)


def ellipse(kernel: int) -> list[int]:
    """How far each row of OpenCV's ellipse reaches to either side of its middle."""
    if kernel < 3 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
    radius = kernel // 2
    return [round((radius**2 - row**2) ** 0.5) for row in range(-radius, radius + 1)]


def _dilate(x: Tensor, kernel: int) -> Tensor:
    """The largest number within the ellipse, row by row of it."""
    reaches, radius = ellipse(kernel), kernel // 2
    of_rows = {reach: F.max_pool2d(x, (1, 2 * reach + 1), 1, (0, reach)) for reach in set(reaches)}
    padded = {reach: F.pad(rows, (0, 0, radius, radius), value=-torch.inf) for reach, rows in of_rows.items()}
    found = of_rows[reaches[radius]]
    for row, reach in enumerate(reaches):
        found = torch.maximum(found, padded[reach].narrow(2, row, x.shape[2]))
    return found


def _smooth(x: Tensor, factor: float) -> Tensor:
    """factor · G * x, one axis after the other."""
    places = torch.arange(-RADIUS, RADIUS + 1, device=x.device, dtype=torch.float32)
    g = torch.exp(-places.square() / 2)
    g = (factor**0.5 * g / g.sum()).to(x.dtype)
    channels = x.shape[1]
    for dim, shape in ((2, (-1, 1)), (3, (1, -1))):
        kernel = g.view(1, 1, *shape).expand(channels, -1, -1, -1)
        x = F.conv2d(_reflected(x, dim), kernel, groups=channels)
    return x


def _reflected(x: Tensor, dim: int) -> Tensor:
    """x with three more positions at either end, those next to the border in the opposite order."""
    if is_exporting():  # by index, which asks nothing of the sizes
        n = x.shape[dim]
        places = torch.arange(-RADIUS, n + RADIUS, device=x.device).abs()
        return x.index_select(dim, (n - 1) - ((n - 1) - places).abs())
    return F.pad(x, (0, 0, RADIUS, RADIUS) if dim == 2 else (RADIUS, RADIUS, 0, 0), mode="reflect")
