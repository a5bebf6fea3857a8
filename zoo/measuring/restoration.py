"""How close a restored picture comes to the true one, as super-resolution measures it: PSNR and SSIM of luminance, and of all channels.

Pixels are uint8, (C, H, W), or float tensors from 0 to 255. At every border as many pixels are cut as the picture was enlarged times.
Luminance is ITU-R BT.601's of studios, 16 to 235, as MATLAB's rgb2ycbcr gives it.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import InputError, times

LUMINANCE = (65.738, 129.057, 25.064)  # of red, green and blue, over 256
SIDE, SIGMA = 11, 1.5  # of SSIM's Gaussian window
STABLE = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)


def luminance(pixels: Tensor) -> Tensor:
    """(3, H, W) → (1, H, W), from 16 to 235, float64; grey pictures, (1, H, W), as they are."""
    pixels = pixels.double()
    if len(pixels) == 1:
        return pixels
    return (pixels * pixels.new_tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True) / 256 + 16


def measured(restored: Tensor, true: Tensor, border: int) -> dict[str, float]:
    """`psnr` and `ssim` of luminance, and `psnr_rgb` and `ssim_rgb` of all channels.

    Raises InputError for pictures of different sizes, and for less than SSIM's window of 11 pixels inside the border.
    """
    if restored.shape != true.shape:
        raise InputError(f"pictures of {times(restored.shape)} and {times(true.shape)} values cannot be compared")
    if min(true.shape[1:]) - 2 * border < SIDE:
        raise InputError(f"a picture of {times(true.shape[:0:-1])} pixels has less than {SIDE} inside a border of {border}, which SSIM "
                         "looks at")
    pairs = {"": (luminance(restored), luminance(true)), "_rgb": (restored.double(), true.double())}
    inside = (slice(None), *[slice(border, length - border) for length in true.shape[1:]])
    found = {}
    for kind, (a, b) in pairs.items():
        found |= {f"psnr{kind}": psnr(a[inside], b[inside]), f"ssim{kind}": ssim(a[inside], b[inside])}
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """10 log₁₀(255² / mean((a − b)²)), in decibels; infinite where nothing differs."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of (C, H, W), the mean over channels and the places where a Gaussian 11×11 window fits.

        (2 μ_a μ_b + C₁) (2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁) (σ_a² + σ_b² + C₂)),   C₁ = (0.01 · 255)², C₂ = (0.03 · 255)²
    """
    a, b = a.double()[:, None], b.double()[:, None]
    place = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    window = torch.exp(-place.square() / (2 * SIGMA**2))
    window /= window.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b, covariance = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    first, second = STABLE
    found = (2 * mean_a * mean_b + first) * (2 * covariance + second) / (
        (mean_a**2 + mean_b**2 + first) * (variance_a + variance_b + second))
    return found.mean().item()
