"""The fifteen corruptions of ImageNet-C (arXiv 1903.12261) at five severities.

They are those of the package imagecorruptions, which takes images of any size from 32 pixels on; for small images its severities, made
for 224 pixels, are harsher than they look.
"""
from typing import Any

import numpy as np

from zoo.errors import InputError, near_misses, require

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
    "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels on a side
SEEDED = ("impulse_noise", "glass_blur")  # have generators of their own; the others draw from NumPy's global one


def corrupt(pixels: np.ndarray, name: str, severity: int) -> np.ndarray:
    """The picture `pixels`, (H, W, 3) uint8 in RGB, corrupted; what is random is drawn from NumPy's global generator.

    Raises InputError for another name or severity, fewer than 32 pixels on a side, and without the package.
    """
    check_corruption(name, severity)
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST:
        raise InputError(f"a {height}x{width} image cannot be corrupted: {SMALLEST} pixels on a side are needed")
    seed = {"seed": np.random.randint(2**31)} if name in SEEDED else {}
    return check_library().corrupt(pixels, corruption_name=name, severity=severity, **seed)


def check_corruption(name: str, severity: int) -> None:
    """Raises InputError unless `name` is one of `CORRUPTIONS` and `severity` one of `SEVERITIES`."""
    if name not in CORRUPTIONS:
        raise InputError(f"unknown corruption {name!r}{near_misses(name, CORRUPTIONS) or '; known are ' + ', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity={severity}: it is 1 to 5")


def check_library() -> Any:
    """The package that corrupts. Raises InputError where it is not installed."""
    require("corrupting", "robustness", "imagecorruptions")
    import imagecorruptions
    return imagecorruptions
