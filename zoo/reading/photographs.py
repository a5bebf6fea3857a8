"""Photographs in colour that scikit-image and scikit-learn ship, so that nothing is downloaded; whole pictures of them held out."""
from typing import cast

import numpy as np
import torch
from torch import Tensor

from zoo.errors import require
from zoo.reading.masks import check_split

HELD_OUT = ("astronaut", "chelsea", "coffee")
PHOTOGRAPHS = {"train": ("china", "flower", "hubble", "ihc", "motorcycle", "retina", "rocket"), "val": HELD_OUT}
_CALLED = {"hubble": "hubble_deep_field", "ihc": "immunohistochemistry", "motorcycle": "stereo_motorcycle"}


def photographs(split: str) -> dict[str, Tensor]:
    """By their names the photographs of a split, "train" or "val", (3, H, W) uint8.

    Raises InputError for another split, and without scikit-image and scikit-learn.
    """
    check_split(split)
    require("reading the photographs that it ships", "train", "skimage")
    require("reading the photographs that it ships", "train", "sklearn")
    return {name: torch.from_numpy(_read(name).copy()).permute(2, 0, 1).contiguous() for name in PHOTOGRAPHS[split]}


def _read(name: str) -> np.ndarray:
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        return cast(np.ndarray, load_sample_image(f"{name}.jpg"))
    found = getattr(data, _CALLED.get(name, name))()
    return found[0] if name == "motorcycle" else found
