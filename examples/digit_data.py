"""Real handwritten digits, which scikit-learn ships, in the forms that the examples need."""
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize, to_tensor

from zoo.reading.coco import box
from zoo.reading.digits import Digits, colourful_scene, grey_scene


class DigitPictures(Dataset):
    """Pictures (1, 32, 32) with their classes."""

    def __init__(self, split: str, limit: int | None = None):
        self.digits = Digits(split, limit=limit)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.digits.read(index)
        return normalize(to_tensor(picture), [0.5], [0.25]), label


def scenes_with_boxes(count: int, size: int = 96) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Pictures (3, size, size) between 0 and 1 with digits in them, and what torchvision's detectors learn: class 0 is the ground."""
    digits = Digits("train")
    for index in range(count):
        scene = colourful_scene(digits, size, np.random.default_rng(index))
        corners = [(left, top, left + width, top + height) for left, top, width, height in map(box, scene.masks)]
        yield to_tensor(scene.picture), {
            "boxes": torch.tensor(corners, dtype=torch.float32), "labels": torch.tensor(scene.labels) + 1,
            "masks": torch.from_numpy(np.stack(scene.masks)).to(torch.uint8)}


def scenes_with_maps(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, size, size) with digits in them, and maps (count, size, size) of classes: 0 the ground, 1 + digit its ink."""
    digits = Digits("train")
    pictures, maps = zip(*(grey_scene(digits, size, np.random.default_rng(index)) for index in range(count)), strict=True)
    return torch.from_numpy((np.stack(pictures) - 0.5) / 0.25).float()[:, None], torch.from_numpy(np.stack(maps)).long()
